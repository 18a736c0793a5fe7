"""Whether single pictures help when there is little video: few clips with many stills, against the clips alone.

    python examples/joint_training.py --work runs/joint

Renders the clips and the stills of the scenes to files, caches their tokens with the bundled autoencoder, trains one small
model per arm and seed, and measures them on held-out clips: the denoising error, and the Frechet distance of samples on
features of the autoencoder. Stills make a step longer, so a third arm has the clips alone with as many frames a step.
Prints a table with mean and spread over the seeds, and one JSON line last. What is done already is not done again.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from ardiff import ARDiffPipeline, AutoencoderARVAE, bundled_model
from ardiff.data.clips import FIRST_TRAINING_SEED
from ardiff.data.latents import cache_latents
from ardiff.data.pixels import to_pixels
from ardiff.data.scenes import SCENES, render_batch
from ardiff.evaluation.features import clip_features
from ardiff.evaluation.frechet import frechet_distance
from ardiff.training.diffusion import preset, train_diffusion
from ardiff.training.timesteps import sample_fopp, sample_synchronous


NUM_FRAMES, SIZE, BATCH = 16, 64, 32


def clips_of(count: int, first_seed: int) -> list[tuple[str, torch.Tensor]]:
    """Scene and frames, uint8 (F, S, S, 3), of clips with the seeds from `first_seed` on, every scene equally often."""
    names = [SCENES[index % len(SCENES)] for index in range(count)]
    clips = []
    for first in range(0, count, BATCH):
        part = names[first : first + BATCH]
        seeds = range(first_seed + first, first_seed + first + len(part))
        clips += torch.from_numpy(render_batch(part, NUM_FRAMES, SIZE, list(seeds)))
    return list(zip(names, clips, strict=True))


def write_sets(work: Path, num_clips: int, num_stills: int) -> None:
    """`clips/<scene>/<n>/<frame>.png` and `stills/<scene>/<n>.png`; a still is a random frame of a clip of its own."""
    for index, (scene, frames) in enumerate(clips_of(num_clips, FIRST_TRAINING_SEED)):
        folder = work / "clips" / scene / f"{index:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(frames):
            Image.fromarray(frame.numpy()).save(folder / f"{number:03d}.png")
    generator = torch.Generator().manual_seed(0)
    for index, (scene, frames) in enumerate(clips_of(num_stills, FIRST_TRAINING_SEED + num_clips)):
        folder = work / "stills" / scene
        folder.mkdir(parents=True, exist_ok=True)
        frame = frames[int(torch.randint(NUM_FRAMES, (), generator=generator))]
        Image.fromarray(frame.numpy()).save(folder / f"{index:05d}.png")


@torch.no_grad()
def held_out_error(pipe: ARDiffPipeline, clips: list[tuple[str, torch.Tensor]]) -> float:
    """Mean squared error of the predicted tokens, over timesteps of FoPP and equal ones; the same draws for every model."""
    generator, errors = torch.Generator().manual_seed(1), []
    for first in range(0, len(clips), BATCH):
        names, frames = zip(*clips[first : first + BATCH], strict=True)
        clean = pipe.vae.encode(to_pixels(torch.stack(frames))).mode()
        labels = torch.tensor([pipe.class_names.index(name) for name in names])
        for sampler in (sample_fopp, sample_synchronous):
            timesteps = sampler(*clean.shape[:2], 1000, generator=generator)
            noise = torch.randn(clean.shape, generator=generator)
            guess = pipe.transformer(pipe.scheduler.add_noise(clean, noise, timesteps), timesteps, labels)
            errors.append((guess - clean).square().mean().item())
    return statistics.fmean(errors)


@torch.no_grad()
def sample_distance(pipe: ARDiffPipeline, clips: list[tuple[str, torch.Tensor]], steps: int) -> float:
    """Frechet distance between as many samples as there are held-out clips, and these; gap 5, without guidance."""
    drawn = []
    for first in tqdm(range(0, len(clips), BATCH), desc="samples"):
        names, frames = zip(*clips[first : first + BATCH], strict=True)
        seeds = [torch.Generator().manual_seed(first + index) for index in range(len(names))]
        video = pipe(
            class_labels=list(names), num_frames=NUM_FRAMES, num_inference_steps=steps, ar_step=min(5, steps),
            guidance_scale=1.0, generator=seeds, output_type="np",
        ).frames  # fmt: skip
        drawn.append(clip_features(pipe.vae, (video * 255).round().astype("uint8")))
    real = torch.cat(
        [
            clip_features(pipe.vae, torch.stack([frames for _, frames in clips[first : first + BATCH]]).numpy())
            for first in range(0, len(clips), BATCH)
        ]
    )
    return frechet_distance(torch.cat(drawn), real)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for sets, caches and runs")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--stills", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=3, help="models per arm, at least 2")
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--batch-size", type=int, default=8, help="clips a step")
    parser.add_argument("--images-per-clip", type=int, default=NUM_FRAMES, help="stills beside every clip of a step")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--held-out", type=int, default=96, help="clips that are measured on")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--mixed-precision", default="bf16", choices=("no", "bf16"))
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds must be at least 2, for a spread")

    vae_folder = bundled_model() / "vae"
    vae = AutoencoderARVAE.from_pretrained(vae_folder, dtype=torch.float32).eval()
    if not (args.work / "tokens" / "stills" / "index.json").is_file():
        write_sets(args.work, args.clips, args.stills)
    cache_latents(f"videos:{args.work / 'clips'}", vae, args.work / "tokens" / "clips")
    cache_latents(f"images:{args.work / 'stills'}", vae, args.work / "tokens" / "stills")
    common = {
        "vae": str(vae_folder), "data": f"latents:{args.work / 'tokens' / 'clips'}", "num_steps": args.steps,
        "image_data": f"latents:{args.work / 'tokens' / 'stills'}", "width": args.width, "depth": args.depth,
        "num_workers": 0, "checkpoint_every": args.steps, "sample_every": args.steps, "mixed_precision": args.mixed_precision,
        "num_heads": args.width // 64 or 1,
        # As when the README's figures were taken; the preset has changed since.
        "synchronous_share": 0.1, "timestep_candidates": 1, "rescale_betas_zero_snr": False,
    }  # fmt: skip
    as_many = round(args.batch_size * (1 + args.images_per_clip / NUM_FRAMES))
    arms = {
        "clips": {"batch_size": args.batch_size},
        "clips and stills": {"batch_size": args.batch_size, "images_per_clip": args.images_per_clip},
        "clips, as many frames": {"batch_size": as_many},
    }
    held_out = clips_of(args.held_out, 0)
    results: dict[str, list[dict]] = {arm: [] for arm in arms}
    for seed in range(args.seeds):  # arms take turns: what is finished is a comparison
        for arm, options in arms.items():
            out = args.work / "runs" / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
            figures = out / "joint.json"
            if not figures.is_file():
                folder = train_diffusion(preset("scenes-64-cpu", out=str(out), seed=seed, **common, **options))
                pipe = ARDiffPipeline.from_pretrained(folder, dtype=torch.float32)
                pipe.set_progress_bar_config(disable=True)
                found = {
                    "held_out_mse": held_out_error(pipe, held_out),
                    "frechet_distance": sample_distance(pipe, held_out, args.sampling_steps),
                }
                figures.write_text(json.dumps(found))
            results[arm].append(json.loads(figures.read_text()))
            tqdm.write(f"{arm}, seed {seed}: {results[arm][-1]}")
    print(
        f"\n{args.clips} clips, {args.stills} stills, {args.steps} steps, {args.seeds} seeds: mean (lowest..highest)"
    )
    print(f"{'arm':24}{'held-out error':>28}{'Frechet distance':>28}")
    for arm, rows in results.items():
        cells = []
        for name in ("held_out_mse", "frechet_distance"):
            values = [row[name] for row in rows]
            cells.append(f"{statistics.fmean(values):.4f} ({min(values):.4f}..{max(values):.4f})")
        print(f"{arm:24}{cells[0]:>28}{cells[1]:>28}")
    print(json.dumps({"settings": vars(args) | {"work": str(args.work)}, "results": results}))


if __name__ == "__main__":
    main()
