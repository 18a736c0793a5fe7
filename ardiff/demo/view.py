"""From a run's events to what the page shows: pure functions and one small class, without gradio.

The page's picture of a run is one JSON value (`RunView.value`): noise levels in [0, 1], one entry per frame, and one
base64 picture per frame that is replaced only when that frame changed, because only changed entries are sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ardiff.demo.presets import (
    NO_SCENE,
    Event,
    Failed,
    Finished,
    FrameReady,
    GenerationRequest,
    Preview,
    Progress,
    Prompt,
    Queued,
    data_url,
    is_video,
    shown,
    span,
)
from ardiff.schedulers.ad_schedule import profile_gaps


LONGEST_LIST = 4096
"""Numbers in a list that the page or a script sends, at most: no plan has more gaps."""


def plain(error: ValueError) -> str:
    """An error's sentence for a person: the controls have names there, not the library's arguments."""
    return re.sub(r" \(`\w+`\)", "", str(error)).replace("`ar_step`", "The timestep gap").replace("`", "")


def idle_value(title: str, message: str, phase: str = "idle") -> dict[str, Any]:
    """What the stage shows when nothing runs: words alone, the frames are drawn from the controls."""
    return {"run": "", "phase": phase, "title": title, "message": message}


READY = idle_value("Ready", "Choose a scene, or give the first frames yourself, and press Generate.")


def gap_words(gap: int | Sequence[int]) -> str:
    """A row's name: `gap 5`, or how far the gaps of a drawn plan reach."""
    if isinstance(gap, int):
        return f"gap {gap}"
    return f"gaps {min(gap)} to {max(gap)}"


class RunView:
    """The page's picture of one run, kept up to date event by event.

    Args:
        request: what runs. facts: gives the model's figures that the browser estimates with; a run makes them better.
        row: the run's name when several are shown. keep_rows: earlier runs stay on the stage, above this one.
    """

    def __init__(
        self,
        request: GenerationRequest,
        facts: Callable[[], dict[str, Any]],
        *,
        row: str = "",
        keep_rows: bool = False,
    ) -> None:
        count = request.num_frames
        self.request, self.facts, self.row, self.keep_rows = request, facts, row, keep_rows
        self.run_id = ""
        self.phase, self.title, self.message, self.time = "queued", "Starting", "", ""
        self.iteration = self.finished = 0
        self.elapsed = 0.0
        self.first: float | None = None
        prompts = request.num_prompt_frames
        self.levels = [0.0] * prompts + [1.0] * (count - prompts)
        self.pics, self.rev = [""] * count, [0] * count
        self.result: Finished | Failed | None = None

    def absorb(self, event: Event) -> bool:
        """Take in one event. True when the page should be drawn: pictures wait for the progress that follows them."""
        self.run_id = event.run_id
        match event:
            case Queued(place=place):
                self.title = "Waiting" if place else "Starting"
                runs = "one run is" if place == 1 else f"{place} runs are"
                self.message = f"The model is busy: {runs} before yours." if place else "The model takes up your run."
            case FrameReady(index=index, frame=frame):
                self.finished = index + 1
                self._picture(index, data_url(frame, lossless=True))
                return False
            case Preview(frames=frames):
                for index, frame in frames:
                    self._picture(index, data_url(frame, lossless=False))
                return False
            case Progress():
                self._progress(event)
            case Finished() | Failed():
                self._conclude(event)
        return True

    def show_again(self, frames: Sequence[np.ndarray]) -> None:
        """Take in the finished frames of a run that is over."""
        self.phase, self.title, self.finished = "done", "Recovered", len(frames)
        self.message = f"{len(frames)} finished frames of an earlier run."
        for index, frame in enumerate(frames):
            self._picture(index, data_url(frame, lossless=True))
            self.levels[index] = 0.0

    def _picture(self, index: int, url: str) -> None:
        self.pics[index] = url
        self.rev[index] += 1

    def _progress(self, event: Progress) -> None:
        self.phase, self.iteration, self.levels = "running", event.iteration, list(event.noise_level)
        self.title, self.elapsed = "Clearing up", round(event.elapsed, 2)
        self.time = f"{span(event.time_left)} left"
        fresh = self.finished > self.request.num_prompt_frames
        if fresh and self.first is None:
            self.first = self.elapsed
        self.message = (
            "Finished frames already play. Stop keeps them." if fresh else "The first new frame is on its way."
        )

    def _conclude(self, event: Finished | Failed) -> None:
        self.result = event
        if isinstance(event, Failed):
            self.phase, self.title, self.message = "failed", "Something went wrong", event.message
            return
        self.phase, self.title, self.time = "done", "Done", span(event.seconds)
        self.elapsed = round(event.seconds, 2)
        self.message = f"{event.num_frames} frames in {span(event.seconds)}."
        if event.total_frames > event.num_frames:
            self.message += f" The video has {event.total_frames} by now."
        if event.stopped:
            frames = "one finished frame is" if event.num_frames == 1 else f"{event.num_frames} finished frames are"
            self.title = "Stopped"
            self.message = f"The {frames} kept." if event.video else "Stopped before a frame was finished."
            if event.limit is not None:
                self.message = f"A run may take {span(event.limit)} here. {self.message}"

    @property
    def value(self) -> dict[str, Any]:
        """The JSON that the browser draws from."""
        request = self.request
        gap = request.ar_step
        return {
            "run": self.run_id,
            "phase": self.phase,
            "title": self.title,
            "message": self.message,
            "time": self.time,
            "frames": request.num_frames,
            "steps": request.num_inference_steps,
            "gap": gap if isinstance(gap, int) else list(gap),
            "prompts": request.num_prompt_frames,
            "seed": request.seed,
            "row": self.row,
            "keep_rows": self.keep_rows,
            "iteration": self.iteration,
            "finished": self.finished,
            "elapsed": self.elapsed,
            "first": self.first,
            "levels": list(self.levels),
            "pics": list(self.pics),
            "rev": list(self.rev),
            "model": self.facts(),
        }


