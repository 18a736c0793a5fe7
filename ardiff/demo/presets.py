"""What a visitor may ask for and is told: limits, gap presets, the request, a run's events, words and markup.

Lengths and prompt frames are counted in frames, gaps and steps in denoising steps, files in bytes and seconds. A prompt
is (P, S, S, 3) uint8, S = the model's image size. Data only: no model and no gradio here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Range:
    """An inclusive range of a control with the value it starts from."""

    low: float
    high: float
    default: float


@dataclass(frozen=True)
class Limits:
    """What the studio accepts. The timestep gap runs from 0 to the number of steps, so only its default is fixed."""

    length: Range = Range(4, 64, 16)
    steps: Range = Range(5, 100, 50)
    guidance: Range = Range(1.0, 6.0, 2.0)
    gap_default: int = 5
    seed_max: int = 2**32 - 1
    prompt_frames: Range = Range(1, 8, 4)
    upload_bytes: int = 50 * 1024 * 1024
    video_seconds: float = 60.0
    picture_pixels: int = 40_000_000
    waiting_visitors: int = 20


LIMITS = Limits()

FPS = 8
"""Frames per second of the written video, and of the player until the visitor chooses another speed."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".gif", ".m4v")


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

TEXT = MappingProxyType(
    {
        "title": "ardiff studio",
        "tagline": "A video in which every frame has its own noise level. Watch them clear up, one after another.",
        "scene": "Scene",
        "scene_info": "What the model should film.",
        "prompt": "Prompt frames",
        "prompt_info": "optional",
        "prompt_used": "Prompt frames used",
        "prompt_caption": "as the model sees them",
        "length": "Length",
        "gap": "Timestep gap",
        "more": "Steps and guidance",
        "steps": "Steps",
        "guidance": "Guidance",
        "guidance_info": "How strongly the scene is followed; 1 is off and halves the work.",
        "seed": "Seed",
        "keep": "Keep",
        "dice": "Roll",
        "generate": "Generate",
        "stop": "Stop and keep",
        "download": "Download MP4",
        "settings": "Settings JSON",
        "examples": "Start from an example",
    }
)


def _whole(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low:g} to {high:g}, got {value!r}.")


@dataclass(frozen=True, eq=False)
class Prompt:
    """Prompt frames as (P, S, S, 3) uint8, cropped to the model's size, and the name of where they came from."""

    frames: np.ndarray
    source: str


@dataclass(frozen=True)
class GenerationRequest:
    """What a visitor asks for. Raises ValueError with one sentence that can be shown as it is.

    `num_frames` counts the prompt frames; `ar_step` is the timestep gap, from 0 to `num_inference_steps`.
    """

    scene: str | None = None
    prompt: Prompt | None = None
    num_frames: int = int(LIMITS.length.default)
    ar_step: int = LIMITS.gap_default
    num_inference_steps: int = int(LIMITS.steps.default)
    guidance_scale: float = LIMITS.guidance.default
    seed: int = 0

    def __post_init__(self) -> None:
        def within(name: str, value: Any, allowed: Range) -> None:
            _whole(name, value, allowed.low, allowed.high)

        within("The length (`num_frames`)", self.num_frames, LIMITS.length)
        within("The number of steps (`num_inference_steps`)", self.num_inference_steps, LIMITS.steps)
        _whole("The timestep gap (`ar_step`)", self.ar_step, 0, self.num_inference_steps)
        _whole("The seed (`seed`)", self.seed, 0, LIMITS.seed_max)
        low, high = LIMITS.guidance.low, LIMITS.guidance.high
        if not isinstance(self.guidance_scale, int | float) or not low <= self.guidance_scale <= high:
            raise ValueError(
                f"The guidance (`guidance_scale`) must be a number from {low:g} to {high:g}, got {self.guidance_scale!r}."
            )
        if self.num_prompt_frames > LIMITS.prompt_frames.high:
            raise ValueError(
                f"There can be at most {LIMITS.prompt_frames.high:g} prompt frames, got {self.num_prompt_frames}."
            )
        if self.num_prompt_frames >= self.num_frames:
            raise ValueError(
                f"The length (`num_frames`) must be larger than the {self.num_prompt_frames} prompt frames, "
                f"got {self.num_frames}."
            )

    @property
    def num_prompt_frames(self) -> int:
        return 0 if self.prompt is None else len(self.prompt.frames)

    def settings(self) -> dict[str, Any]:
        """Everything that a second run needs to give the same frames, ready for JSON."""
        return {
            "scene": self.scene,
            "prompt": None if self.prompt is None else self.prompt.source,
            "num_prompt_frames": self.num_prompt_frames,
            "num_frames": self.num_frames,
            "ar_step": self.ar_step,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": float(self.guidance_scale),
            "seed": self.seed,
        }


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
    """The run is over. `video` is None only when it was stopped before a frame was finished."""

    run_id: str
    video: Path | None
    num_frames: int
    stopped: bool
    seconds: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """The run broke off. What had finished by then is in `video`."""

    run_id: str
    message: str
    video: Path | None
    num_frames: int


