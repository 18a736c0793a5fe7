"""What changes how a step is computed, and not what it computes; what a step costs; pictures beside clips."""

import importlib.util
import json

import pytest
import torch
from PIL import Image
from tiny_training import autoencoder_config, diffusion_config, log_of

from ardiff import ARDiffPipeline, ARDiffTransformerModel, AutoencoderARVAE
from ardiff.data.latents import cache_latents
from ardiff.data.scenes import SCENES, render
from ardiff.data.video import write_video
from ardiff.training.autoencoder import train_autoencoder
from ardiff.training.diffusion import image_source, train_diffusion
from ardiff.training.loop import checkpoint_gradients, repeated_blocks
from ardiff.training.losses import errors_by_timestep
from ardiff.training.throughput import count_flops, peak_flops


def curves(folder):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in log_of(folder)]


def test_gradients_with_and_without_stored_activations_are_equal(generator):
    model = ARDiffTransformerModel(num_tokens=4, in_channels=4, width=32, depth=2, num_heads=2, window=4)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1, generator=generator)
    tokens = torch.randn(2, 3, 4, 4, generator=generator)
    timesteps = torch.randint(1000, (2, 3), generator=generator)
    kept = []

    def count(tensor):
        kept.append(tensor.numel())
        return tensor

    gradients, stored = [], []
    for checkpointed in (False, True):
        if checkpointed:
            assert len(repeated_blocks(model)) == 2
            checkpoint_gradients(model)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(tokens, timesteps).square().mean()
        stored.append(sum(kept))
        model.zero_grad()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert stored[1] < 0.5 * stored[0]


def test_a_run_with_gradient_checkpointing_has_the_same_curve(tmp_path, trained_vae):
    for name, options in (("plain", {}), ("checkpointed", {"gradient_checkpointing": True})):
        train_diffusion(diffusion_config(tmp_path / name / "diffusion", trained_vae, num_steps=2, **options))
        stage = {"stage": "decoder", "init_from": str(trained_vae), "batch_size": 1, "num_steps": 2}
        train_autoencoder(autoencoder_config(tmp_path / name / "decoder", **stage, **options))
    for trained in ("diffusion", "decoder"):
        for ours, theirs in zip(
            *(curves(tmp_path / name / trained) for name in ("plain", "checkpointed")), strict=True
        ):
            assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch itself, while it traces
