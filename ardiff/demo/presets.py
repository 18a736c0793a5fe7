"""What a visitor may ask for and is told: ranges of the controls, gap presets, the request, a run's events, words and markup.

Lengths and prompt frames are counted in frames, gaps and steps in denoising steps, files in bytes and seconds. A prompt
is (P, S, S, 3) uint8, S = the model's image size. Data only: no model and no gradio here.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from ardiff.data.video import MAX_PIXELS
from ardiff.serving.limits import Limits


@dataclass(frozen=True)
class Range:
    """An inclusive range of a control with the value it starts from."""

    low: float
    high: float
    default: float


@dataclass(frozen=True)
class Controls:
    """Ranges of the controls. The timestep gap runs from 0 to the number of steps, guidance and seed as they are below."""

    length: Range
    steps: Range
    prompt_frames: Range
    samples: Range


_BOUNDS = {field.name: (field.metadata["low"], field.metadata["high"]) for field in fields(Limits)}


def controls(limits: Limits) -> Controls:
    """What a visitor can choose under these limits; every control starts from its usual value, or the nearest allowed."""

    def up_to(name: str, most: int, usual: int) -> Range:
        return Range(_BOUNDS[name][0], most, min(usual, most))

    return Controls(
        length=up_to("frames", limits.frames, LENGTH),
        steps=up_to("steps", limits.steps, STEPS),
        prompt_frames=up_to("prompt_frames", limits.prompt_frames, PROMPT_FRAMES),
        samples=up_to("samples", min(limits.samples, MAX_ROWS), 1),
    )


LENGTH, STEPS, PROMPT_FRAMES, GAP = 16, 50, 4, 5
"""What the controls start from."""

GUIDANCE = Range(1.0, 6.0, 2.0)
SEED_MAX = 2**32 - 1

MAX_ROWS = 4
"""Runs that the stage shows beside each other, at most."""

FPS = 8
"""Frames per second of the written video, and of the player until the visitor chooses another speed."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".gif", ".m4v")


def is_video(path: str | Path) -> bool:
    """Whether a file counts as a video, by its name."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class GapPreset:
    """A named timestep gap. `gap` None means the number of steps, whatever it is."""

    name: str
    gap: int | None


GAP_PRESETS = (
    GapPreset("Together", 0),
    GapPreset("Balanced", 5),
    GapPreset("Staggered", 10),
    GapPreset("One by one", None),
)

NO_SCENE = "no scene"
OPENING_SCENE = "sunset"  # where the model knows it; the bundled one draws it best

TEXT = MappingProxyType(
    {
        "title": "ardiff studio",
        "tagline": "A video in which every frame has its own noise level. Watch them clear up, one after another.",
        "model": "Model",
        "scene": "Scene",
        "prompt": "Prompt frames",
        "prompt_info": "optional",
        "trim_start": "From frame",
        "trim_stride": "Every nth",
        "trim_count": "How many",
        "length": "Length",
        "gap": "Timestep gap",
        "profile": "Plan",
        "profile_even": "one gap for all",
        "profile_chunks": "chunk by chunk",
        "profile_ramp": "gaps that grow",
        "profile_drawn": "drawn on the map",
        "chunk": "Frames of a chunk",
        "more": "Steps and guidance",
        "samples": "Samples",
        "samples_info": "Runs with neighbouring seeds, as rows.",
        "steps": "Steps",
        "guidance": "Guidance",
        "guidance_info": "How strongly the scene is followed; 1 is off and halves the work.",
        "seed": "Seed",
        "keep": "Keep",
        "dice": "Roll",
        "generate": "Generate",
        "stop": "Stop and keep",
        "row": "Run again as a row",
        "continue": "Continue",
        "recover": "Show the last run of this browser again",
        "share": "Link and command",
        "examples": "Start from an example",
    }
)


def data_url(frame: np.ndarray, *, lossless: bool) -> str:
    """A (H, W, 3) uint8 frame as a data URL: PNG, or a small JPEG for passing guesses."""
    buffer, kind = io.BytesIO(), "png" if lossless else "jpeg"
    Image.fromarray(frame).save(buffer, kind, **({} if lossless else {"quality": 80}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def span(seconds: float) -> str:
    """A time for a person: `0.4 s`, `24 s`, `2.5 min`, `an hour`."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return "an hour" if seconds == 3600 else f"{seconds / 3600:.3g} hours"


def shown(value: Any) -> str:
    """A value in a sentence: what was sent may be a megabyte long."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_whole(name: str, value: Any, low: float, high: float) -> None:
    """Raise ValueError with one sentence unless `value` is a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {shown(value)}.")


