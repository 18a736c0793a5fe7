"""The ablation at a tiny size: what is counted, shared, resumed and compared."""

import csv
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from ardiff import ADScheduler, ARDiffTransformerModel
from ardiff.data.clips import LATEST_START, step_generator
from ardiff.evaluation.ablation.clips import TrainingTokens
from ardiff.evaluation.ablation.measuring import LOSS_TIMESTEPS, loss_by_timestep
from ardiff.evaluation.ablation.reporting import (
    T_QUANTILES,
    column_value,
    compare,
    format_table,
    interval,
    write_into,
)
from ardiff.evaluation.ablation.run import ablate, frame_evaluations, train_and_measure
from ardiff.evaluation.ablation.settings import BASE, NUM_BLOCKS, RECIPE_CONFIGURATIONS, Job, Size
from ardiff.training.diffusion import PRESETS, DiffusionTrainingConfig, draw_timesteps


TINY = Size(
    scenes=("pendulum", "sunset"),
    num_training_clips=3,
    width=16,
    depth=1,
    num_heads=2,
    batch_size=2,
    num_steps=3,
    learning_rate=1e-3,
    num_inference_steps=6,
    num_clips=3,
    num_long_clips=2,
    num_prompts=2,
    num_real=4,
    mixed_precision="no",
)
RECIPE = RECIPE_CONFIGURATIONS[-1]
# All that can differ from the base at once.
OTHER = replace(RECIPE, causal=False, law="independent", prediction_type="v_prediction")


def recipe_of(options):
    """What a configuration shares with the options of the training."""
    names = (
        "prediction_type", "rescale_betas_zero_snr", "synchronous_share", "lagged_share", "timestep_candidates",
        "commit_timestep",
    )  # fmt: skip
    return {name: options[name] for name in names}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    from ardiff import AutoencoderARVAE

    folder = tmp_path_factory.mktemp("vae")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderARVAE(
            image_size=32, latent_channels=4, stem_channels=[8, 8, 16], width=16, num_encoder_layers=1,
            num_decoder_layers=1, num_heads=2, temporal_window=3,
        ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def finished(vae, tmp_path_factory):
    """An ablation of one configuration with two seeds, its folder and its results."""
    folder = tmp_path_factory.mktemp("ablation")
    report = ablate(folder, TINY, vae=vae, num_seeds=2, configurations=[BASE], command="ardiff ablate", progress=False)
    return folder, report


def test_results_are_on_disk_and_in_every_table(finished):
    folder, report = finished
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(report))
    assert [(run["name"], run["seed"]) for run in report["runs"]] == [("fopp", 0), ("fopp", 1)]
    assert list(report["table"]["fopp"]) == [
        "16 frames, gap 0", "16 frames, gap 5", "16 frames, gap 6",
        "64 frames, gap 0", "64 frames, gap 5", "64 frames, gap 6", "continuation",
    ]  # fmt: skip
    with open(folder / "drift.csv") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + 2 * 3
    assert {len(row) for row in rows} == {3 + NUM_BLOCKS}
    with open(folder / "loss.csv") as file:
        assert len(list(csv.reader(file))) == 1 + 2 * len(LOSS_TIMESTEPS)
    table = (folder / "table.md").read_text()
    assert table == format_table(report)
    mean = report["table"]["fopp"]["16 frames, gap 5"]["mean"]
    assert f"{mean:.2f} ±" in table
    assert "`ardiff ablate`" in table


@pytest.mark.slow
def test_seeds_differ_and_figures_of_a_seed_do_not_on_more_processes(finished, vae, tmp_path):
    _, report = finished
    first, second = report["runs"]
    assert first["loss"] != second["loss"]
    again = ablate(tmp_path, TINY, vae=vae, num_seeds=2, configurations=[BASE], processes=2, progress=False)
    # Equal to rounding: a process of its own has one thread.
    assert again["runs"][1]["samples"] == pytest.approx(second["samples"], rel=1e-2)
    assert again["runs"][1]["loss"]["all_noisy"] == pytest.approx(second["loss"]["all_noisy"], rel=1e-4)
    assert again["runs"][0]["loss"]["all_noisy"] != pytest.approx(second["loss"]["all_noisy"], rel=1e-4)