def test_a_compiled_run_has_the_same_curve_and_checkpoints(tmp_path, trained_vae):
    train_diffusion(diffusion_config(tmp_path / "plain", trained_vae, num_steps=4))
    compiled = {"compile": True, "num_steps": 4, "gradient_checkpointing": True}
    train_diffusion(diffusion_config(tmp_path / "compiled", trained_vae, **compiled))
    train_diffusion(diffusion_config(tmp_path / "compiled", trained_vae, num_steps=6))  # goes on without
    for ours, theirs in zip(curves(tmp_path / "plain"), curves(tmp_path / "compiled"), strict=False):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_flops_are_those_counted_by_hand():
    """A linear map of n vectors costs 2 n in out, attention 4 D queries keys; the backward pass twice as much."""
    width, depth, frames, tokens, channels, batch = 32, 2, 3, 4, 8, 5
    with torch.device("meta"):
        model = ARDiffTransformerModel(
            num_tokens=tokens, in_channels=channels, width=width, depth=depth, num_heads=2, window=frames
        )
        clean = torch.empty(batch, frames, tokens, channels, requires_grad=True)
        timesteps, labels = torch.empty(batch, frames, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
    every_token, every_frame = batch * frames * tokens, batch * frames
    block = every_token * (3 + 1 + 4 + 4) * width**2 + 2 * batch * width * (frames * tokens) ** 2
    ends = every_token * 2 * channels * width
    condition = every_frame * (256 * width + width**2 + 6 * width**2 + width * (2 * width + channels))
    forward = 2 * (depth * block + ends + condition)
    found = count_flops(model, lambda model: model(clean, timesteps, labels).sum())
    # The features of the timestep need no gradient.
    assert found == pytest.approx(3 * forward - 2 * every_frame * 256 * width, rel=1e-6)


def test_the_log_has_throughput_spread_and_errors_by_timestep(tmp_path, trained_vae):
    train_diffusion(
        diffusion_config(tmp_path, trained_vae, num_steps=6, log_every=3, checkpoint_every=6, peak_tflops=0.5)
    )
    line = log_of(tmp_path)[-1]
    assert line["mfu"] == pytest.approx(line["tflops"] / 0.5)
    assert line["frames_per_second"] > 0
    assert line["grad_norm_max"] >= line["grad_norm"]
    assert line["loss_std"] > 0
    known = [value for value in line["mse_by_timestep"] if value is not None]
    assert len(line["mse_by_timestep"]) == 10
    assert min(known) <= line["mse"] <= max(known)
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8


def test_errors_by_timestep():
    target = torch.zeros(1, 3, 2, 2)
    output = torch.ones(1, 3, 2, 2) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    sums, numbers = errors_by_timestep(output, target, torch.tensor([[0, 99, 999]]), 1000)
    assert sums.tolist() == [5.0, *[0.0] * 8, 9.0]
    assert numbers.tolist() == [2.0, *[0.0] * 8, 1.0]


def test_tensorboard(tmp_path, trained_vae):
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(ValueError, match=r"`log_with` must be empty without the package tensorboard; .*\[train\]"):
            diffusion_config(tmp_path, trained_vae, log_with="tensorboard")
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_diffusion(diffusion_config(tmp_path, trained_vae, num_steps=3, log_with="tensorboard"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(line["step"], pytest.approx(line["loss"])) for line in log_of(tmp_path)]


def test_another_length_of_the_average_holds_after_a_resume(tmp_path, trained_vae):
    train_diffusion(diffusion_config(tmp_path, trained_vae, num_steps=4))
    from ardiff.training.loop import TrainingRun

    config = diffusion_config(tmp_path, trained_vae, num_steps=4, ema_decay=0.5)
    model = ARDiffTransformerModel(
        num_tokens=1, in_channels=4, width=32, depth=1, num_heads=2, window=3, class_names=list(SCENES)
    )
    run = TrainingRun(config, model.train())
    assert (run.step, run.ema.decay, run.ema.optimization_step) == (4, 0.5, 4)
    run.close()


@pytest.fixture(scope="module")
def picture_folders(tmp_path_factory):
    """Two clips of two scenes, and six pictures of one of them and of something else."""
    folder = tmp_path_factory.mktemp("sets")
    for scene in ("balls", "clouds"):
        (folder / "clips" / scene).mkdir(parents=True)
        write_video(list(render(scene, 5, 16, 0)), folder / "clips" / scene / "0.mp4")
    for name in ("clouds", "kites"):
        (folder / "pictures" / name).mkdir(parents=True)
        for index, frame in enumerate(render("clouds", 3, 16, 1)):
            Image.fromarray(frame).save(folder / "pictures" / name / f"{index}.png")
    return folder


@pytest.mark.parametrize(("rescaled", "commit_timestep"), [(False, 0), (True, 7)])
def test_the_pipeline_samples_as_the_options_say(tmp_path, trained_vae, rescaled, commit_timestep):
    options = {"rescale_betas_zero_snr": rescaled, "commit_timestep": commit_timestep}
    folder = train_diffusion(diffusion_config(tmp_path, trained_vae, num_steps=1, **options))
    scheduler = ARDiffPipeline.from_pretrained(folder).scheduler
    assert (scheduler.alphas_cumprod[-1] == 0) == rescaled
    assert scheduler.config.commit_timestep == commit_timestep
    config = diffusion_config(tmp_path / "other", trained_vae, rescale_betas_zero_snr=True, prediction_type="epsilon")
    with pytest.raises(ValueError, match="`prediction_type` must be 'sample' or 'v_prediction'"):
        train_diffusion(config)
    assert not (tmp_path / "other").exists()


def test_pictures_are_clips_of_one_frame(tmp_path, trained_vae, picture_folders):
    config = diffusion_config(
        tmp_path, trained_vae, data=str(picture_folders / "clips"), image_data=f"images:{picture_folders / 'pictures'}",
        images_per_clip=2.5, num_steps=2, class_dropout=0.0,
    )  # fmt: skip
    source = image_source(config, ("balls", "clouds"))
    assert source.classes.tolist() == [1, 2, 2]  # clouds are clouds; kites have no class, as pictures without one
    assert source.clips[0][0].shape == (5, 1, 16, 16, 3)
    train_diffusion(config)
    line = log_of(tmp_path)[0]
    assert {"mse", "image_mse"} <= set(line)


def test_the_loss_is_a_mean_over_all_frames(tmp_path, trained_vae, picture_folders):
    """2 clips x 2 draws x 3 frames and 4 pictures x 2 draws: shares of 12/20 and 8/20. Cached tokens and files agree."""
    vae = AutoencoderARVAE.from_pretrained(trained_vae).eval()
    kinds = {"clips": f"videos:{picture_folders / 'clips'}", "pictures": f"images:{picture_folders / 'pictures'}"}
    for name, data in kinds.items():
        cache_latents(data, vae, tmp_path / name, dtype="float32", progress=False)
    options = {"images_per_clip": 2, "num_steps": 1, "prediction_type": "epsilon"}
    config = diffusion_config(
        tmp_path / "cached", trained_vae, data=f"latents:{tmp_path / 'clips'}", image_data=f"latents:{tmp_path / 'pictures'}", **options
    )  # fmt: skip
    train_diffusion(config)
    train_diffusion(
        diffusion_config(tmp_path / "files", trained_vae, data=kinds["clips"], image_data=kinds["pictures"], **options)
    )
    (cached,), (files,) = log_of(tmp_path / "cached"), log_of(tmp_path / "files")
    assert cached["loss"] == pytest.approx(0.6 * cached["mse"] + 0.4 * cached["image_mse"], rel=1e-5)
    assert cached["loss"] == pytest.approx(files["loss"], rel=1e-4)


def test_without_pictures_nothing_changes(tmp_path, trained_vae):
    train_diffusion(diffusion_config(tmp_path / "none", trained_vae, num_steps=1))
    train_diffusion(diffusion_config(tmp_path / "some", trained_vae, num_steps=1, images_per_clip=4))
    (none,), (some,) = log_of(tmp_path / "none"), log_of(tmp_path / "some")
    assert none["mse"] == some["mse"]
    assert json.dumps(none["loss"]) != json.dumps(some["loss"])