@dataclass(frozen=True, eq=False)
class Prompt:
    """Prompt frames as (P, S, S, 3) uint8, cropped to the model's size, and the name of where they came from.

    `views` shows what was given, frame by frame: the whole picture, small, and the crop in it as left, top, right and
    bottom in [0, 1]. Empty when there is nothing else to show than the frames.
    """

    frames: np.ndarray
    source: str
    views: tuple[tuple[np.ndarray, tuple[float, float, float, float]], ...] = ()

    def pick(self, order: Sequence[int]) -> Prompt:
        """The frames with these 0-based numbers, in this order; each at most once, at least one."""
        count = len(self.frames)
        if not order or len(set(order)) < len(order) or not all(0 <= index < count for index in order):
            raise ValueError(
                f"The order of the prompt frames must name some of 0 to {count - 1} once, got {list(order)}."
            )
        views = tuple(self.views[index] for index in order) if self.views else ()
        return Prompt(self.frames[list(order)], self.source, views)


@dataclass(frozen=True)
class GenerationRequest:
    """What a visitor asks for. Raises ValueError with one sentence that can be shown as it is.

    `model` is a name of the menu, None the first. `num_frames` counts the prompt frames; `ar_step` is the timestep gap,
    from 0 to `num_inference_steps`, or one gap per new frame after the first. `continues` is the id of the run whose last
    finished frames are the prompt. What an operator allows of it is `check`ed apart.
    """

    model: str | None = None
    scene: str | None = None
    prompt: Prompt | None = None
    num_frames: int = LENGTH
    ar_step: int | tuple[int, ...] = GAP
    num_inference_steps: int = STEPS
    guidance_scale: float = GUIDANCE.default
    seed: int = 0
    continues: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("model", self.model), ("scene", self.scene)):
            if value is not None and not isinstance(value, str):
                raise ValueError(f"The {name} (`{name}`) must be a name or nothing, got {shown(value)}.")
        self._check_ranges(*(_BOUNDS[name] for name in ("frames", "steps", "prompt_frames")))
        self._check_gaps()
        check_whole("The seed (`seed`)", self.seed, 0, SEED_MAX)
        value = self.guidance_scale
        if isinstance(value, bool) or not isinstance(value, int | float) or not GUIDANCE.low <= value <= GUIDANCE.high:
            raise ValueError(
                f"The guidance (`guidance_scale`) must be a number from {GUIDANCE.low:g} to {GUIDANCE.high:g}, "
                f"got {shown(value)}."
            )
        if self.num_prompt_frames >= self.num_frames:
            raise ValueError(
                f"The length (`num_frames`) must be larger than the {self.num_prompt_frames} prompt frames, "
                f"got {self.num_frames}."
            )

    def check(self, limits: Limits) -> None:
        """Raise ValueError with one sentence for more than an operator allows."""
        allowed = controls(limits)
        ranges = allowed.length, allowed.steps, allowed.prompt_frames
        self._check_ranges(*((between.low, between.high) for between in ranges))

    def _check_ranges(
        self, frames: tuple[float, float], steps: tuple[float, float], prompts: tuple[float, float]
    ) -> None:
        check_whole("The length (`num_frames`)", self.num_frames, *frames)
        check_whole("The number of steps (`num_inference_steps`)", self.num_inference_steps, *steps)
        if self.num_prompt_frames > prompts[1]:
            raise ValueError(f"There can be at most {prompts[1]} prompt frames, got {self.num_prompt_frames}.")

    def _check_gaps(self) -> None:
        if isinstance(self.ar_step, list):
            object.__setattr__(self, "ar_step", tuple(self.ar_step))
        if not isinstance(self.ar_step, tuple):
            check_whole("The timestep gap (`ar_step`)", self.ar_step, 0, self.num_inference_steps)
            return
        count = max(self.num_frames - self.num_prompt_frames - 1, 0)
        if len(self.ar_step) != count:
            raise ValueError(
                f"The timestep gaps (`ar_step`) must be one for every new frame after the first, {count} here, "
                f"got {len(self.ar_step)}."
            )
        for gap in self.ar_step:
            check_whole("Every timestep gap (`ar_step`)", gap, 0, self.num_inference_steps)

    @property
    def num_prompt_frames(self) -> int:
        return 0 if self.prompt is None else len(self.prompt.frames)

    def settings(self) -> dict[str, Any]:
        """Everything that a second run needs to give the same frames, ready for JSON; prompt frames as lossless data URLs."""
        prompt = None
        if self.prompt is not None:
            frames = [data_url(frame, lossless=True) for frame in self.prompt.frames]
            prompt = {"source": self.prompt.source, "frames": frames}
        return {
            "model": self.model,
            "scene": self.scene,
            "prompt": prompt,
            "num_frames": self.num_frames,
            "ar_step": self.ar_step if isinstance(self.ar_step, int) else list(self.ar_step),
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": float(self.guidance_scale),
            "seed": self.seed,
        }


