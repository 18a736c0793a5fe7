"""Training and real clips, encoded and measured once for all runs."""

import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ardiff.data.clips import FIRST_TRAINING_SEED, LATEST_START
from ardiff.data.pixels import to_pixels
from ardiff.data.scenes import SCENES, render_batch
from ardiff.evaluation.ablation.settings import NUM_LONG_FRAMES, Job, Size
from ardiff.evaluation.features import clip_features, reconstruct
from ardiff.evaluation.prediction import (
    NUM_FRAMES,
    NUM_PROMPT_FRAMES,
    new_frames_psnr,
    render_excerpts,
    render_openings,
)
from ardiff.models.autoencoder_arvae import AutoencoderARVAE


TRAINING_CLIPS_PER_FILE = 32


@torch.no_grad()
def encode_training_clips(job: Job, scene: str, first: int) -> None:
    """Tokens of up to 32 clips, 64 frames each from the start of the scene on, to `data/<scene>-<first>.safetensors`."""
    vae, num_clips = job.load_vae(), min(TRAINING_CLIPS_PER_FILE, job.size.num_training_clips - first)
    tokens = []
    start = FIRST_TRAINING_SEED + SCENES.index(scene) * 2**32 + first
    for seed in range(start, start + num_clips):
        frames = render_batch([scene], LATEST_START + NUM_FRAMES, vae.config.image_size, [seed])
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=job.size.mixed_precision == "bf16"):
            encoded = vae.encode(to_pixels(torch.from_numpy(frames)).to(vae.device)).mode()
        tokens.append(encoded.half().cpu())
    write_tensors({"tokens": torch.cat(tokens)}, training_file(job, scene, first))


def training_file(job: Job, scene: str, first: int) -> Path:
    return job.out / "data" / f"{scene}-{first:06d}.safetensors"


def training_parts(size: Size) -> list[tuple[str, int]]:
    return [
        (scene, first) for scene in size.scenes for first in range(0, size.num_training_clips, TRAINING_CLIPS_PER_FILE)
    ]


class TrainingTokens:
    """All training clips in memory, (clips, 64, L, C); a batch is a function of (seed, step)."""

    def __init__(self, job: Job) -> None:
        parts = [load_file(training_file(job, *part))["tokens"] for part in training_parts(job.size)]
        self.tokens, self.job = torch.cat(parts), job

    def batch(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, 16, L, C) float32 of clips that start as in training on scenes, and their classes (B,)."""
        size = self.job.size.batch_size
        index = torch.randint(len(self.tokens), (size,), generator=generator)
        late = torch.rand(size, generator=generator) < 0.5
        start = torch.randint(LATEST_START + 1, (size,), generator=generator) * late
        clips = [self.tokens[i, s : s + NUM_FRAMES] for i, s in zip(index.tolist(), start.tolist(), strict=True)]
        return torch.stack(clips).float(), index // self.job.size.num_training_clips


@torch.no_grad()
def measure_real_clips(job: Job, part: str) -> None:
    """What all runs are compared with, to `data/<part>.safetensors`.

    "real": features (blocks, clips, D) of the four blocks of 16 frames of real videos of 64 frames. "other_real": the same
    of others, as many as there are samples: their distance is the floor. "openings": PSNR in dB of the continued frames of
    held-out clips after the autoencoder (the ceiling) and when the last prompt frame is repeated, and tokens for the loss.
    """
    vae, size = job.load_vae(), job.size
    if part == "openings":
        clips = job.clips(size.num_prompts)
        real = render_openings(clips, vae.config.image_size)
        repeated = np.repeat(real[:, NUM_PROMPT_FRAMES - 1 : NUM_PROMPT_FRAMES], NUM_FRAMES, axis=1)
        pixels = to_pixels(torch.from_numpy(real)).to(vae.device)
        tensors = {
            "ceiling": torch.tensor(new_frames_psnr(reconstruct(vae, real), real)),
            "repeat": torch.tensor(new_frames_psnr(repeated, real)),
            "tokens": torch.cat([vae.encode(clip).mode().cpu() for clip in pixels.split(16)]),
        }
    else:
        clips = job.clips(size.num_real if part == "real" else size.num_clips)
        features = []
        for first in range(0, len(clips), 16):
            frames = render_excerpts(clips[first : first + 16], part, vae.config.image_size, NUM_LONG_FRAMES)
            features.append(block_features(vae, frames))
        tensors = {"features": torch.cat(features, dim=1)}
    write_tensors(tensors, job.out / "data" / f"{part}.safetensors")


def block_features(vae: AutoencoderARVAE, frames: np.ndarray) -> torch.Tensor:
    """Features (blocks, B, D) of every 16 frames of clips (B, F, S, S, 3)."""
    blocks = np.split(frames, frames.shape[1] // NUM_FRAMES, axis=1)
    return torch.stack([torch.cat([clip_features(vae, clip[None]) for clip in block]) for block in blocks])


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write under another name, then rename: the file is never half there."""
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    os.replace(partial, path)
