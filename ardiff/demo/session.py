"""Few models, many visitors: the studio without its page.

A `Session` owns one worker thread, and that thread alone runs the models; where the models run elsewhere (serving/remote.py)
it has one for each of them. `Session.run` gives a generator of events; closing it ends the run at the model's next iteration,
`Session.stop` does the same and keeps the finished frames as a video.
Frames are (S, S, 3) uint8, S = the model's image size; a prompt is (P, S, S, 3) uint8. Times are seconds.
"""

from __future__ import annotations

import json
import queue
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from ardiff.data.video import fit_frame, read_image, read_video, video_seconds, write_video
from ardiff.demo.models import Cost, LoadedModel, ModelMenu
from ardiff.demo.presets import (
    FPS,
    IMAGE_SUFFIXES,
    LIMITS,
    VIDEO_SUFFIXES,
    Event,
    Failed,
    Finished,
    FrameReady,
    GenerationRequest,
    Preview,
    Progress,
    Prompt,
    Queued,
    Recovered,
    is_video,
    read_settings,
)
from ardiff.schedulers.ad_schedule import ad_schedule, check_window
from ardiff.serving.remote import RemoteStep, ReplicaLost


TICK = 0.1
"""Shortest time between two progress events: a browser is sent at most ten pictures of the run a second."""

PREVIEW_SHARE = 0.15
"""Decoding guesses of unfinished frames may take at most this share of a run's time."""

KEEP_SECONDS = 3600.0
"""Age in seconds after which the files of a finished run are removed."""

STOP_SECONDS = 10.0
"""How long visitors have to be given what was finished when their runs are ended."""

KEEP_RUNS = 64
"""Finished runs whose files are kept, at most: the oldest go first."""

VIEW_SIDE = 160
"""Longest side in pixels of the picture that shows a prompt frame's crop."""

EXPORTS = {"mp4": "video.mp4", "gif": "video.gif", "webp": "video.webp", "zip": "frames.zip", "json": "settings.json"}
"""What a run can be kept as, and the file's name."""


@dataclass(eq=False)
class _Run:
    request: GenerationRequest
    folder: Path
    id: str
    stop: threading.Event = field(default_factory=threading.Event)
    events: queue.SimpleQueue[Event | None] = field(default_factory=queue.SimpleQueue)
    future: Future[float] | None = None