Event = Queued | FrameReady | Preview | Progress | Finished | Failed


PLAN_HTML = """
<div class="ar-plan">
  <div class="ar-ends"><span>0: all together</span><span class="ar-high"></span></div>
  <canvas role="img" aria-label="Planned noise map"></canvas>
  <p class="ar-sentence"></p>
</div>
"""

STAGE_HTML = """
<div class="ar-stage">
  <div class="ar-top">
    <div class="ar-player">
      <div class="ar-frame"><canvas class="ar-screen" role="img" aria-label="No frame yet"></canvas><span class="ar-badge"></span></div>
      <div class="ar-transport">
        <button type="button" class="ar-play" aria-label="Pause" data-playing="true"><svg viewBox="0 0 16 16" aria-hidden="true"><path class="ar-i-play" d="M4 2.5v11l9.5-5.5z"/><path class="ar-i-pause" d="M3.5 2.5h3v11h-3zM9.5 2.5h3v11h-3z"/></svg></button>
        <input type="range" class="ar-seek" min="0" max="0" value="0" aria-label="Frame">
        <span class="ar-count">0 / 0</span>
        <select class="ar-fps" aria-label="Frames per second"><option value="4">4 fps</option><option value="8" selected>8 fps</option><option value="12">12 fps</option><option value="24">24 fps</option></select>
      </div>
    </div>
    <div class="ar-run" data-phase="idle">
      <h2 class="ar-phase"></h2>
      <p class="ar-message"></p>
      <div class="ar-bar" role="progressbar" aria-label="Model calls done" aria-valuemin="0" aria-valuemax="100" aria-valuenow="0"><i></i></div>
      <dl class="ar-facts">
        <div><dt>Frames finished</dt><dd class="ar-f-frames"></dd></div>
        <div><dt>Model calls</dt><dd class="ar-f-calls"></dd></div>
        <div><dt>Time</dt><dd class="ar-f-time"></dd></div>
        <div><dt>In flight</dt><dd class="ar-f-flight"></dd></div>
        <div><dt>Mean noise</dt><dd class="ar-f-mean"></dd></div>
        <div><dt>Seed</dt><dd class="ar-f-seed"></dd></div>
      </dl>
      <p class="ar-meaning"></p>
      <p class="ar-spoken" role="status" aria-live="polite"></p>
    </div>
  </div>
  <div class="ar-film">
    <div class="ar-rule"><h3>Frames</h3><span>the model's guess, under as much grain as it has noise left</span></div>
    <div class="ar-scroll" tabindex="-1">
      <ol class="ar-strip" aria-label="Film strip"></ol>
      <canvas class="ar-map" role="img" aria-label="Noise map"></canvas>
    </div>
    <div class="ar-rule ar-legend"><span>Noise map: call 1 on top, <b class="ar-calls-end"></b> at the bottom, a column per frame</span><span class="ar-scale">noise <i></i> clean</span></div>
  </div>
</div>
"""
