"""The figures of one trained model: samples, long videos, continuations, and its loss at every timestep."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from ardiff.evaluation.ablation.clips import block_features
from ardiff.evaluation.ablation.settings import NUM_LONG_FRAMES, Count, Job
from ardiff.evaluation.frechet import frechet_distance
from ardiff.evaluation.prediction import (
    NUM_FRAMES,
    NUM_PROMPT_FRAMES,
    HeldOutClip,
    new_frames_psnr,
    render_openings,
    run_pipeline,
)
from ardiff.models.transformer_ardiff import ARDiffTransformerModel
from ardiff.pipelines.pipeline_ardiff import ARDiffPipeline
from ardiff.schedulers.scheduling_ad import ADScheduler


LOSS_TIMESTEPS = (10, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 990)


def measure(job: Job, pipe: ARDiffPipeline, folder: Path, count: Count) -> dict:
    """All figures of one trained model, and pictures of its first samples."""
    size, num_scenes = job.size, len(job.size.scenes)
    real = load_file(job.out / "data" / "real.safetensors")["features"]
    clips, long_clips = job.clips(size.num_clips), job.clips(size.num_long_clips)
    figures = {"samples": {}, "long_samples": {}}
    for gap in size.gaps:
        frames = generate(job, pipe, clips, NUM_FRAMES, gap, count)
        figures["samples"][str(gap)] = frechet_distance(block_features(pipe.vae, frames)[0], real[0])
        if gap == 5:
            save_strip(frames[:: size.num_clips], folder / "samples.png")
    for name, plan in size.long_plans().items():
        frames = generate(job, pipe, long_clips, NUM_LONG_FRAMES, plan, count)
        distances = [
            frechet_distance(features, others)
            for features, others in zip(block_features(pipe.vae, frames), real, strict=True)
        ]
        figures["long_samples"][name] = distances
        if name == "5":
            save_strip(frames[:: size.num_long_clips, 3::4], folder / "long_samples.png")
    prompts = job.clips(size.num_prompts)
    openings = render_openings(prompts, pipe.image_size)
    continued = generate(job, pipe, prompts, NUM_FRAMES, 5, count, openings[:, :NUM_PROMPT_FRAMES])
    figures["continuation_psnr_db"] = float(np.mean(new_frames_psnr(continued, openings)))
    tokens = load_file(job.out / "data" / "openings.safetensors")["tokens"].to(job.device)
    labels = torch.arange(num_scenes, device=job.device).repeat_interleave(size.num_prompts)
    with torch.autocast(pipe.device.type, torch.bfloat16, enabled=size.mixed_precision == "bf16"):
        figures["loss"] = loss_by_timestep(pipe.transformer, pipe.scheduler, tokens, labels)
    return figures


def generate(
    job: Job,
    pipe: ARDiffPipeline,
    clips: Sequence[HeldOutClip],
    num_frames: int,
    plan: int | tuple[int, ...],
    count: Count,
    prompt_frames: np.ndarray | None = None,
) -> np.ndarray:
    """One video per clip, of its scene and from its noise, the same for all runs: (B, F, S, S, 3) uint8."""
    frames, _ = run_pipeline(
        pipe,
        generators=[clip.generator("sample_noise" if prompt_frames is None else "prediction_noise") for clip in clips],
        class_labels=[clip.scene for clip in clips],
        num_frames=num_frames,
        gap=plan,
        num_inference_steps=job.size.num_inference_steps,
        guidance_scale=1.0,
        dtype=job.sampling_dtype,
        prompt_frames=prompt_frames,
        count=lambda frame_evaluations: count(frame_evaluations * len(clips)),
    )
    return frames


@torch.no_grad()
def loss_by_timestep(
    transformer: ARDiffTransformerModel,
    scheduler: ADScheduler,
    tokens: torch.Tensor,
    labels: torch.Tensor | None,
    timesteps: Sequence[int] = LOSS_TIMESTEPS,
) -> dict[str, list[float]]:
    """Mean squared error of the clean tokens that the model guesses, at every timestep, whatever it predicts.

    Args:
        tokens (torch.Tensor of shape (B, F, L, C)): clean, F within the window. labels (torch.Tensor of shape (B,)).

    Returns:
        `timesteps`; `all_noisy`: of all frames, all at that timestep (what gap 0 meets); `last_noisy`: of the last frame,
        behind clean ones (what the largest gap meets).
    """
    alpha_bar = scheduler.alphas_cumprod.to(tokens.device)
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0)).to(tokens.device)
    found = {"timesteps": list(timesteps), "all_noisy": [], "last_noisy": []}
    for timestep in timesteps:
        signal, sigma = alpha_bar[timestep].sqrt(), (1.0 - alpha_bar[timestep]).sqrt()
        for name, num_clean in (("all_noisy", 0), ("last_noisy", tokens.shape[1] - 1)):
            shown = torch.full(tokens.shape[:2], timestep, device=tokens.device)
            shown[:, :num_clean] = 0
            noisy = scheduler.add_noise(tokens, noise, shown)
            output = transformer(noisy.to(transformer.dtype), shown, labels).float()
            guess = output
            if scheduler.config.prediction_type == "epsilon":
                guess = (noisy - sigma * output) / signal
            elif scheduler.config.prediction_type == "v_prediction":
                guess = signal * noisy - sigma * output
            found[name].append(float((guess - tokens)[:, num_clean:].square().mean()))
    return found


def save_strip(frames: np.ndarray, path: Path) -> None:
    """Clips (B, F, S, S, 3) as rows of frames."""
    Image.fromarray(np.concatenate([np.concatenate(list(clip), axis=1) for clip in frames])).save(path)