RESULT_KEYS = ("finished_frames", "seconds")
"""What a run adds to its settings: told, but not needed to run again."""

SETTINGS_BYTES = 8 * 1024 * 1024


def read_settings(text: str, max_pixels: int = MAX_PIXELS) -> GenerationRequest:
    """The request that a settings file asks for. Raises ValueError with one sentence for anything else.

    `max_pixels`: of all prompt frames together, checked before they are decoded.
    """
    if len(text) > SETTINGS_BYTES:
        raise ValueError(f"A settings file has at most {SETTINGS_BYTES // 2**20} MB, got {len(text) / 2**20:.0f} MB.")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError("This is not a settings file of the studio: it must hold one JSON object.")
    known = GenerationRequest().settings()
    strange = [name for name in settings if name not in known and name not in RESULT_KEYS]
    missing = [name for name in known if name not in settings]
    if strange or missing:
        words = f"has the unknown entry {shown(strange[0])}" if strange else f"lacks the entry {missing[0]!r}"
        raise ValueError(f"This is not a settings file of the studio: it {words}.")
    prompt = settings["prompt"]
    return GenerationRequest(
        **{name: settings[name] for name in known if name != "prompt"},
        prompt=None if prompt is None else _read_stored_prompt(prompt, max_pixels),
    )


def _read_stored_prompt(stored: Any, max_pixels: int) -> Prompt:
    try:
        frames = [
            Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1], validate=True)), formats=["PNG"])
            for url in stored["frames"]
        ]
        sizes = {frame.size for frame in frames}
        if len(sizes) != 1 or len(frames) * math.prod(frames[0].size) > max_pixels:
            raise ValueError
        source = str(stored["source"])
        return Prompt(np.stack([np.asarray(frame.convert("RGB")) for frame in frames]), source)
    # What Pillow raises for damaged files; ours are told like theirs.
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, OSError, SyntaxError) as error:
        raise ValueError("The prompt frames of this settings file cannot be read.") from error


@dataclass(frozen=True)
class Queued:
    """The run waits for the model; `place` runs come first (0: it starts now)."""

    run_id: str
    place: int


@dataclass(frozen=True, eq=False)
class FrameReady:
    """Frame `index` (0-based) is finished and will not change again."""

    run_id: str
    index: int
    frame: np.ndarray


@dataclass(frozen=True, eq=False)
class Preview:
    """The model's current guess of some unfinished frames: (frame index, picture) pairs."""

    run_id: str
    frames: tuple[tuple[int, np.ndarray], ...]


@dataclass(frozen=True)
class Progress:
    """Where the run stands after `iteration` of `num_iterations`: plan row, noise levels, seconds."""

    run_id: str
    iteration: int
    num_iterations: int
    step_index: tuple[int, ...]
    noise_level: tuple[float, ...]
    elapsed: float
    time_left: float


@dataclass(frozen=True)
class Finished:
    """The run is over. `video` is None only when it was stopped before a frame was finished.

    `num_frames` are finished; the video has `total_frames`: more when the run went on from an earlier one. `limit` are
    the seconds that a run may take, where that is what stopped it.
    """

    run_id: str
    video: Path | None
    num_frames: int
    total_frames: int
    stopped: bool
    seconds: float
    settings: dict[str, Any]
    limit: float | None = None


@dataclass(frozen=True)
class Failed:
    """The run broke off. What had finished by then is in `video`."""

    run_id: str
    message: str
    video: Path | None
    num_frames: int


@dataclass(frozen=True, eq=False)
class Recovered:
    """What is kept of a run: what was asked for and its finished frames, uint8 arrays (S, S, 3)."""

    run_id: str
    request: GenerationRequest
    frames: list[np.ndarray]


Event = Queued | FrameReady | Preview | Progress | Finished | Failed


def event_json(event: Event) -> dict[str, Any]:
    """An event as JSON: its kind and its fields, pictures as data URLs (finished frames lossless), paths as text."""
    told: dict[str, Any] = {"event": type(event).__name__}
    for name, value in vars(event).items():
        if isinstance(value, np.ndarray):
            value = data_url(value, lossless=True)
        elif isinstance(event, Preview) and name == "frames":
            value = [[index, data_url(picture, lossless=False)] for index, picture in value]
        elif isinstance(value, Path):
            value = str(value)
        told[name] = value
    return told
