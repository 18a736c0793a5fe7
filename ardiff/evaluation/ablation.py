"""The ablation: one small model trained at equal compute in every way that the paper compares, and measured alike.

One factor at a time is changed from a base (FoPP, causal, x0): the law of the training timesteps, attention to later
frames, and what is predicted. Every configuration is trained with several seeds; a seed fixes the initial weights, the
clips and the noise, so configurations are compared pair by pair. Training and real clips are encoded once for all runs.

Shapes: B clips, F frames, L tokens per frame, C latent channels, D features.
"""

import csv
import functools
import json
import math
import multiprocessing
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.utils.logging import disable_progress_bar
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ardiff.data.clips import FIRST_TRAINING_SEED, LATEST_START, step_generator
from ardiff.data.pixels import to_pixels
from ardiff.data.scenes import SCENES, render_batch
from ardiff.evaluation.features import clip_features, reconstruct
from ardiff.evaluation.frechet import frechet_distance
from ardiff.evaluation.prediction import (
    NUM_FRAMES,
    NUM_PROMPT_FRAMES,
    HeldOutClip,
    new_frames_psnr,
    render_excerpts,
    render_openings,
    run_pipeline,
)
from ardiff.evaluation.report import write_json
from ardiff.models.autoencoder_arvae import AutoencoderARVAE
from ardiff.models.transformer_ardiff import ARDiffTransformerModel
from ardiff.pipelines.pipeline_ardiff import ARDiffPipeline
from ardiff.schedulers.ad_schedule import ad_schedule, plan_counts, profile_gaps
from ardiff.schedulers.scheduling_ad import ADScheduler
from ardiff.training.diffusion import DiffusionTrainingConfig, draw_timesteps
from ardiff.training.loop import TrainingRun
from ardiff.training.losses import diffusion_loss, snr_weight


NUM_LONG_FRAMES = 64
NUM_BLOCKS = NUM_LONG_FRAMES // NUM_FRAMES
# At gap 0 more frames would be in flight than the window holds: synchronous blocks, each with as many frames behind it.
CHUNK = 8
TRAINING_CLIPS_PER_FILE = 32
LOSS_TIMESTEPS = (10, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 990)
MAX_SEEDS = 10
VERDICTS = ("better", "worse", "undecided")
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, 1 to 9 degrees of freedom


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to train: the law of the timesteps, attention to later frames or not, and what is predicted."""

    name: str
    law: str = "fopp"
    causal: bool = True
    prediction_type: str = "sample"


BASE = Configuration(name="fopp")
CONFIGURATIONS = (
    BASE,
    Configuration(name="independent", law="independent"),
    Configuration(name="synchronous", law="synchronous"),
    Configuration(name="incremental", law="incremental"),
    Configuration(name="not-causal", causal=False),
    Configuration(name="epsilon", prediction_type="epsilon"),
    Configuration(name="v", prediction_type="v_prediction"),
)
LABELS = {
    "fopp": "FoPP, causal, x0 (base)",
    "independent": "independent timesteps (Diffusion Forcing)",
    "synchronous": "synchronous timesteps",
    "incremental": "plain incremental timesteps",
    "not-causal": "attention not causal",
    "epsilon": "predicts the noise",
    "v": "predicts v",
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is trained and measured; all of it the same for every configuration.

    Attributes:
        scenes: names of SCENES, the classes.
        num_training_clips: of each scene, 64 frames long, encoded once; 16 frames of one are drawn at a time.
        width, depth, num_heads: of the transformer. batch_size, num_steps, learning_rate: of the training.
        num_inference_steps: N; the timestep gaps are 0, 5 and N.
        num_clips, num_long_clips, num_prompts: samples of 16 frames, of 64 frames and continuations, of each scene.
        num_real: clips of each scene that all samples are compared with.
        mixed_precision: "no" or "bf16", of training and sampling.
    """

    scenes: tuple[str, ...]
    num_training_clips: int
    width: int
    depth: int
    num_heads: int
    batch_size: int
    num_steps: int
    learning_rate: float
    num_inference_steps: int
    num_clips: int
    num_long_clips: int
    num_prompts: int
    num_real: int
    mixed_precision: str = "bf16"

    def __post_init__(self) -> None:
        if self.num_inference_steps < 6:  # else the gaps 5 and N are one
            raise ValueError(f"`num_inference_steps` must be at least 6 but is {self.num_inference_steps}.")
        if not 2 <= self.num_long_clips <= self.num_clips:
            raise ValueError(
                f"`num_long_clips` must be in [2, `num_clips` = {self.num_clips}] but is {self.num_long_clips}."
            )

    @property
    def gaps(self) -> tuple[int, int, int]:
        return 0, 5, self.num_inference_steps

    def long_plans(self) -> dict[str, int | tuple[int, ...]]:
        """`ar_step` of the videos of 64 frames, by name: gap 0 inside blocks that follow one another, then the gaps."""
        steps = self.num_inference_steps
        blocks = profile_gaps("chunks", gap=0, chunk=CHUNK, num_new_frames=NUM_LONG_FRAMES, num_inference_steps=steps)
        return {"0": blocks, "5": 5, str(steps): steps}


