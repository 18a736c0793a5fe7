"""Tiny runs that the tests of the trainers share."""

import json
from pathlib import Path

from ardiff.training.autoencoder import AutoencoderTrainingConfig
from ardiff.training.diffusion import DiffusionTrainingConfig


TINY = {
    "image_size": 16, "num_frames": 3, "seed": 5, "warmup_steps": 2, "device": "cpu", "num_workers": 0,
    "mixed_precision": "no", "log_every": 1,
}  # fmt: skip


def autoencoder_config(folder, **changes):
    options = TINY | {
        "out": str(folder), "batch_size": 8, "latent_channels": 4, "width": 24, "num_steps": 4, "checkpoint_every": 2,
        "sample_every": 4,
    } | changes  # fmt: skip
    return AutoencoderTrainingConfig(**options)


def diffusion_config(folder, vae, **changes):
    options = TINY | {
        "out": str(folder), "vae": str(vae), "batch_size": 2, "width": 32, "depth": 1, "num_heads": 2, "num_steps": 4,
        "checkpoint_every": 2, "sample_every": 4,
    } | changes  # fmt: skip
    return DiffusionTrainingConfig(**options)


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