def test_finished_runs_are_not_done_again(finished, vae, monkeypatch):
    folder, report = finished

    def refuse(*arguments):
        raise AssertionError("a finished run was started")

    monkeypatch.setattr("ardiff.evaluation.ablation.run.train_and_measure", refuse)
    again = ablate(folder, TINY, vae=vae, num_seeds=2, configurations=[BASE], progress=False)
    assert again["runs"] == report["runs"]
    assert again["seconds"] > report["seconds"]


def test_folder_of_another_size_is_refused(finished, vae):
    folder, _ = finished
    other = Size(**{**vars(TINY), "num_steps": 4})
    with pytest.raises(ValueError, match=r"`out` must be .* differs in \['num_steps'\]"):
        ablate(folder, other, vae=vae)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_seeds": 1}, r"`num_seeds` must be in \[2, 10\] but is 1"),
        ({"processes": 0}, "`processes` must be at least 1 but is 0"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ablate(tmp_path / "new", TINY, vae="none", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "configuration",
    [pytest.param(BASE, marks=pytest.mark.slow), OTHER],
    ids=lambda configuration: configuration.name,
)
def test_bar_counts_what_is_evaluated(finished, vae, tmp_path, configuration):
    folder, _ = finished
    (tmp_path / "data").symlink_to(folder / "data")
    heard = []
    job = Job(out=tmp_path, vae=str(vae), size=TINY, device="cpu")
    train_and_measure(job, configuration, 0, heard.append)
    assert sum(heard) == frame_evaluations(TINY, configuration)
    folder = job.run_folder(configuration, 0)
    assert ARDiffTransformerModel.from_pretrained(folder / "transformer").config.causal is configuration.causal
    options = json.loads((folder / "training_config.json").read_text())
    assert options["timesteps"] == configuration.law
    assert recipe_of(options) == recipe_of(asdict(configuration))


def test_recipe_of_the_bundled_model_is_one_of_the_rows():
    configuration = asdict(RECIPE)
    assert configuration["name"] == "recipe"
    assert recipe_of(configuration) == recipe_of(asdict(PRESETS["scenes-64-cpu"])) != recipe_of(asdict(BASE))
    assert RECIPE.scheduler().alphas_cumprod[-1] == 0.0
    assert RECIPE.scheduler().config.commit_timestep == configuration["commit_timestep"] > 0


def test_batches_start_as_in_training_on_scenes(finished, vae):
    folder, _ = finished
    clips = TrainingTokens(Job(out=folder, vae=str(vae), size=TINY, device="cpu"))
    # Tokens that say where they come from: clip in channel 0, frame in channel 1.
    index = torch.arange(6)[:, None].expand(6, LATEST_START + 16)
    frame = torch.arange(LATEST_START + 16)[None].expand_as(index)
    clips.tokens = torch.stack([index, frame], dim=-1)[:, :, None].half()
    starts = []
    for step in range(300):
        tokens, labels = clips.batch(step_generator(0, step))
        assert tokens.shape == (2, 16, 1, 2)
        assert torch.equal(tokens[:, :, 0, 1].diff(dim=1), torch.ones(2, 15))
        assert torch.equal(tokens[:, 0, 0, 0] // 3, labels.float())
        starts += tokens[:, 0, 0, 1].tolist()
    share = np.mean(np.array(starts) == 0)
    assert abs(share - (0.5 + 0.5 / (LATEST_START + 1))) < 5 * math.sqrt(0.25 / 600)
    assert max(starts) == LATEST_START


def test_laws_are_not_mixed():
    config = DiffusionTrainingConfig(timesteps="synchronous", synchronous_share=0.0, lagged_share=0.0)
    drawn = draw_timesteps(config, 50, 16, 1000, torch.Generator().manual_seed(0))
    assert bool((drawn == drawn[:, :1]).all())


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_loss_is_that_of_the_clean_tokens_whatever_is_predicted(prediction_type):
    model = ARDiffTransformerModel(num_tokens=4, in_channels=4, width=16, depth=1, num_heads=2)  # untrained: returns 0
    scheduler = ADScheduler(prediction_type=prediction_type)
    tokens = torch.randn((3, 5, 4, 4), generator=torch.Generator().manual_seed(1))
    found = loss_by_timestep(model, scheduler, tokens, None, timesteps=[0, 400, 900])
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    for index, timestep in enumerate(found["timesteps"]):
        alpha = float(scheduler.alphas_cumprod[timestep])
        noisy = alpha**0.5 * tokens + (1 - alpha) ** 0.5 * noise
        guess = {"sample": 0 * noisy, "epsilon": noisy / alpha**0.5, "v_prediction": noisy * alpha**0.5}
        error = (guess[prediction_type] - tokens).square()
        assert found["all_noisy"][index] == pytest.approx(float(error.mean()), rel=1e-3)
        assert found["last_noisy"][index] == pytest.approx(float(error[:, -1].mean()), rel=1e-3)


def test_interval_is_students():
    # scipy.stats.t.interval(0.95, 2, loc=2, scale=1 / sqrt(3)) = (-0.4841, 4.4841)
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["half_width"] == pytest.approx(2.4841, abs=1e-3)
    assert interval([1.0])["half_width"] is None


def test_quantiles_are_those_of_student():
    stats = pytest.importorskip("scipy.stats")
    assert [round(float(stats.t.ppf(0.975, degrees)), 3) for degrees in range(1, 10)] == list(T_QUANTILES)


def result(name, seed, short, long, continuation):
    """One run's figures, the same at every gap."""
    gaps = ("0", "5", "10")
    return {
        "name": name,
        "seed": seed,
        "samples": dict.fromkeys(gaps, short),
        "long_samples": {gap: [value] * NUM_BLOCKS for gap, value in zip(gaps, long, strict=True)},
        "continuation_psnr_db": continuation,
    }


def test_comparison_is_by_seed_and_knows_what_is_better():
    # The seeds differ far more than the configurations: only pairs of the same seed show who is better.
    runs = [result("fopp", seed, 10.0 * seed + 1, (9, 5, 5), 20.0 + seed) for seed in range(3)]
    runs += [
        result("synchronous", seed, 10.0 * seed + 2 + 0.1 * seed, (7, 7, 7), 19.0 + 2.3 * seed) for seed in range(3)
    ]
    columns = [f"16 frames, gap {gap}" for gap in (0, 5, 10)] + [f"64 frames, gap {gap}" for gap in (0, 5, 10)]
    table = {name: dict.fromkeys([*columns, "continuation"]) for name in ("fopp", "synchronous")}
    found = {
        (row["question"], tuple(row["first"]), tuple(row["second"])): row
        for row in compare({"runs": runs, "table": table, "seeds": [0, 1, 2]})
    }

    def verdict(question, first, second):
        return found[question, first, second]["first_is"]

    short, blocks, long = columns[0], columns[3], columns[4]
    assert verdict("training", ("fopp", short), ("synchronous", short)) == "better"
    assert verdict("training", ("fopp", blocks), ("synchronous", blocks)) == "worse"
    assert verdict("training", ("fopp", "continuation"), ("synchronous", "continuation")) == "undecided"
    assert verdict("sampling", ("fopp", long), ("fopp", blocks)) == "better"
    assert verdict("sampling", ("synchronous", long), ("synchronous", blocks)) == "undecided"
    assert verdict("both", ("fopp", long), ("synchronous", blocks)) == "better"
    row = found["training", ("fopp", short), ("synchronous", short)]
    assert (row["mean"], row["num_seeds"]) == (pytest.approx(-1.1), 3)


def test_long_videos_count_all_their_blocks():
    run = result("fopp", 0, 1.0, (1, 2, 3), 20.0)
    run["long_samples"]["5"] = [1.0, 2.0, 3.0, 6.0]
    assert column_value(run, "64 frames, gap 5") == 3.0


def test_results_go_between_their_marks(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# A\n\n<!-- ablation -->\nold\n<!-- /ablation -->\n\n## B\n")
    write_into(path, "| new |\n")
    expected = "# A\n\n<!-- ablation -->\n\n| new |\n\n<!-- /ablation -->\n\n## B\n"
    assert path.read_text() == expected
    write_into(path, "| new |\n")
    assert path.read_text() == expected
    path.write_text("# A\n<!-- /ablation -->\n<!-- ablation -->\n")
    with pytest.raises(
        ValueError, match="`--readme` must have one line <!-- ablation --> and one line <!-- /ablation -->"
    ):
        write_into(path, "new")


def test_all_plots_of_an_ablation(finished):
    pytest.importorskip("matplotlib")
    from PIL import Image

    from ardiff.evaluation.plots import plot_ablation

    folder, _ = finished
    names = ["quality.png", "gaps.png", "drift.png", "loss.png", "samples.png", "long_samples.png"]
    assert plot_ablation(folder) == [folder / name for name in names]
    for name in names:
        with Image.open(folder / name) as picture:
            assert picture.width == 1600
