"""A step is the same however it is spread: over processes, or over parts whose gradients are accumulated."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import autoencoder_config, diffusion_config, log_of

from ardiff.training.autoencoder import train_autoencoder
from ardiff.training.diffusion import train_diffusion
from ardiff.training.loop import TrainingRun


CODE = """
import json, sys
from ardiff.training.autoencoder import AutoencoderTrainingConfig, train_autoencoder
from ardiff.training.diffusion import DiffusionTrainingConfig, train_diffusion

autoencoder, diffusion = json.loads(sys.argv[1])
train_autoencoder(AutoencoderTrainingConfig(**autoencoder))
train_diffusion(DiffusionTrainingConfig(**diffusion))
"""
SHARDED = """
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from ardiff.training.loop import TrainingRun

def pretend():
    AcceleratorState._reset_state()
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

pretend()
close = TrainingRun.close

def tell(run):
    if all(isinstance(parameter, DTensor) for parameter in run.parameters):
        print("sharded", flush=True)
    close(run)
    pretend()

TrainingRun.close = tell
"""
# On CPUs too it is --multi_gpu that starts several processes; with --cpu accelerate starts one, whatever their number.
LAUNCH = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --main_process_port 0".split()
ROOT = Path(__file__).resolve().parents[2]


def assert_same_curves(one, other, tolerance):
    one, other = log_of(one), log_of(other)
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for ours, theirs in zip(one, other, strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance)


def assert_same_weights(*folders):
    one, other = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in folders)
    assert set(one) == set(other)
    for name, value in one.items():
        assert torch.allclose(other[name], value, atol=2e-3), name


def test_two_processes_give_the_losses_of_one(tmp_path, trained_vae):
    script = tmp_path / "train.py"
    script.write_text(CODE)
    configs = {}
    for folder, parts in (("one", 2), ("two", 1)):
        autoencoder = autoencoder_config(
            tmp_path / folder / "autoencoder", accumulation_steps=parts, image_size=32, adversarial_weight=0.1,
            adversarial_start=1, num_steps=3,
        )  # fmt: skip
        diffusion = diffusion_config(
            tmp_path / folder / "diffusion", trained_vae, accumulation_steps=parts, optimizer="muon", images_per_clip=1,
            num_steps=3,
        )  # fmt: skip
        configs[folder] = autoencoder, diffusion
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, str(script)]
    arguments = json.dumps([vars(config) for config in configs["two"]])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, arguments], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    train_autoencoder(configs["one"][0])
    train_diffusion(configs["one"][1])
    for name, file in (("autoencoder", "vae"), ("diffusion", "pipeline/transformer")):
        assert_same_curves(tmp_path / "one" / name, tmp_path / "two" / name, tolerance=1e-4)
        assert_same_weights(*(tmp_path / folder / name / file for folder in ("one", "two")))


def test_parts_of_a_step_are_its_batch(tmp_path, trained_vae):
    """Four parts of one process are other clips than one part, and their mean gradient makes one step."""
    config = diffusion_config(tmp_path / "parts", trained_vae, accumulation_steps=4, num_steps=2)
    train_diffusion(config)
    train_diffusion(diffusion_config(tmp_path / "single", trained_vae, num_steps=2))
    parts, single = log_of(tmp_path / "parts"), log_of(tmp_path / "single")
    assert [line["step"] for line in parts] == [1, 2]
    assert parts[0]["loss"] != single[0]["loss"]
    assert parts[0]["loss_std"] > 0 == single[0]["loss_std"]


def test_resume_within_parts_of_a_step(tmp_path, trained_vae):
    options = {"accumulation_steps": 2, "num_steps": 6, "checkpoint_every": 3, "log_every": 4, "sample_every": 6}
    train_diffusion(diffusion_config(tmp_path / "straight", trained_vae, **options))
    checkpoint = TrainingRun.checkpoint

    def stop(run):
        checkpoint(run)
        if run.step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            train_diffusion(diffusion_config(tmp_path / "stopped", trained_vae, **options))
    train_diffusion(diffusion_config(tmp_path / "stopped", trained_vae, **options))
    logs = [log_of(tmp_path / folder) for folder in ("straight", "stopped")]
    for name in ("step", "loss", "mse", "grad_norm", "grad_norm_max", "mse_by_timestep"):
        assert [line[name] for line in logs[0]] == [line[name] for line in logs[1]], name


@pytest.mark.slow
def test_fsdp_gives_the_losses_of_one_process_and_resumes(tmp_path, trained_vae):
    """accelerate has FSDP for accelerators only; told that two gloo processes are one, it shards on CPUs as it does there."""
    script = tmp_path / "train.py"
    script.write_text(SHARDED + CODE)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }  # fmt: skip

    def configs(folder, parts, **changes):
        options = {"accumulation_steps": parts, "num_steps": 4, "gradient_checkpointing": True} | changes
        autoencoder = {"image_size": 32, "adversarial_weight": 0.1, "adversarial_start": 1}
        return (
            autoencoder_config(tmp_path / folder / "autoencoder", **autoencoder, **options),
            diffusion_config(tmp_path / folder / "diffusion", trained_vae, depth=2, images_per_clip=1, **options),
        )

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    arguments = json.dumps([vars(config) for config in configs("two", 1)])
    for _ in range(2):
        done = subprocess.run([*command, arguments], capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("sharded") == 2 * 2
        for name in ("autoencoder", "diffusion"):  # the second time from the middle
            shutil.rmtree(tmp_path / "two" / name / "checkpoints" / "step-00000004")
    one = configs("one", 2)
    train_autoencoder(one[0])
    train_diffusion(one[1])
    for name, file in (("autoencoder", "vae"), ("diffusion", "pipeline/transformer")):
        assert_same_curves(tmp_path / "one" / name, tmp_path / "two" / name, tolerance=1e-4)
        assert_same_weights(*(tmp_path / folder / name / file for folder in ("one", "two")))


def test_fsdp_without_gpus_is_refused_and_not_ignored(tmp_path, trained_vae, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP must have a GPU"):
        train_diffusion(diffusion_config(tmp_path, trained_vae))
