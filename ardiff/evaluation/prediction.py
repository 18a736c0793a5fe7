"""Held-out clips, and PSNR and SSIM on them: of the autoencoder, and of a clip that is continued from its first frames.

Shapes: B clips, F frames, P prompt frames, (S, S) pixels; frames are uint8 (B, F, S, S, 3).
Everything random is a function of (seed, scene, part, clip index), so no figure depends on how clips are batched.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ardiff.data.clips import LATEST_START
from ardiff.data.scenes import DETERMINISTIC, SCENES, render_batch
from ardiff.evaluation.features import reconstruct
from ardiff.pipelines.pipeline_ardiff import ARDiffPipeline
from ardiff.schedulers.ad_schedule import ad_schedule, plan_counts


NUM_FRAMES = 16
NUM_PROMPT_FRAMES = 4
DTYPES = ("float32", "bfloat16")
# Equal clips would have infinite PSNR. One grey level in one value of 12 frames of 64 x 64 pixels gives 99.8 dB.
MAX_PSNR = 100.0
PREDICTION_FIGURES = (
    "prediction_psnr_db", "ceiling_psnr_db", "repeat_psnr_db", "prediction_ssim", "ceiling_ssim", "repeat_ssim"
)  # fmt: skip
# Every (seed, scene, part) has a range of seeds of its own. All are below 2**32: what torch's CPU generator looks at, and
# far below the seeds of training (`FIRST_TRAINING_SEED`).
PARTS = ("clips", "real", "other_real", "real_start", "other_real_start", "prediction_noise", "sample_noise")
MAX_SEED = 2_000
MAX_CLIPS = 10_000


def check_fields(
    settings: object, ranges: Mapping[str, tuple[int, int]], choices: Mapping[str, Sequence[str]]
) -> None:
    """Refuse settings with a field outside its range, ends included, or with none of its choices.

    Raises:
        ValueError: one sentence naming the field, what is allowed and what came; also for a `bootstrap` of 1, as an
            interval needs two draws.
    """
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            raise ValueError(f"`{name}` must be in [{low}, {high}] but is {value}.")
    if settings.bootstrap == 1:
        raise ValueError("`bootstrap` must be 0 or at least 2 but is 1.")
    for name, allowed in choices.items():
        value = getattr(settings, name)
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(allowed)} but is {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured and how.

    Attributes:
        scenes: names of SCENES that the model has as classes.
        num_clips: per scene, in [2, 10_000]. seed: in [0, 2_000].
        gaps: `ar_step` of the samples from nothing. prediction_gaps: of the continuations.
        num_inference_steps, guidance_scale: as in `ARDiffPipeline.stream`.
        dtype: "float32", or "bfloat16": the pipeline runs under autocast.
        batch_size: clips at once, >= 1.
        bootstrap: drawn pairs of sets for an interval, >= 2; 0 = no intervals.
    """

    scenes: Sequence[str]
    num_clips: int
    seed: int
    gaps: Sequence[int]
    prediction_gaps: Sequence[int]
    num_inference_steps: int
    guidance_scale: float
    dtype: str
    batch_size: int
    bootstrap: int = 0

    def check(self, pipe: ARDiffPipeline) -> None:
        """Refuse what this model cannot do, before any work.

        Raises:
            ValueError: one sentence naming the argument, what is allowed and what came.
        """
        known = [scene for scene in SCENES if scene in pipe.class_names]
        unknown = [scene for scene in self.scenes if scene not in known]
        if unknown or not self.scenes:
            names = ", ".join(known) or "none"
            raise ValueError(f"`scenes` must name scenes that the model knows ({names}) but is {list(self.scenes)}.")
        ranges = {
            "num_clips": (2, MAX_CLIPS),
            "seed": (0, MAX_SEED),
            "batch_size": (1, MAX_CLIPS),
            "bootstrap": (0, 100_000),
        }
        check_fields(self, ranges, {"dtype": DTYPES})
        for name, gaps in (("scenes", self.scenes), ("gaps", self.gaps), ("prediction_gaps", self.prediction_gaps)):
            if not gaps or len(set(gaps)) < len(gaps):
                raise ValueError(f"`{name}` must hold at least one entry, each once, but is {list(gaps)}.")
        for gap in (*self.gaps, *self.prediction_gaps):
            pipe.check_inputs(None, None, NUM_FRAMES, gap, self.num_inference_steps, self.guidance_scale, None)

    def frame_evaluations(self) -> int:
        """Frames that the network evaluates in the whole evaluation, guidance halves not counted."""
        plans = [ad_schedule(NUM_FRAMES, self.num_inference_steps, gap) for gap in self.gaps]
        each = sum(plan_counts(plan, num_prompt_frames=0).frame_evaluations for plan in plans)
        for gap in self.prediction_gaps:
            plan = ad_schedule(NUM_FRAMES, self.num_inference_steps, gap, num_prompt_frames=NUM_PROMPT_FRAMES)
            each += plan_counts(plan, num_prompt_frames=NUM_PROMPT_FRAMES).frame_evaluations
        return each * len(self.scenes) * self.num_clips