SIZES = {
    "quick": Size(
        scenes=("pendulum", "sunset"),
        num_training_clips=192,
        width=64,
        depth=4,
        num_heads=2,
        batch_size=6,
        num_steps=1200,
        learning_rate=5e-3,
        num_inference_steps=10,
        num_clips=16,
        num_long_clips=6,
        num_prompts=12,
        num_real=64,
    ),
    "full": Size(
        scenes=SCENES,
        num_training_clips=4096,
        width=256,
        depth=8,
        num_heads=4,
        batch_size=64,
        num_steps=20_000,
        learning_rate=1.5e-3,
        num_inference_steps=50,
        num_clips=128,
        num_long_clips=64,
        num_prompts=64,
        num_real=512,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Where one ablation stands and what it is; what a worker process needs."""

    out: Path
    vae: str
    size: Size
    device: str

    def load_vae(self) -> AutoencoderARVAE:
        vae = AutoencoderARVAE.from_pretrained(self.vae, dtype=torch.float32)
        return vae.eval().requires_grad_(False).to(self.device)

    @property
    def sampling_dtype(self) -> str:
        return "bfloat16" if self.size.mixed_precision == "bf16" else "float32"

    def run_folder(self, configuration: Configuration, seed: int) -> Path:
        return self.out / "runs" / f"{configuration.name}-seed{seed}"

    def clips(self, num_clips: int) -> list[HeldOutClip]:
        """The first so many held-out clips of every scene, scene after scene."""
        return [
            HeldOutClip(scene=scene, index=index, seed=0) for scene in self.size.scenes for index in range(num_clips)
        ]


Count = Callable[[int], object]  # hears of frame evaluations as they are done; one of training counts as three


# --- clips, encoded once ----------------------------------------------------------------------------------------


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


def first_of_every_scene(features: torch.Tensor, num_scenes: int, num_clips: int) -> torch.Tensor:
    """The first clips of every scene, of vectors (clips of all scenes, D)."""
    return features.unflatten(0, (num_scenes, -1))[:, :num_clips].flatten(0, 1)


# --- one run ----------------------------------------------------------------------------------------------------


def train_and_measure(job: Job, configuration: Configuration, seed: int, count: Count) -> None:
    """Train one configuration with one seed and measure it; `result.json` in its folder is written last."""
    folder, started, used = job.run_folder(configuration, seed), time.monotonic(), time.process_time()
    vae = job.load_vae()
    transformer = train(job, vae, configuration, seed, count)
    trained = time.monotonic()
    scheduler = ADScheduler(prediction_type=configuration.prediction_type)
    pipe = ARDiffPipeline(vae, transformer.eval(), scheduler)
    figures = measure(job, pipe, folder, count)
    figures |= {"train_seconds": trained - started, "measure_seconds": time.monotonic() - trained}
    figures["cpu_seconds"] = time.process_time() - used
    transformer.save_pretrained(folder / "transformer")
    write_json({**asdict(configuration), "seed": seed, **figures}, folder / "result.json")
    shutil.rmtree(folder / "checkpoints")


def train(
    job: Job, vae: AutoencoderARVAE, configuration: Configuration, seed: int, count: Count
) -> ARDiffTransformerModel:
    """The trained model with its averaged weights. A run that was stopped goes on at its last checkpoint."""
    size = job.size
    config = DiffusionTrainingConfig(
        out=str(job.run_folder(configuration, seed)),
        seed=seed,
        batch_size=size.batch_size,
        num_steps=size.num_steps,
        learning_rate=size.learning_rate,
        optimizer="muon",
        warmup_steps=max(size.num_steps // 20, 1),
        mixed_precision=size.mixed_precision,
        device=job.device,
        checkpoint_every=max(size.num_steps // 4, 1),
        log_every=max(size.num_steps // 50, 1),
        sample_every=size.num_steps,
        prediction_type=configuration.prediction_type,
        timesteps=configuration.law,
        synchronous_share=0.0,
        lagged_share=0.0,
    )
    torch.random.default_generator.manual_seed(seed)
    scheduler = ADScheduler(prediction_type=config.prediction_type)
    transformer = ARDiffTransformerModel(
        num_tokens=vae.num_tokens,
        in_channels=vae.config.latent_channels,
        width=size.width,
        depth=size.depth,
        num_heads=size.num_heads,
        window=NUM_FRAMES,
        class_names=list(size.scenes),
        causal=configuration.causal,
    )
    clips = TrainingTokens(job)
    run = TrainingRun(config, transformer.train())
    device = run.accelerator.device
    count(3 * NUM_FRAMES * size.batch_size * run.step)
    while run.step < size.num_steps:
        generator = step_generator(seed, run.step)
        clean, labels = clips.batch(generator)
        # The noise is drawn before the timesteps, whose laws take different numbers of draws: it is the same for all.
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = draw_timesteps(config, *clean.shape[:2], len(scheduler), generator).to(device)
        clean, noise = clean.to(device), noise.to(device)
        output = run.model(scheduler.add_noise(clean, noise, timesteps), timesteps, labels.to(device))
        target = scheduler.training_target(clean, noise, timesteps)
        weight = None
        if config.prediction_type == "sample":
            weight = snr_weight(scheduler.alphas_cumprod, timesteps, config.snr_cap)
        run.update(diffusion_loss(output, target, weight))
        count(3 * NUM_FRAMES * size.batch_size)
    model = run.averaged()
    run.close()
    return model


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


# --- all of it --------------------------------------------------------------------------------------------------


def ablate(
    out: str | os.PathLike,
    size: Size,
    *,
    vae: str | os.PathLike,
    num_seeds: int = 3,
    configurations: Sequence[Configuration] = CONFIGURATIONS,
    processes: int = 1,
    device: str = "cpu",
    command: str = "",
    progress: bool = True,
) -> dict:
    """Train and measure every configuration with every seed; returns what `results.json` holds.

    A run whose `result.json` exists is not done again, one that was stopped goes on. After every run `results.json`,
    `table.md` and the CSV files are written from the results that there are.

    Args:
        out: folder of the ablation; one of other settings is refused.
        vae: folder of the autoencoder, which stays as it is.
        num_seeds: in [2, 10]. processes: at once, each with one CPU thread or a GPU of its own in turn, >= 1.
        command: the command line, to be written beside the results.

    Raises:
        ValueError: an argument is out of its range, or the folder holds an ablation of other settings.
    """
    if not 2 <= num_seeds <= MAX_SEEDS:
        raise ValueError(f"`num_seeds` must be in [2, {MAX_SEEDS}] but is {num_seeds}.")
    if processes < 1:
        raise ValueError(f"`processes` must be at least 1 but is {processes}.")
    job = Job(out=Path(out), vae=str(vae), size=size, device=str(device))
    (job.out / "data").mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(asdict(size)))
    check_settings(job.out / "settings.json", settings)
    results_file = job.out / "results.json"
    before = json.loads(results_file.read_text(encoding="utf-8"))["seconds"] if results_file.exists() else 0.0
    started = time.monotonic()
    runs = [(configuration, seed) for seed in range(num_seeds) for configuration in configurations]
    with Workers(processes, device) as workers, tqdm(unit="frame", unit_scale=True, disable=not progress) as bar:
        bar.total = len(runs) * frame_evaluations(size, CONFIGURATIONS[0])
        todo = [
            (encode_training_clips, job, *part)
            for part in training_parts(size)
            if not training_file(job, *part).exists()
        ]
        todo += [
            (measure_real_clips, job, part)
            for part in ("real", "other_real", "openings")
            if not (job.out / "data" / f"{part}.safetensors").exists()
        ]
        bar.set_description("clips")
        for _ in workers(todo, bar, counted=False):
            pass
        missing = [run for run in runs if not (job.run_folder(*run) / "result.json").exists()]
        bar.total = sum(frame_evaluations(size, configuration) for configuration, _ in missing)
        bar.set_description(f"{len(runs) - len(missing)}/{len(runs)} runs")
        bar.reset(bar.total)
        for _ in workers([(train_and_measure, job, *run) for run in missing], bar, counted=True):
            seconds = before + time.monotonic() - started
            results = gather(job, runs, command=command, processes=processes, seconds=seconds)
            write_tables(results, job.out)
            bar.set_description(f"{len(results['runs'])}/{len(runs)} runs")
    seconds = before + time.monotonic() - started
    results = gather(job, runs, command=command, processes=processes, seconds=seconds)
    write_tables(results, job.out)
    return results


def check_settings(path: Path, settings: dict) -> None:
    """Write them, or refuse a folder that has others."""
    if not path.exists():
        write_json(settings, path)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    different = sorted(name for name in settings.keys() | found.keys() if settings.get(name) != found.get(name))
    if different:
        raise ValueError(f"`out` must be a new folder or one of the same size but {path} differs in {different}.")


def frame_evaluations(size: Size, configuration: Configuration) -> int:
    """Frames that the network evaluates in one run, one of training counted as three; the unit of the progress bar."""
    total = 3 * NUM_FRAMES * size.batch_size * size.num_steps
    plans = [(NUM_FRAMES, gap, 0, size.num_clips) for gap in size.gaps]
    plans += [(NUM_LONG_FRAMES, plan, 0, size.num_long_clips) for plan in size.long_plans().values()]
    plans += [(NUM_FRAMES, 5, NUM_PROMPT_FRAMES, size.num_prompts)]
    for num_frames, gap, num_prompt_frames, num_clips in plans:
        plan = ad_schedule(num_frames, size.num_inference_steps, gap, num_prompt_frames=num_prompt_frames)
        counts = plan_counts(plan, num_prompt_frames=num_prompt_frames)
        each = counts.frame_evaluations if configuration.causal else counts.iterations * NUM_FRAMES
        total += each * num_clips * len(size.scenes)
    return total


class Workers:
    """Runs tasks in this process, or several at once in others, and keeps the bar going; a context manager."""

    def __init__(self, processes: int, device: str) -> None:
        self.pool = None
        if processes > 1:
            context = multiprocessing.get_context("spawn")
            self.counter = context.Value("q", 0)
            arguments = self.counter, context.Value("i", 0), str(device)
            self.pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=arguments)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def __call__(self, tasks: Sequence[tuple], bar: tqdm, *, counted: bool) -> Iterator[None]:
        """Do all tasks, (function, job, arguments...); yields whenever one is done. `counted` ones are given a counter."""
        if self.pool is None:
            for function, *arguments in tasks:
                function(*arguments, *([bar.update] if counted else []))
                yield
            return
        pending = {self.pool.submit(_run, counted, *task) for task in tasks}
        while pending:
            done, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
            with self.counter.get_lock():
                new, self.counter.value = self.counter.value, 0
            bar.update(new)
            for future in done:
                future.result()
                yield


_counter = None  # shared by the worker processes


def _start(counter: object, numbers: object, device: str) -> None:
    global _counter
    disable_progress_bar()
    torch.set_num_threads(1)
    # The trainers' own bars would overwrite each other.
    tqdm.__init__ = functools.partialmethod(_init_silent, tqdm.__init__)
    _counter = counter
    if device == "cuda":
        with numbers.get_lock():
            torch.cuda.set_device(numbers.value % torch.cuda.device_count())
            numbers.value += 1


def _init_silent(bar: tqdm, init: Callable, *arguments: object, **options: object) -> None:
    init(bar, *arguments, **options | {"disable": True})


def _run(counted: bool, function: Callable, job: Job, *arguments: object) -> None:
    def count(frame_evaluations: int) -> None:
        with _counter.get_lock():
            _counter.value += frame_evaluations

    function(job, *arguments, *([count] if counted else []))


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write under another name, then rename: the file is never half there."""
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    os.replace(partial, path)


# --- results ----------------------------------------------------------------------------------------------------


def gather(
    job: Job, runs: Sequence[tuple[Configuration, int]], *, command: str, processes: int, seconds: float
) -> dict:
    """All results that there are, what they are compared with, and what they say."""
    size, data = job.size, job.out / "data"
    found = [job.run_folder(*run) / "result.json" for run in runs]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()]
    real, other = (load_file(data / f"{part}.safetensors")["features"] for part in ("real", "other_real"))
    openings = load_file(data / "openings.safetensors")
    long_floor = [
        frechet_distance(first_of_every_scene(others, len(size.scenes), size.num_long_clips), block)
        for others, block in zip(other, real, strict=True)
    ]
    report = {
        "command": command,
        "hardware": hardware(job.device, processes),
        "seconds": seconds,
        "size": asdict(size),
        "parameters": parameters(job, runs[0][0]),
        "seeds": sorted({seed for _, seed in runs}),
        "floor": frechet_distance(other[0], real[0]),
        "long_floor": long_floor,
        "ceiling_psnr_db": float(openings["ceiling"].mean()),
        "repeat_psnr_db": float(openings["repeat"].mean()),
        "runs": results,
    }
    report["table"] = {
        configuration.name: {
            column: interval(
                [column_value(result, column) for result in results if result["name"] == configuration.name]
            )
            for column in columns(size)
        }
        for configuration in dict.fromkeys(configuration for configuration, _ in runs)
        if any(result["name"] == configuration.name for result in results)
    }
    report["comparisons"] = compare(report)
    return report


def hardware(device: str, processes: int) -> str:
    """What the runs ran on, in words."""
    if torch.device(device).type == "cuda":
        return f"{processes} processes on {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{processes} processes of one thread each on {name}"


def parameters(job: Job, configuration: Configuration) -> int | None:
    """Of the transformer; None before the first run is done."""
    files = sorted(job.out.glob(f"runs/{configuration.name}-seed*/transformer/*.safetensors"))
    return sum(tensor.numel() for tensor in load_file(files[0]).values()) if files else None


def columns(size: Size) -> tuple[str, ...]:
    short, long = (
        (f"16 frames, gap {gap}" for gap in size.gaps),
        (f"64 frames, gap {name}" for name in size.long_plans()),
    )
    return (*short, *long, "continuation")


def column_value(result: dict, column: str) -> float:
    """A figure of one run; of a video of 64 frames the mean over its blocks."""
    if column == "continuation":
        return result["continuation_psnr_db"]
    frames, _, gap = column.partition(" frames, gap ")
    return result["samples"][gap] if frames == "16" else float(np.mean(result["long_samples"][gap]))


def interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean and half the width of its 95 % t interval over the seeds (None with one)."""
    mean, num_values = float(np.mean(values)), len(values)
    half = None
    if num_values > 1:
        half = T_QUANTILES[num_values - 2] * float(np.std(values, ddof=1)) / math.sqrt(num_values)
    return {"mean": mean, "half_width": half, "num_seeds": num_values}


def compare(report: dict) -> list[dict]:
    """Pairs of figures that answer the questions; a difference counts when its 95 % t interval leaves out zero.

    "training": the base against every other configuration, figure by figure. "sampling": long videos at gap 5 and N against
    synchronous blocks, for every model. "both": the base so against the model of synchronous timesteps in blocks.
    Differences are taken seed by seed. The intervals are not widened for the number of comparisons.
    """
    runs = {(result["name"], result["seed"]): result for result in report["runs"]}
    others = [name for name in report["table"] if name != BASE.name]
    every = next(iter(report["table"].values()), {})
    blocks, *gaps = (column for column in every if column.startswith("64"))
    pairs = [("training", (BASE.name, column), (name, column)) for name in others for column in every]
    pairs += [("sampling", (name, column), (name, blocks)) for column in gaps for name in report["table"]]
    pairs += [("both", (BASE.name, column), ("synchronous", blocks)) for column in gaps]
    found = []
    for question, first, second in pairs:
        seeds = [seed for seed in report["seeds"] if (first[0], seed) in runs and (second[0], seed) in runs]
        if len(seeds) < 2:
            continue
        differences = [
            column_value(runs[first[0], seed], first[1]) - column_value(runs[second[0], seed], second[1])
            for seed in seeds
        ]
        row = interval(differences)
        better = row["mean"] > 0 if first[1] == "continuation" else row["mean"] < 0
        verdict = "undecided"
        if abs(row["mean"]) > row["half_width"]:
            verdict = "better" if better else "worse"
        found.append({"question": question, "first": first, "second": second, **row, "first_is": verdict})
    return found


def write_tables(report: dict, out: Path) -> None:
    """`results.json`, `table.md`, and as CSV the table, the comparisons, every block of long videos and the losses."""
    write_json(report, out / "results.json")
    (out / "table.md").write_text(format_table(report), encoding="utf-8")
    every = list(next(iter(report["table"].values()), {}))
    rows = [
        [name, *(cell for column in every for cell in (row[column]["mean"], row[column]["half_width"]))]
        for name, row in report["table"].items()
    ]
    header = [cell for column in every for cell in (column, f"{column}, half width")]
    write_csv(out / "table.csv", ["configuration", *header], rows)
    write_csv(
        out / "comparisons.csv",
        ["first", "measure", "second", "its measure", "difference", "half width", "seeds", "first is"],
        [
            [*row["first"], *row["second"], row["mean"], row["half_width"], row["num_seeds"], row["first_is"]]
            for row in report["comparisons"]
        ],
    )
    write_csv(
        out / "drift.csv",
        ["configuration", "seed", "gap", *(f"frames {16 * k} to {16 * k + 15}" for k in range(NUM_BLOCKS))],
        [
            [result["name"], result["seed"], gap, *distances]
            for result in report["runs"]
            for gap, distances in result["long_samples"].items()
        ],
    )
    write_csv(
        out / "loss.csv",
        ["configuration", "seed", "timestep", "all frames noisy", "last frame noisy"],
        [
            [result["name"], result["seed"], *row]
            for result in report["runs"]
            for row in zip(*(result["loss"][name] for name in ("timesteps", "all_noisy", "last_noisy")), strict=True)
        ],
    )


def write_into(path: Path, text: str) -> None:
    """Put the results between the lines `<!-- ablation -->` and `<!-- /ablation -->` of a Markdown file.

    Raises:
        ValueError: the file does not have these lines, once each and in this order.
    """
    first, last = "<!-- ablation -->\n", "<!-- /ablation -->"
    before, *inner = path.read_text(encoding="utf-8").split(first)
    parts = inner[0].split(last) if len(inner) == 1 else []
    if len(parts) != 2:
        raise ValueError(
            f"`--readme` must have one line {first.strip()} and one line {last} after it, but {path} has not."
        )
    path.write_text(f"{before}{first}\n{text}\n{last}{parts[1]}", encoding="utf-8")


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def format_table(report: dict) -> str:
    """The results as Markdown: the table, what the base is compared with, and how it was made."""
    size, floor = report["size"], report["floor"]
    steps = size["num_inference_steps"]
    every = list(next(iter(report["table"].values()), {}))
    title = {
        "16 frames, gap 0": "16 frames: gap 0",
        "64 frames, gap 0": f"64 frames: blocks of {CHUNK}",
        "continuation": "continuation, dB",
    }
    names = [title.get(column, column.partition(", ")[2]) for column in every]
    lines = [f"| Training | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for name, row in report["table"].items():
        cells = [format_interval(row[column], 1 if column == "continuation" else 2) for column in every]
        lines.append(f"| {LABELS.get(name, name)} | {' | '.join(cells)} |")
    long_floor = f"{np.mean(report['long_floor']):.2f}"
    cells = [f"{floor:.2f}" if column.startswith("16") else long_floor for column in every[:-1]]
    lines.append(f"| real clips | {' | '.join([*cells, format(report['ceiling_psnr_db'], '.1f')])} |")
    minutes = report["seconds"] / 60
    made = (
        f"`{report['command']}`: {report['hardware']}, {minutes:.0f} minutes" if report["command"] else "made by hand"
    )
    text = (
        f"Frechet distance on autoencoder features (lower is better), for 64 frames the mean of blocks of 16; PSNR of "
        f"{NUM_PROMPT_FRAMES} frames continued to {NUM_FRAMES} at gap 5 (higher is better; repeating the last frame gives "
        f"{report['repeat_psnr_db']:.1f}). {len(report['seeds'])} seeds: mean ± half the 95 % t interval. Every run: "
        f"{size['num_steps']} steps of {size['batch_size']} clips of {', '.join(size['scenes'])}, width {size['width']}, depth "
        f"{size['depth']}, {steps} denoising steps, {size['num_clips'] * len(size['scenes'])} samples of 16 frames and "
        f"{size['num_long_clips'] * len(size['scenes'])} of 64. {made}. The comparisons below take differences seed by seed; "
        f"*undecided* means that the 95 % interval holds zero; they are not corrected for their number."
    )
    return "\n".join([*lines, "", text, "", *format_verdicts(report)]) + "\n"


def format_interval(row: dict, digits: int) -> str:
    if row["half_width"] is None:
        return f"{row['mean']:.{digits}f}"
    return f"{row['mean']:.{digits}f} ± {row['half_width']:.{digits}f}"


def format_verdicts(report: dict) -> list[str]:
    """The comparisons, a line for each pair, as a Markdown list."""
    lines: dict[str, dict[str, list[str]]] = {}
    for row in report["comparisons"]:
        (first, column), (second, _) = row["first"], row["second"]
        if row["question"] == "training":
            head, item = f"{LABELS[first]}, against: {LABELS[second]}", column
        elif row["question"] == "sampling":
            head, item = f"{column}, against blocks of {CHUNK}, same model", LABELS[first]
        else:
            head, item = f"{LABELS[first]} at {column}, against: {LABELS[second]} in blocks of {CHUNK}", "64 frames"
        text = f"{item} ({row['mean']:+.2f} ± {row['half_width']:.2f})"
        lines.setdefault(head, {}).setdefault(row["first_is"], []).append(text)
    return [
        f"- {head}. "
        + " ".join(f"**{verdict}**: {'; '.join(found[verdict])}." for verdict in VERDICTS if verdict in found)
        for head, found in lines.items()
    ]
