"""The whole report: its structure, what it may depend on, its targets, its table, and what is saved when."""

import json

import pytest
from PIL import Image

from ardiff.evaluation import report as report_module
from ardiff.evaluation.report import LABEL_WIDTH, PROMPT_MARK, evaluate, format_report, targets


ARGUMENTS = {
    "scenes": ["balls", "sunset"],
    "num_clips": 2,
    "gaps": (0, 1, 3),
    "prediction_gaps": (1,),
    "num_inference_steps": 3,
    "batch_size": 3,
    "bootstrap": 10,
    "progress": False,
}


def numbers(tree: object, path: str = "") -> dict[str, float]:
    """Every number of a report by where it stands."""
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {name: value for key, branch in pairs for name, value in numbers(branch, f"{path}/{key}").items()}
    return {path: float(tree)} if isinstance(tree, int | float) else {}


def good_report() -> dict:
    """Figures that meet every target, exactly at its limit."""
    mean = {"below_ceiling_db": 5.0, "above_repeat_db": 4.0}
    return {
        "autoencoder": {"mean_psnr_db": 31.0, "lowest_psnr_db": 27.0},
        "prediction": {"5": {"mean_of_deterministic_scenes": mean}},
        "samples": {"gaps": {"0": {"ratio_to_floor": 3.0}, "50": {"ratio_to_floor": 2.0}}},
    }


def test_report_is_whole_saved_as_json_and_drawn(tiny_pipeline, tmp_path):
    out = tmp_path / "report.json"
    report = evaluate(tiny_pipeline, **ARGUMENTS, out=out, samples=tmp_path / "strips")
    assert json.loads(out.read_text()) == report
    assert [path.name for path in tmp_path.glob("*.json*")] == ["report.json"]
    assert list(report["autoencoder"]["scenes"]) == ["balls", "sunset"]
    assert list(report["prediction"]) == ["1"]
    floor = report["samples"]["floor"]
    assert list(report["samples"]["gaps"]) == ["0", "1", "3"]
    for sampled in report["samples"]["gaps"].values():
        assert sampled["ratio_to_floor"] == sampled["frechet_distance"] / floor["frechet_distance"]
        low, high = sampled["frechet_distance_interval"]
        assert 0 <= low <= sampled["frechet_distance"] <= high
        for scene in ("balls", "sunset"):
            distance, reference = sampled["scenes"][scene], floor["scenes"][scene]
            assert distance["ratio_to_floor"] == distance["frechet_distance"] / reference["frechet_distance"]
    # An untrained autoencoder loses nearly everything: its reconstructions are far from the clips, other clips are near.
    assert 0 < 5 * floor["frechet_distance"] < report["samples"]["reconstruction"]["frechet_distance"]
    assert report["counts"] == {
        "0": {"frame_evaluations": 48, "expected_frame_evaluations": 48},
        "1": {"frame_evaluations": 63, "expected_frame_evaluations": 63},
        "3": {"frame_evaluations": 63, "expected_frame_evaluations": 63},
    }
    assert len(report["targets"]) == 2 + 2 + 3

    strip = Image.open(tmp_path / "strips" / "balls.png")
    # For each of two clips: real, reconstruction, prediction, three gaps.
    assert strip.size == (LABEL_WIDTH + 16 * 34, 12 * 34)
    marked = [strip.getpixel((LABEL_WIDTH + column * 34, 2 * 34)) == PROMPT_MARK for column in range(16)]
    assert marked == [True] * 4 + [False] * 12

    table = format_report(report)
    assert len([line for line in table.splitlines() if line.startswith("all, 95 % interval")]) == 1
    for text in ("Autoencoder", "4 frames continued to 16, gap 1", "ratio 3", "mean, deterministic", "MISSED"):
        assert text in table
    for value in (floor["frechet_distance"], report["samples"]["gaps"]["3"]["scenes"]["sunset"]["ratio_to_floor"]):
        assert f"{value:.2f}" in table
    assert table.isascii()


def test_same_seed_same_report_another_seed_another(tiny_pipeline):
    arguments = {**ARGUMENTS, "gaps": (1,)}
    first = evaluate(tiny_pipeline, **arguments)
    assert evaluate(tiny_pipeline, **arguments) == first
    other = evaluate(tiny_pipeline, **arguments, seed=1)
    for part in ("autoencoder", "prediction", "samples"):
        assert other[part] != first[part]


def test_figures_do_not_depend_on_the_batch_size(tiny_pipeline):
    arguments = {**ARGUMENTS, "gaps": (1,)}
    small, large = (numbers(evaluate(tiny_pipeline, **{**arguments, "batch_size": size})) for size in (1, 64))
    assert small == pytest.approx(large, rel=2e-3, abs=2e-3)


