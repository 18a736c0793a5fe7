"""Both trainers end to end at a tiny size: they learn, resume after a kill on the same curve, and export what they trained."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_training import autoencoder_config, diffusion_config, log_of

from ardiff import ARDiffPipeline, AutoencoderARVAE
from ardiff.data.video import write_video
from ardiff.training.autoencoder import preset as autoencoder_preset
from ardiff.training.autoencoder import train_autoencoder
from ardiff.training.diffusion import DiffusionTrainingConfig, draw_timesteps, train_diffusion
from ardiff.training.diffusion import preset as diffusion_preset
from ardiff.training.loop import CountFrom


def test_the_autoencoder_learns_and_is_exported(tmp_path):
    folder = train_autoencoder(autoencoder_config(tmp_path, num_steps=30, sample_every=30, log_every=5))
    log = log_of(tmp_path)
    assert [line["step"] for line in log] == [5, 10, 15, 20, 25, 30]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert log[-1]["psnr"] > log[0]["psnr"] + 1
    vae = AutoencoderARVAE.from_pretrained(folder)
    assert len(vae.config.latents_mean) == len(vae.config.latents_std) == 4
    assert (tmp_path / "samples" / "step-00000030.png").stat().st_size > 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000028", "step-00000030"]


def test_the_second_stage_keeps_the_encoder(tmp_path, trained_vae):
    folder = train_autoencoder(autoencoder_config(tmp_path, stage="decoder", init_from=str(trained_vae), batch_size=2))
    before, after = (AutoencoderARVAE.from_pretrained(path) for path in (trained_vae, folder))
    frames = torch.rand(1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = before.encode(frames).mode()
        assert torch.equal(after.encode(frames).mode(), latents)
        assert not torch.equal(after.decode(latents), before.decode(latents))


def test_diffusion_exports_a_working_pipeline(tmp_path, trained_vae):
    folder = train_diffusion(diffusion_config(tmp_path, trained_vae))
    assert all(torch.tensor(line["loss"]).isfinite() for line in log_of(tmp_path))
    pipe = ARDiffPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert "clouds" in pipe.class_names
    video = pipe(class_labels=["clouds"], num_frames=4, num_inference_steps=3, ar_step=1, output_type="np").frames
    assert video.shape == (1, 4, 16, 16, 3)
    weights = (folder / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert str(trained_vae.parent) not in (folder / "vae" / "config.json").read_text()
    assert weights == pytest.approx(2 * sum(p.numel() for p in pipe.transformer.parameters()), rel=0.2)


def test_a_killed_run_goes_on_with_the_same_losses(tmp_path, trained_vae):
    # Muon for the matrices of the blocks, AdamW for the rest: the state of both is in a checkpoint.
    options = {"num_steps": 30, "checkpoint_every": 3, "sample_every": 30, "optimizer": "muon"}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train_diffusion(diffusion_config(straight, trained_vae, **options))
    code = (
        "import json, sys\n"
        "from ardiff.training.diffusion import DiffusionTrainingConfig, train_diffusion\n"
        "train_diffusion(DiffusionTrainingConfig(**json.loads(sys.argv[1])))\n"
    )
    options = json.dumps(vars(diffusion_config(killed, trained_vae, **options)))
    process = subprocess.Popen([sys.executable, "-c", code, options], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(killed.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "pipeline").exists()
    train_diffusion(DiffusionTrainingConfig(**json.loads(options)))
    losses = [[(line["step"], line["loss"]) for line in log_of(folder)] for folder in (straight, killed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 30


def test_training_starts_from_a_given_model(tmp_path, trained_vae):
    first = train_diffusion(diffusion_config(tmp_path / "first", trained_vae))
    second = train_diffusion(
        diffusion_config(tmp_path / "second", trained_vae, init_from=str(first), learning_rate=1e-12)
    )
    weights = [ARDiffPipeline.from_pretrained(folder).transformer.state_dict() for folder in (first, second)]
    for name, value in weights[0].items():
        assert torch.allclose(weights[1][name], value, atol=1e-6), name


def test_a_folder_of_videos_trains_too(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("cats/a", "cats/b", "dogs/c"):
        path = tmp_path / "videos" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = torch.randint(256, (5, 16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
        write_video(list(frames), path)
    data = {"data": str(tmp_path / "videos"), "num_steps": 2, "sample_every": 2}
    vae = train_autoencoder(autoencoder_config(tmp_path / "vae", picture_share=0.0, **data))
    pipeline = train_diffusion(diffusion_config(tmp_path / "run", vae, **data))
    assert ARDiffPipeline.from_pretrained(pipeline).class_names == ("cats", "dogs")


def test_timestep_shares(tmp_path):
    config = DiffusionTrainingConfig(synchronous_share=1.0, lagged_share=0.0)
    drawn = draw_timesteps(config, 50, 8, 1000, torch.Generator().manual_seed(0))
    assert (drawn == drawn[:, :1]).all()
    config = DiffusionTrainingConfig(timesteps="independent", synchronous_share=0.0, lagged_share=0.5)
    drawn = draw_timesteps(config, 4000, 8, 1000, torch.Generator().manual_seed(0))
    monotone = (drawn.diff(dim=1) >= 0).all(dim=1).float().mean()
    assert monotone == pytest.approx(0.5, abs=0.03)


def test_resumed_steps_are_the_remaining_ones():
    assert list(CountFrom(3, 6)) == [3, 4, 5]
    assert len(CountFrom(3, 6)) == 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: autoencoder_preset("scenes-64-tpu"), "`preset` must be one of scenes-64-cpu, .*scenes-64-gpu but is 'scenes-64-tpu'"),
        (lambda: diffusion_preset("tiny"), "`preset` must be one of .* but is 'tiny'"),
        (lambda: diffusion_preset("scenes-64-cpu", num_steps=0), "`num_steps` must be at least 1 but is 0"),
        (lambda: diffusion_preset("scenes-64-cpu", timesteps="fop"), "`timesteps` must be one of .* but is 'fop'"),
        (lambda: diffusion_preset("scenes-64-cpu", lagged_share=0.95), "`lagged_share` .* at most 1 together"),
        (lambda: diffusion_preset("scenes-64-cpu", snr_cap=0.5), "`snr_cap` must be at least 1 but is 0.5"),
        (lambda: diffusion_preset("scenes-64-cpu", optimizer="sgd"), "`optimizer` must be 'adamw' or 'muon' but is 'sgd'"),
        (lambda: autoencoder_preset("scenes-64-cpu", stage="decoder"), "`init_from` must name"),
        (lambda: autoencoder_preset("scenes-64-cpu", mixed_precision="fp8"), "`mixed_precision` must be 'no' or 'bf16'"),
        (lambda: autoencoder_preset("scenes-64-cpu", picture_share=1.0), r"`picture_share` must be in \[0, 1\) but is 1.0"),
    ],
)  # fmt: skip
def test_bad_options_are_one_clear_sentence(build, message):
    with pytest.raises(ValueError, match=message):
        build()