def make_request(controls: Mapping[str, Any], prompt: Prompt | None) -> GenerationRequest:
    """A request from the values of the controls by name. Raises ValueError with one sentence.

    `order` is the JSON list of the prompt frames that are used, in order; `drawn` that of the gaps of a drawn plan.
    """
    if prompt is not None:
        order = json_list("order", controls["order"])
        prompt = prompt.pick(order) if order else None
    num_frames, steps = whole(controls["length"]), whole(controls["steps"])
    num_prompts = 0 if prompt is None else len(prompt.frames)
    gap = whole(controls["gap"])
    if controls["profile"] == "drawn":
        gap = tuple(json_list("drawn", controls["drawn"]))
    elif controls["profile"] != "even" and isinstance(num_frames, int) and num_frames > num_prompts:
        gap = profile_gaps(
            controls["profile"],
            gap=gap,
            chunk=whole(controls["chunk"]),
            num_new_frames=num_frames - num_prompts,
            num_inference_steps=steps,
        )
    return GenerationRequest(
        model=controls["model"] or None,
        scene=None if controls["scene"] in (None, "", NO_SCENE) else controls["scene"],
        prompt=prompt,
        num_frames=num_frames,
        ar_step=gap,
        num_inference_steps=steps,
        guidance_scale=controls["guidance"],
        seed=whole(controls["seed"]),
    )


def whole(value: Any) -> Any:
    """Browsers send 16.0 for 16; anything that is not a whole number is left for the request to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def json_list(name: str, text: str) -> list[int]:
    """A list of whole numbers that the page's script wrote; "" is none."""
    try:
        values = json.loads(text or "[]")
    except (ValueError, TypeError, RecursionError):
        values = None
    if not isinstance(values, list) or not all(type(value) is int for value in values) or len(values) > LONGEST_LIST:
        raise ValueError(f"`{name}` must be a JSON list of whole numbers, got {shown(text)}.")
    return values