@dataclass(frozen=True, kw_only=True)
class HeldOutClip:
    """Clip number `index` of a scene, in an evaluation with this seed."""

    scene: str
    index: int
    seed: int

    def part_seed(self, part: str) -> int:
        """A seed of its own for every part of the evaluation."""
        row = (self.seed * len(SCENES) + SCENES.index(self.scene)) * len(PARTS) + PARTS.index(part)
        return row * MAX_CLIPS + self.index

    def generator(self, part: str) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(self.part_seed(part))


# Called with a row's name, clips, their frames, and how many of these are prompt frames: how a caller gets to see them.
Show = Callable[[str, Sequence[HeldOutClip], np.ndarray, int], None]


def clip_batches(settings: Settings) -> Iterator[list[HeldOutClip]]:
    """All clips, scene after scene, at most `batch_size` at a time."""
    clips = [
        HeldOutClip(scene=scene, index=index, seed=settings.seed)
        for scene in settings.scenes
        for index in range(settings.num_clips)
    ]
    for first in range(0, len(clips), settings.batch_size):
        yield clips[first : first + settings.batch_size]


def render_openings(clips: Sequence[HeldOutClip], size: int) -> np.ndarray:
    """The first 16 frames of every clip's scene, (B, 16, size, size, 3)."""
    return render_batch([clip.scene for clip in clips], NUM_FRAMES, size, [clip.part_seed("clips") for clip in clips])


def render_excerpts(clips: Sequence[HeldOutClip], part: str, size: int, num_frames: int = NUM_FRAMES) -> np.ndarray:
    """Frames of every clip's scene that start as in training: half at frame 0, half up to `LATEST_START` frames later.

    Samples from nothing imitate this law, so these are the clips to compare them with. `part`: "real" or "other_real".
    """
    frames = np.empty((len(clips), num_frames, size, size, 3), dtype=np.uint8)
    starts = []
    for clip in clips:
        generator = clip.generator(f"{part}_start")
        late = bool(torch.rand((), generator=generator) < 0.5)
        starts.append(int(torch.randint(LATEST_START + 1, (), generator=generator)) * late)
    for latest in (0, LATEST_START):
        rows = [row for row, start in enumerate(starts) if (start > 0) == (latest > 0)]
        scenes, seeds = [clips[row].scene for row in rows], [clips[row].part_seed(part) for row in rows]
        rendered = render_batch(scenes, latest + num_frames, size, seeds)
        for row, clip_frames in zip(rows, rendered, strict=True):
            frames[row] = clip_frames[starts[row] : starts[row] + num_frames]
    return frames


