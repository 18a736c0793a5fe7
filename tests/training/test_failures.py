"""What ends a run ends it with one clear message, and the last good checkpoint goes on as if nothing had been."""

import errno
import os
import resource
import signal

import pytest
import torch
from tiny_training import diffusion_config, log_of
from tqdm.auto import tqdm

from ardiff.cli import main
from ardiff.data.clips import SceneClips
from ardiff.training.diffusion import train_diffusion
from ardiff.training.loop import TrainingError, TrainingRun


OPTIONS = {"num_steps": 6, "checkpoint_every": 2, "sample_every": 6}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, trained_vae):
    """Losses of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    train_diffusion(diffusion_config(folder, trained_vae, **OPTIONS))
    return losses_of(folder)


def losses_of(folder):
    return [(line["step"], line["loss"]) for line in log_of(folder)]


def checkpoints_of(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_goes_on(folder, vae, straight):
    train_diffusion(diffusion_config(folder, vae, **OPTIONS))
    assert losses_of(folder) == straight


def test_a_loss_that_is_no_number(tmp_path, trained_vae, straight, monkeypatch):
    """The step of a checkpoint between two log lines: weights that are no numbers must not replace good ones."""
    draw = torch.randn
    options = OPTIONS | {"log_every": 6}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *args, **kwargs: draw(*args, **kwargs) * poison(tmp_path))
        with pytest.raises(TrainingError, match="The loss became nan by step 4.*step-00000002, is intact"):
            train_diffusion(diffusion_config(tmp_path, trained_vae, **options))
    assert checkpoints_of(tmp_path) == ["step-00000002"]
    train_diffusion(diffusion_config(tmp_path, trained_vae, **OPTIONS))
    assert losses_of(tmp_path)[1:] == straight[3:]


def poison(folder):
    return float("nan") if (folder / "checkpoints" / "step-00000002").exists() else 1.0


def test_a_full_disk(tmp_path, trained_vae, straight):
    """A limit on the size of files: writing fails for real, in the middle of the checkpoint."""
    checkpoint, limits = TrainingRun.checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(run):
        if run.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        checkpoint(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "checkpoint", limited)
        try:
            with pytest.raises(
                TrainingError, match="checkpoint of step 4 could not be written.*step-00000002, is intact"
            ):
                train_diffusion(diffusion_config(tmp_path, trained_vae, **OPTIONS))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints_of(tmp_path) == ["step-00000002"]
    assert_goes_on(tmp_path, trained_vae, straight)


def test_a_disk_that_is_full_for_the_log(tmp_path, trained_vae, straight):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match="No space left on device. There is no checkpoint"):
        train_diffusion(diffusion_config(tmp_path, trained_vae, **OPTIONS))
    (tmp_path / "log.jsonl").unlink()
    assert_goes_on(tmp_path, trained_vae, straight)


def test_an_export_that_fails_keeps_the_model_before(tmp_path, trained_vae, monkeypatch):
    folder = train_diffusion(diffusion_config(tmp_path, trained_vae, **OPTIONS))
    weights = (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    publish = TrainingRun.publish

    def limited(run, name):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return publish(run, name)

    monkeypatch.setattr(TrainingRun, "publish", limited)
    try:
        with pytest.raises(TrainingError, match="could not be read or written.*step-00000008, is intact"):
            train_diffusion(diffusion_config(tmp_path, trained_vae, **OPTIONS | {"num_steps": 8}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    assert not list(tmp_path.glob(".*"))


def test_a_data_process_that_dies(tmp_path, trained_vae, straight, monkeypatch):
    draw = SceneClips.__getitem__

    def dying(clips, step):
        if step == 5:  # asked for once step 3 has begun
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(clips, step)

    with monkeypatch.context() as patch:
        patch.setattr(SceneClips, "__getitem__", dying)
        message = "A data process died after step [345].*step-0000000[24], is intact"
        with pytest.raises(TrainingError, match=message):
            train_diffusion(diffusion_config(tmp_path, trained_vae, num_workers=1, **OPTIONS))
    assert_goes_on(tmp_path, trained_vae, straight)


def test_a_data_process_that_dies_while_it_sends(tmp_path, trained_vae, monkeypatch):
    """Its pipe breaks first; PyTorch's signal of the same death comes while the run is being ended."""
    draw, close = SceneClips.__getitem__, tqdm.close
    signals = []

    def broken_off(clips, step):
        if step == 5:
            signals.append("DataLoader worker (pid 7) is killed by signal: Killed.")
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        return draw(clips, step)

    def interrupted(bar):
        if signals:
            raise RuntimeError(signals.pop())
        close(bar)

    monkeypatch.setattr(SceneClips, "__getitem__", broken_off)
    monkeypatch.setattr("ardiff.training.loop.tqdm.close", interrupted)
    with pytest.raises(TrainingError, match="A data process died after step 5.*step-00000004, is intact"):
        train_diffusion(diffusion_config(tmp_path, trained_vae, **OPTIONS))


def test_a_checkpoint_of_another_model_is_refused_and_kept(tmp_path, trained_vae):
    train_diffusion(diffusion_config(tmp_path, trained_vae, **OPTIONS))
    with pytest.raises(TrainingError, match="step-00000006 does not fit this model or is damaged"):
        train_diffusion(diffusion_config(tmp_path, trained_vae, width=64, **OPTIONS))
    damaged = tmp_path / "checkpoints" / "step-00000006" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(TrainingError, match="step-00000006 does not fit this model or is damaged"):
        train_diffusion(diffusion_config(tmp_path, trained_vae, **OPTIONS))


def test_the_command_ends_in_one_line(tmp_path, trained_vae, capsys):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    options = vars(diffusion_config(tmp_path, trained_vae))
    names = (
        "out",
        "vae",
        "image_size",
        "num_frames",
        "batch_size",
        "width",
        "depth",
        "num_heads",
        "num_steps",
        "log_every",
    )
    words = [word for name in names for word in (f"--{name.replace('_', '-')}", str(options[name]))]
    assert main(["train", "--device", "cpu", "--num-workers", "0", "--mixed-precision", "no", *words]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ardiff: ")]
    assert "No space left on device" in line