def test_guidance_reaches_the_pipeline_and_nothing_else(tiny_pipeline):
    arguments = {**ARGUMENTS, "gaps": (1,)}
    plain = evaluate(tiny_pipeline, **arguments)
    guided = evaluate(tiny_pipeline, **arguments, guidance_scale=3.0)
    assert guided["autoencoder"] == plain["autoencoder"]
    assert guided["samples"]["floor"] == plain["samples"]["floor"]
    assert guided["samples"]["gaps"] != plain["samples"]["gaps"]
    assert guided["prediction"] != plain["prediction"]


def test_folder_and_all_scenes(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    arguments = {**ARGUMENTS, "gaps": (1,)}
    report = evaluate(tmp_path / "model", **{**arguments, "scenes": ["all"]})
    assert report["model"] == str(tmp_path / "model")
    assert report["settings"]["scenes"] == ["balls", "clouds", "sunset"]
    in_memory = evaluate(tiny_pipeline, **{**arguments, "scenes": None})
    assert {**in_memory, "model": report["model"]} == report


def test_an_interrupted_evaluation_keeps_what_it_has(tiny_pipeline, tmp_path, monkeypatch):
    measure = report_module.measure_samples

    def stop_at_gap_1(pipe, settings, gap, *rest):
        if gap == 1:
            raise KeyboardInterrupt
        measure(pipe, settings, gap, *rest)

    monkeypatch.setattr(report_module, "measure_samples", stop_at_gap_1)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_pipeline, **ARGUMENTS, out=tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["samples"]["gaps"]) == ["0"]
    assert len(report["targets"]) == 5
    assert "gap 0" in format_report(report)


def test_bar_ends_where_it_said(tiny_pipeline, capsys):
    evaluate(tiny_pipeline, **{**ARGUMENTS, "progress": True})
    # Per clip: continuation 4 + 12 * 3 + 11, samples 48 + 63 + 63; 4 clips.
    assert "900/900" in capsys.readouterr().err.rstrip().splitlines()[-1].rpartition("\r")[-1]


def test_targets_at_their_limits_are_met():
    found = targets(good_report())
    assert [target["met"] for target in found] == [True] * 6
    assert [target.get("at_least", target.get("at_most")) for target in found] == [31.0, 27.0, 5.0, 4.0, 3.0, 3.0]
    assert all({"target", "value", "unit", "met"} <= set(target) for target in found)


@pytest.mark.parametrize(
    ("path", "value", "missed"),
    [
        ("autoencoder/mean_psnr_db", 30.99, 0),
        ("autoencoder/lowest_psnr_db", 26.99, 1),
        ("prediction/5/mean_of_deterministic_scenes/below_ceiling_db", 5.01, 2),
        ("prediction/5/mean_of_deterministic_scenes/above_repeat_db", 3.99, 3),
        ("samples/gaps/0/ratio_to_floor", 3.01, 4),
        ("samples/gaps/50/ratio_to_floor", float("nan"), 5),
    ],
)
def test_each_target_is_missed_alone(path, value, missed):
    report = good_report()
    *parents, name = path.split("/")
    branch = report
    for parent in parents:
        branch = branch[parent]
    branch[name] = value
    assert [index for index, target in enumerate(targets(report)) if not target["met"]] == [missed]


def test_targets_of_parts_that_are_missing_are_left_out():
    assert targets({}) == []
    report = good_report()
    report["prediction"]["5"]["mean_of_deterministic_scenes"] = {}
    assert len(targets(report)) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scenes": ["planets"]},
            r"`scenes` must name scenes that the model knows \(balls, clouds, sunset\) but is \['pl",
        ),
        ({"scenes": []}, "`scenes` must name scenes"),
        ({"scenes": ["balls", "balls"]}, "`scenes` must hold at least one entry, each once"),
        ({"num_clips": 1}, r"`num_clips` must be in \[2, 10000\] but is 1"),
        ({"seed": -1}, r"`seed` must be in \[0, 2000\] but is -1"),
        ({"bootstrap": 1}, "`bootstrap` must be 0 or at least 2 but is 1"),
        ({"batch_size": 0}, r"`batch_size` must be in \[1, 10000\] but is 0"),
        ({"dtype": "float16"}, "`dtype` must be one of float32, bfloat16 but is 'float16'"),
        ({"gaps": ()}, r"`gaps` must hold at least one entry, each once, but is \[\]"),
        ({"gaps": (0, 4)}, "`ar_step` must"),
        ({"prediction_gaps": (1, 1)}, "`prediction_gaps` must hold"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be"),
        ({"guidance_scale": 0.5}, r"`guidance_scale` must be in \[1, 20\] but is 0.5"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(tiny_pipeline, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_pipeline, **{**ARGUMENTS, **changes}, out=tmp_path / "report.json")
    assert not list(tmp_path.iterdir())