def query_controls(query: Mapping[str, str], scenes: Sequence[str]) -> dict[str, Any]:
    """Values of the controls from a link's query. Unknown keys are other people's (a host adds its own) and are left.

    Raises ValueError with one sentence for a value that cannot be read; ranges are checked when a run is asked for.
    """
    controls: dict[str, Any] = {}
    for name, kind in (("length", int), ("steps", int), ("seed", int), ("guidance", float)):
        if name in query:
            try:
                controls[name] = kind(query[name])
            except ValueError:
                raise ValueError(f"The link's {name} must be a number, got {query[name][:40]!r}.") from None
    if "scene" in query:
        if query["scene"] and query["scene"] not in scenes:
            raise ValueError(f"The link's scene must be one of {', '.join(scenes)}, got {query['scene'][:40]!r}.")
        controls["scene"] = query["scene"] or NO_SCENE
    if "gap" in query:
        gaps = json_list("gap", f"[{query['gap']}]")
        if not gaps:
            raise ValueError("The link's gap must be a number or numbers between commas, got none.")
        controls |= gap_controls(gaps[0] if len(gaps) == 1 else gaps)
    if "seed" in controls:
        controls["keep"] = True
    return controls


def gap_controls(gap: int | Sequence[int]) -> dict[str, Any]:
    """The values of the controls that make this gap, or these gaps."""
    if isinstance(gap, int):
        return {"profile": "even", "gap": gap, "drawn": ""}
    return {"profile": "drawn", "drawn": json.dumps(list(gap))}


def settings_controls(request: GenerationRequest) -> dict[str, Any]:
    """Values of all controls that ask for this request again (the prompt itself goes beside them)."""
    return {
        "model": request.model or "",
        "scene": request.scene or NO_SCENE,
        "order": json.dumps(list(range(request.num_prompt_frames))) if request.num_prompt_frames else "",
        "length": request.num_frames,
        "steps": request.num_inference_steps,
        "guidance": float(request.guidance_scale),
        "seed": request.seed,
        "keep": True,
        **gap_controls(request.ar_step if isinstance(request.ar_step, int) else list(request.ar_step)),
    }


def prompt_value(prompt: Prompt | None, seen: Sequence[np.ndarray] = (), words: Sequence[str] = ()) -> dict[str, Any]:
    """What the prompt strip draws: per frame what was given, its crop in [0, 1] and the picture as the model sees it.

    `seen`: the frames through the autoencoder. `words`: what the command line says for the prompt: of a video all of it,
    of pictures one name per frame.
    """
    frames = () if prompt is None else prompt.frames
    # Frames from a settings file are cropped already.
    views = (
        prompt.views if prompt is not None and prompt.views else [(frame, (0.0, 0.0, 1.0, 1.0)) for frame in frames]
    )
    tiles = [
        {
            "source": data_url(view, lossless=False),
            "crop": [round(edge, 4) for edge in crop],
            "seen": data_url(frame, lossless=True),
        }
        for (view, crop), frame in zip(views, seen, strict=True)
    ]
    return {"tiles": tiles, "order": list(range(len(frames))), "words": list(words), "message": "", "bad": False}


def prompt_words(files: Sequence[str], start: int, stride: int, count: int) -> list[str]:
    """The prompt on the command line: the options of a video, or the names of pictures."""
    names = [Path(path).name for path in files]
    if not files or not is_video(files[0]):
        return names
    trimmed = [("--prompt-start", start, 0), ("--prompt-stride", stride, 1), ("--prompt-frames", count, 4)]
    return [
        "--prompt",
        *names,
        *(word for name, value, usual in trimmed if value != usual for word in (name, str(value))),
    ]


def prompt_problem(error: ValueError) -> dict[str, Any]:
    """The prompt strip when what was given cannot be used."""
    return {**prompt_value(None), "message": plain(error), "bad": True}


NO_PROMPT = prompt_value(None)