def generate(
    pipe: ARDiffPipeline,
    clips: Sequence[HeldOutClip],
    settings: Settings,
    gap: int,
    bar: tqdm,
    prompt_frames: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """One video per clip, of the clip's scene: (B, 16, S, S, 3), and the frame evaluations that each of them took.

    With `prompt_frames` (B, P, S, S, 3) the videos go on from these, which are their first frames, as the model sees them.
    """
    part = "sample_noise" if prompt_frames is None else "prediction_noise"
    return run_pipeline(
        pipe,
        generators=[clip.generator(part) for clip in clips],
        class_labels=[clip.scene for clip in clips],
        num_frames=NUM_FRAMES,
        gap=gap,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        dtype=settings.dtype,
        prompt_frames=prompt_frames,
        count=lambda frame_evaluations: bar.update(frame_evaluations * len(clips)),
    )


def run_pipeline(
    pipe: ARDiffPipeline,
    *,
    generators: list[torch.Generator],
    class_labels: Sequence[str] | None,
    num_frames: int,
    gap: int,
    num_inference_steps: int,
    guidance_scale: float,
    dtype: str,
    prompt_frames: np.ndarray | None = None,
    count: Callable[[int], object] = lambda frame_evaluations: None,
) -> tuple[np.ndarray, int]:
    """One video per generator, (B, F, S, S, 3), and the frame evaluations of each; `count` hears of them as they are done.

    `dtype` "bfloat16" runs under autocast; the other arguments are those of `ARDiffPipeline.stream`.
    """
    autocast = contextlib.nullcontext()
    if dtype == "bfloat16":
        autocast = torch.autocast(pipe.device.type, torch.bfloat16)
    frames = np.empty((len(generators), num_frames, pipe.image_size, pipe.image_size, 3), dtype=np.uint8)
    num_evaluations = 0
    with autocast:
        for step in pipe.stream(
            prompt_frames=prompt_frames,
            class_labels=class_labels,
            num_frames=num_frames,
            ar_step=gap,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generators,
        ):
            for index, frame in step.finished:
                # A single video comes without the batch axis, and is put back by broadcasting.
                frames[:, index] = frame
            num_evaluations += step.frame_evaluations
            count(step.frame_evaluations)
    return frames, num_evaluations


def psnr(frames: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """PSNR of every clip in dB, (B,) float64, at most 100: from the mean squared error over the clip, pixels in [0, 1].

    Args:
        frames, reference (uint8 arrays of shape (B, F, H, W, 3)).

    Raises:
        ValueError: they are not uint8, or differ in shape.
    """
    _check_pair(frames, reference)
    error = (frames.astype(np.float32) - reference.astype(np.float32)) / 255.0
    squared = np.square(error).reshape(len(error), -1).mean(1, dtype=np.float64)
    return -10.0 * np.log10(np.maximum(squared, 10.0 ** (-MAX_PSNR / 10.0)))


def ssim(frames: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """SSIM of every clip, (B,) float64 in [-1, 1] (Wang et al., IEEE TIP 2004): the mean over frames, channels and pixels.

    Gaussian window of 11 x 11 pixels and standard deviation 1.5, only where it lies inside the frame; K1 = 0.01, K2 = 0.03.

    Args:
        frames, reference (uint8 arrays of shape (B, F, H, W, 3)): at least 11 x 11 pixels.

    Raises:
        ValueError: they are not uint8, differ in shape, or are too small.
    """
    _check_pair(frames, reference)
    if min(frames.shape[2:4]) < 11:
        raise ValueError(f"`frames` must have at least 11 x 11 pixels but have shape {frames.shape}.")
    window = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).view(1, 1, 11, 1)

    def blur(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(values, window), window.transpose(2, 3))

    figures = []
    for pair in zip(frames, reference, strict=True):
        x, y = (torch.from_numpy(clip).movedim(-1, 1).flatten(0, 1)[:, None].float() / 255.0 for clip in pair)
        mean_x, mean_y = blur(x), blur(y)
        variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        first = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        second = (2 * covariance + 0.03**2) / (variance_x + variance_y + 0.03**2)
        figures.append(float((first * second).double().mean()))
    return np.array(figures)


def _check_pair(frames: np.ndarray, reference: np.ndarray) -> None:
    if frames.dtype != np.uint8 or reference.dtype != np.uint8:
        raise ValueError(f"`frames` and `reference` must be uint8 but are {frames.dtype} and {reference.dtype}.")
    if frames.shape != reference.shape:
        raise ValueError(f"`reference` must have the shape of `frames`, {frames.shape}, but has {reference.shape}.")


def measure_autoencoder(pipe: ARDiffPipeline, settings: Settings, show: Show) -> dict:
    """PSNR of reconstructed clips: per scene (the mean over its clips), the mean over scenes, and the lowest scene."""
    figures = {scene: [] for scene in settings.scenes}
    for clips in clip_batches(settings):
        real = render_openings(clips, pipe.image_size)
        reconstruction = reconstruct(pipe.vae, real)
        show("real", clips, real, 0)
        show("reconstruction", clips, reconstruction, 0)
        for clip, value in zip(clips, psnr(reconstruction, real).tolist(), strict=True):
            figures[clip.scene].append(value)
    scenes = {scene: float(np.mean(values)) for scene, values in figures.items()}
    lowest = min(scenes, key=scenes.get)
    return {
        "mean_psnr_db": float(np.mean(list(scenes.values()))),
        "lowest_psnr_db": scenes[lowest],
        "lowest_scene": lowest,
        "scenes": {scene: {"psnr_db": value} for scene, value in scenes.items()},
    }


def measure_prediction(pipe: ARDiffPipeline, settings: Settings, gap: int, bar: tqdm, show: Show) -> dict:
    """PSNR and SSIM of the 12 new frames when clips are continued from their first 4, given their class.

    Beside them, on the same 12 frames: the autoencoder's own (the ceiling), and those of repeating the last prompt frame's
    true pixels. Per scene, and averaged over the deterministic ones.
    """
    figures = {scene: [] for scene in settings.scenes}
    for clips in clip_batches(settings):
        real = render_openings(clips, pipe.image_size)
        prompt = real[:, :NUM_PROMPT_FRAMES]
        prediction, _ = generate(pipe, clips, settings, gap, bar, prompt)
        show(f"prediction, gap {gap}", clips, prediction, NUM_PROMPT_FRAMES)
        repeated = np.repeat(prompt[:, -1:], NUM_FRAMES, axis=1)
        videos = prediction, reconstruct(pipe.vae, real), repeated
        rows = [figure(video, real) for figure in (new_frames_psnr, new_frames_ssim) for video in videos]
        for clip, values in zip(clips, zip(*rows, strict=True), strict=True):
            figures[clip.scene].append(values)
    scenes = {}
    for scene, values in figures.items():
        means = dict(zip(PREDICTION_FIGURES, np.mean(values, axis=0).tolist(), strict=True))
        means["below_ceiling_db"] = means["ceiling_psnr_db"] - means["prediction_psnr_db"]
        means["above_repeat_db"] = means["prediction_psnr_db"] - means["repeat_psnr_db"]
        scenes[scene] = means
    averaged = [values for scene, values in scenes.items() if scene in DETERMINISTIC]
    mean = {name: float(np.mean([values[name] for values in averaged])) for name in averaged[0]} if averaged else {}
    return {"mean_of_deterministic_scenes": mean, "scenes": scenes}


def new_frames_psnr(frames: np.ndarray, reference: np.ndarray) -> list[float]:
    """PSNR of every clip in dB over the frames after the prompt; frames and reference (B, F, S, S, 3)."""
    return psnr(frames[:, NUM_PROMPT_FRAMES:], reference[:, NUM_PROMPT_FRAMES:]).tolist()


def new_frames_ssim(frames: np.ndarray, reference: np.ndarray) -> list[float]:
    """SSIM of every clip over the frames after the prompt; frames and reference (B, F, S, S, 3)."""
    return ssim(frames[:, NUM_PROMPT_FRAMES:], reference[:, NUM_PROMPT_FRAMES:]).tolist()