class PreviewPace:
    """Decides how many guesses may be decoded now so that decoding stays within its share of the run's time."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self.spent = 0.0
        self.last_shown: dict[int, int] = {}

    def choose(self, active: Sequence[int], elapsed: float) -> list[int]:
        """Neighbouring frames, from the one not seen for longest on: neighbours share most of what decoding them needs."""
        budget = PREVIEW_SHARE * elapsed - self.spent
        count = 1 if self.cost.preview is None else int(budget / self.cost.preview)
        oldest = min(range(len(active)), key=lambda at: self.last_shown.get(active[at], -1), default=0)
        return list(active[oldest : oldest + max(count, 0)])

    def paid(self, frames: Sequence[int], iteration: int, seconds: float) -> None:
        self.spent += seconds
        each = seconds / len(frames)
        self.cost.preview = each if self.cost.preview is None else 0.7 * self.cost.preview + 0.3 * each
        self.last_shown.update(dict.fromkeys(frames, iteration))

    def decode(self, step: Any, num_inference_steps: int, elapsed: float) -> tuple[tuple[int, np.ndarray], ...]:
        """Guesses of a step as (frame index, picture) pairs: as many as there is time for, `elapsed` seconds into the run."""
        active = [frame for frame, index in enumerate(step.step_index.tolist()) if 0 < index < num_inference_steps]
        chosen = self.choose(active, elapsed)
        if not chosen:
            return ()
        begun = time.monotonic()
        pictures = step.preview(chosen)
        self.paid(chosen, step.iteration, time.monotonic() - begun)
        return tuple(zip(chosen, pictures, strict=True))


class Session:
    """The studio's models and the visitors who share them, `workers` runs at a time, first come, first served.

    Args:
        sources: for every name of the menu a function that gives its `ARDiffPipeline`, already on its device. From then
            on only the session's worker thread runs it. The first one is loaded now, the others when they are asked for.
        workers: runs at the same time, each on a thread of its own; more than one only for pipelines whose model is elsewhere.
        warm_up: measure a model's speed once, in the background, so that the first estimate is honest.

    Raises:
        ValueError: there is no model, or the first one cannot be loaded.
    """

    def __init__(self, sources: Mapping[str, Callable[[], Any]], *, workers: int = 1, warm_up: bool = True) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ardiff-studio-"))
        self._num_workers = workers
        self._worker = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="ardiff-model")
        self._lock = threading.Lock()
        self._waiting: list[_Run] = []
        self._running: list[_Run] = []
        self._closing = False
        self._live: dict[str, _Run] = {}
        self._errands: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        measure = (lambda model: self._worker.submit(self._measure, model)) if warm_up else (lambda model: None)
        self.models = ModelMenu(sources, measure)
        self.models.get()

    @property
    def first(self) -> LoadedModel:
        """The model that a visitor starts with."""
        return self.models.get()

    # What a visitor does -----------------------------------------------------------------------------------------

    def run(self, request: GenerationRequest) -> Iterator[Event]:
        """Queue `request` and give its events: Queued, then FrameReady / Preview / Progress, then Finished or Failed.

        Raises ValueError at once, with one sentence, for a model that is not on the menu, a scene that it does not know,
        a gap that keeps more frames in flight than its window, and when too many visitors wait already.
        """
        model = self.models.get(request.model)
        request = replace(request, model=model.name)
        if request.scene is not None and request.scene not in model.scenes:
            raise ValueError(f"The scene (`scene`) must be one of {', '.join(model.scenes)}, got {request.scene!r}.")
        if request.num_frames < model.pipeline.min_frames:
            raise ValueError(
                f"The length (`num_frames`) must be at least {model.pipeline.min_frames} with this model, "
                f"got {request.num_frames}."
            )
        check_window(self._plan(request), model.window, num_prompt_frames=request.num_prompt_frames)
        earlier = None if request.continues is None else self._kept(request.continues)
        run_id = uuid.uuid4().hex
        run = _Run(request, self.folder / run_id, run_id)
        with self._lock:
            if self._closing:
                raise ValueError(
                    "The studio is about to restart and takes no new runs; please try again in a few minutes."
                )
            if len(self._waiting) >= LIMITS.waiting_visitors:
                raise ValueError(f"{len(self._waiting)} visitors are waiting already; please try again in a minute.")
            self._prepare(run, earlier)
            self._live[run.id] = run
            self._waiting.append(run)
            place = self._place(run)
            run.future = self._worker.submit(self._work, run)
        run.future.add_done_callback(lambda _: run.events.put(None))
        self.sweep()
        return self._events(run, place)

    def memory(self, model: LoadedModel) -> str:
        """Free memory of the model's device in words; of the machine where the device has none of its own."""
        if model.device.startswith("cuda"):
            free, total = torch.cuda.mem_get_info(model.device)
        else:
            free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
        return f"{free / 2**30:.1f} of {total / 2**30:.0f} GB free"

    def stop(self, run_id: str) -> bool:
        """End a run at its next iteration and keep its finished frames. False when there is no such run."""
        with self._lock:
            run = self._live.get(run_id)
        if run is None:
            return False
        run.stop.set()
        self._leave_queue(run)
        return True

    def continuation(self, run_id: str, request: GenerationRequest) -> GenerationRequest:
        """`request` as a continuation of a kept run: its last finished frames (eight at most) are the prompt.

        The length of `request` is the number of new frames. Raises ValueError with one sentence.
        """
        kept = self.recover(run_id)
        frames = kept.frames[-int(LIMITS.prompt_frames.high) :]
        if not frames:
            raise ValueError("There is no finished frame to go on from.")
        size = self.models.get(request.model).image_size
        if len(frames[0]) != size:
            raise ValueError(
                f"The frames of that run have {len(frames[0])} px and this model makes {size} px; choose the model "
                f"{kept.request.model} to go on from them."
            )
        length = min(request.num_frames + len(frames), int(LIMITS.length.high))
        prompt = Prompt(np.stack(frames), f"run {run_id[:8]}")
        return replace(request, prompt=prompt, num_frames=length, continues=run_id)

    def recover(self, run_id: str) -> Recovered:
        """What is kept of a run, live or over. Raises ValueError with one sentence when nothing is."""
        folder = self._kept(run_id)
        request = read_settings((folder / "settings.json").read_text(encoding="utf-8"))
        frames = [read_image(path) for path in sorted(folder.glob("frame-*.png"))]
        return Recovered(run_id, request, frames)

    def export(self, run_id: str, kind: str) -> Path:
        """A kept run's video as a file: `kind` is one of EXPORTS. Raises ValueError with one sentence."""
        if kind not in EXPORTS:
            raise ValueError(f"A run can be kept as {', '.join(EXPORTS)}, got {kind!r}.")
        folder = self._kept(run_id)
        path = folder / EXPORTS[kind]
        with self._lock:
            growing = run_id in self._live
        if not path.is_file() or (growing and kind != "json"):
            frames = [read_image(frame) for frame in _video_frames(folder)]
            if not frames:
                raise ValueError("There is no finished frame to keep.")
            write_video(frames, path, fps=FPS)
        return path

    def read_prompt(
        self,
        paths: Sequence[str | Path],
        *,
        model: str | None = None,
        start: int = 0,
        stride: int = 1,
        count: int = int(LIMITS.prompt_frames.high),
    ) -> Prompt | None:
        """Read uploaded pictures, or `count` frames of one video, every `stride`-th from frame `start` on.

        Raises ValueError with one sentence; None for no file.
        """
        size = self.models.get(model).image_size
        return read_prompt(paths, size, start=start, stride=stride, count=count) if paths else None

    def prompt_preview(self, prompt: Prompt, model: str | None = None) -> list[np.ndarray]:
        """The prompt frames as the model sees them: through its encoder and decoder and back."""
        pipeline = self.models.get(model).pipeline
        return self._on_worker(lambda: list(pipeline.reconstruct(prompt.frames)))

    def sweep(self, max_age: float = KEEP_SECONDS, max_runs: int = KEEP_RUNS) -> None:
        """Remove the files of runs that ended more than `max_age` seconds ago, and all but the `max_runs` latest."""
        with self._lock:
            live = set(self._live)
        over = []
        for folder in self.folder.iterdir():
            if folder.name not in live:
                with suppress(FileNotFoundError):  # another visitor's sweep was first
                    over.append((folder.stat().st_mtime, folder))
        over.sort(key=lambda entry: entry[0], reverse=True)
        for rank, (ended, folder) in enumerate(over):
            if rank >= max_runs or time.time() - ended > max_age:
                shutil.rmtree(folder, ignore_errors=True)

    def drain(self, seconds: float) -> bool:
        """Refuse new runs and wait until those that were taken are over. After `seconds` they end as by `stop`.

        Returns whether all came to their own end.
        """
        with self._lock:
            self._closing = True
        if self._over_within(seconds):
            return True
        with self._lock:
            runs = list(self._live.values())
        for run in runs:
            self.stop(run.id)
        self._over_within(STOP_SECONDS)
        return False

    def _over_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self._live and time.monotonic() < end:
            time.sleep(0.05)
        return not self._live

    def close(self) -> None:
        """End every run, wait for the model's current iteration and remove all files."""
        with self._lock:
            runs = list(self._live.values())
        for run in runs:
            run.stop.set()
        self._worker.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    # The visitor's side of a run ---------------------------------------------------------------------------------

    def _events(self, run: _Run, place: int) -> Iterator[Event]:
        try:
            yield Queued(run.id, place)
            while True:
                try:
                    event = run.events.get(timeout=1.0)
                except queue.Empty:
                    # A word each second, so that a visitor who left is noticed while still waiting.
                    with self._lock:
                        event = Queued(run.id, self._place(run)) if run in self._waiting else False
                    if not event:
                        continue
                if event is None:
                    break
                yield event
            yield self._conclude(run)
        finally:
            run.stop.set()
            self._leave_queue(run)
            with self._lock:
                self._live.pop(run.id, None)

    def _prepare(self, run: _Run, earlier: Path | None) -> None:
        """Make the run's folder, with the frames that its video has before its own: all of the run that it goes on from."""
        run.folder.mkdir()
        (run.folder / "settings.json").write_text(json.dumps(run.request.settings()), encoding="utf-8")
        for index, path in enumerate(_video_frames(earlier) if earlier else []):
            shutil.copy(path, run.folder / f"earlier-{index:05d}.png")

    def _conclude(self, run: _Run) -> Finished | Failed:
        error = None if run.future.cancelled() else run.future.exception()
        seconds = 0.0 if error or run.future.cancelled() else run.future.result()
        count, total = len(list(run.folder.glob("frame-*.png"))), len(_video_frames(run.folder))
        video = self.export(run.id, "mp4") if count else None
        if error is not None:
            return Failed(run.id, describe(error), video, count)
        settings = {**run.request.settings(), "finished_frames": count, "seconds": seconds}
        (run.folder / "settings.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        stopped = count < run.request.num_frames
        return Finished(run.id, video, count, total, stopped, seconds, settings)

    def _kept(self, run_id: str) -> Path:
        """The folder of a run of this server. Raises ValueError when there is none (any more)."""
        folder = self.folder / run_id
        if not re.fullmatch("[0-9a-f]{32}", run_id) or not folder.is_dir():
            raise ValueError("That run is not kept any more: finished frames stay for an hour.")
        return folder

    def _leave_queue(self, run: _Run) -> None:
        if run.future is not None and run.future.cancel():
            with self._lock:
                self._waiting.remove(run)
                self._tell_places()

    def _place(self, run: _Run) -> int:
        return max(self._waiting.index(run) + len(self._running) + 1 - self._num_workers, 0)

    def _tell_places(self) -> None:
        for run in self._waiting:
            run.events.put(Queued(run.id, self._place(run)))

    # The worker's side: everything below runs on the one thread that owns the model ------------------------------

    def _work(self, run: _Run) -> float:
        with self._lock:
            self._waiting.remove(run)
            self._running.append(run)
            self._tell_places()
        try:
            return self._generate(run)
        finally:
            with self._lock:
                self._running.remove(run)

    def _generate(self, run: _Run) -> float:
        # Asked for again: the model may have left memory while the run waited.
        request, model = run.request, self.models.get(run.request.model)
        pace, ahead = PreviewPace(model.cost), self._seconds_ahead(request, model)
        started, ticked = time.monotonic(), float("-inf")
        stream = model.pipeline.stream(**self.arguments(request))
        try:
            for step in stream:
                for index, frame in step.finished:
                    # Kept here, not where events are drawn: what had finished stays when the visitor is gone.
                    Image.fromarray(frame).save(run.folder / f"frame-{index:03d}.png")
                    run.events.put(FrameReady(run.id, index, frame))
                # A step from elsewhere that brings guesses was made on a tick there.
                due = step.iteration == step.num_iterations or (isinstance(step, RemoteStep) and step.guesses)
                if time.monotonic() - ticked >= TICK or due:
                    self._preview(run, step, pace, time.monotonic() - started)
                    ticked = time.monotonic()
                    indices, levels = tuple(step.step_index.tolist()), tuple(step.noise_level.tolist())
                    times = ticked - started, self._time_left(ahead, step.iteration, ticked - started)
                    run.events.put(Progress(run.id, step.iteration, step.num_iterations, indices, levels, *times))
                if run.stop.is_set():
                    break
                self._run_errands()
        finally:
            stream.close()
        seconds = time.monotonic() - started
        if not run.stop.is_set():
            model.cost.learn(float(ahead[0]), seconds - pace.spent)
        return seconds

    def _preview(self, run: _Run, step: Any, pace: PreviewPace, elapsed: float) -> None:
        if isinstance(step, RemoteStep):
            guesses = step.guesses  # what to decode was decided where the model is
        else:
            guesses = pace.decode(step, run.request.num_inference_steps, elapsed)
        if guesses:
            run.events.put(Preview(run.id, guesses))

    def arguments(self, request: GenerationRequest) -> dict[str, Any]:
        """The pipeline's arguments for a request: `pipe(**arguments)` gives the very frames of the run."""
        return {
            "prompt_frames": None if request.prompt is None else request.prompt.frames,
            "class_labels": None if request.scene is None else [request.scene],
            "num_frames": request.num_frames,
            "ar_step": request.ar_step,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "generator": torch.Generator("cpu").manual_seed(request.seed),
        }

    def _plan(self, request: GenerationRequest) -> torch.Tensor:
        return ad_schedule(
            request.num_frames,
            request.num_inference_steps,
            request.ar_step,
            num_prompt_frames=request.num_prompt_frames,
        )

    def _seconds_ahead(self, request: GenerationRequest, model: LoadedModel) -> np.ndarray:
        """(R + 1,) expected seconds from after each iteration to the end; entry 0 is the whole run."""
        guided = model.pipeline.is_guided(request.guidance_scale, request.scene is not None)
        rows = [model.cost.seconds(1, count, guided) for count in model.evaluations(self._plan(request).numpy())]
        return np.append(np.cumsum(rows[::-1])[::-1], 0.0)

    def _time_left(self, ahead: np.ndarray, iteration: int, elapsed: float) -> float:
        done = ahead[0] - ahead[iteration]
        # The first calls are slow (caches, allocations): trust the measured speed only after three of them.
        pace = elapsed / done if iteration >= 3 and done > 0 else 1.0
        return float(ahead[iteration] * pace)

    def _measure(self, model: LoadedModel) -> None:
        """Time a few calls at two lengths: their difference separates the price of a call from that of a frame."""
        if model.whole_window:
            # Calls are all alike, and dear: one tells everything.
            request = GenerationRequest(num_frames=model.window, guidance_scale=1.0)
            stream, begun = model.pipeline.stream(**self.arguments(request)), time.monotonic()
            next(stream)
            stream.close()
            model.cost.call, model.cost.frame = 0.0, (time.monotonic() - begun) / model.window
            return
        scene = next(iter(model.scenes), None)
        medians = []
        for num_frames in (4, 12):
            request = GenerationRequest(scene=scene, num_frames=num_frames, ar_step=0, num_inference_steps=5)
            marks = [time.monotonic() for _ in model.pipeline.stream(**self.arguments(request))]
            # The last call also decodes the video.
            medians.append(float(np.median(np.diff(marks[:-1]))))
        evaluations = 8 * (1 + (scene is not None))
        frame = max((medians[1] - medians[0]) / evaluations, medians[1] / (30 * evaluations))
        model.cost.frame, model.cost.call = frame, max(medians[0] - evaluations / 2 * frame, medians[0] / 10)

    def _on_worker(self, call: Callable[[], Any]) -> Any:
        """Run a short `call` on the model's thread: between two iterations when a run is under way."""
        future: Future[Any] = Future()
        self._errands.append((future, call))
        self._worker.submit(self._run_errands)
        return future.result()

    def _run_errands(self) -> None:
        while True:
            try:
                future, call = self._errands.popleft()
            except IndexError:  # none, or another worker has it
                return
            try:
                future.set_result(call())
            except (ValueError, RuntimeError) as error:
                future.set_exception(error)


def describe(error: BaseException) -> str:
    """One sentence for a visitor about what went wrong."""
    if isinstance(error, ValueError | ReplicaLost):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "The device ran out of memory; what had finished is kept. Choose a larger gap or a shorter length."
    return f"The run broke off ({type(error).__name__}: {error}); what had finished is kept."


def read_prompt(paths: Sequence[str | Path], size: int, *, start: int = 0, stride: int = 1, count: int = 8) -> Prompt:
    """Read pictures, or `count` frames of one video, into a `Prompt` of at most eight frames of `size` pixels.

    Raises ValueError with one sentence for anything else: no such kind of file, empty, too large, unreadable, too many.
    """
    paths = [Path(path) for path in paths]
    most = int(LIMITS.prompt_frames.high)
    for path in paths:
        _check_file(path)
    videos = [path for path in paths if is_video(path)]
    if videos and len(paths) > 1:
        raise ValueError(f"Give either pictures or one video as prompt, got a video among {len(paths)} files.")
    if len(paths) > most:
        raise ValueError(f"There can be at most {most} prompt frames, got {len(paths)} pictures.")
    if videos:
        if not 1 <= count <= most:
            raise ValueError(f"The frames taken from the video must be from 1 to {most}, got {count}.")
        _check_duration(videos[0])
        given = read_video(videos[0], max_frames=count, stride=stride, start=start)
    else:
        given = [read_image(path) for path in paths]
    frames = np.stack([fit_frame(picture, size) for picture in given])
    return Prompt(frames, ", ".join(path.name for path in paths), tuple(_view(picture) for picture in given))


def _view(picture: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """A small copy of a whole picture, and the centre square that becomes the frame, in [0, 1]."""
    image = Image.fromarray(picture)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2 / width, (height - side) / 2 / height
    image.thumbnail((VIEW_SIDE, VIEW_SIDE))
    return np.asarray(image), (left, top, 1 - left, 1 - top)


def _video_frames(folder: Path) -> list[Path]:
    """The frames of a run's video, in order: those of the runs it goes on from, then its own new ones."""
    earlier, own = sorted(folder.glob("earlier-*.png")), sorted(folder.glob("frame-*.png"))
    if not earlier:
        return own
    request = read_settings((folder / "settings.json").read_text(encoding="utf-8"))
    return earlier + own[request.num_prompt_frames :]


def _check_file(path: Path) -> None:
    if path.suffix.lower() not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
        raise ValueError(
            f"`{path.name}` is neither a picture (png, jpg, webp, bmp) nor a video (mp4, mov, webm, gif)."
        )
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"`{path.name}` is empty (0 bytes).")
    if size > LIMITS.upload_bytes:
        raise ValueError(
            f"`{path.name}` has {size / 2**20:.0f} MB; at most {LIMITS.upload_bytes // 2**20} MB are read."
        )


def _check_duration(path: Path) -> None:
    seconds = video_seconds(path)
    if seconds > LIMITS.video_seconds:
        raise ValueError(f"`{path.name}` lasts {seconds:.0f} s; at most {LIMITS.video_seconds:.0f} s are accepted.")
