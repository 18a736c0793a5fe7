"""Few models, many visitors: the studio without its page.

A `Session` owns one worker thread, and that thread alone runs the models; where the models run elsewhere (serving/remote.py)
it has one for each of them. `Session.run` gives a generator of events; closing it ends the run at the model's next iteration,
`Session.stop` does the same and keeps the finished frames as a video.
Frames are (S, S, 3) uint8, S = the model's image size; a prompt is (P, S, S, 3) uint8. Times are seconds.
"""

from __future__ import annotations

import contextvars
import logging
import math
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from ardiff.demo.decoder import Decoder
from ardiff.demo.models import LoadedModel, ModelMenu
from ardiff.demo.presets import (
    Event,
    Failed,
    Finished,
    FrameReady,
    GenerationRequest,
    Preview,
    Progress,
    Prompt,
    Queued,
)
from ardiff.demo.storage import RunStore, video_frames
from ardiff.schedulers.ad_schedule import ad_schedule, check_window
from ardiff.serving.limits import PRESETS, Limits
from ardiff.serving.metrics import Metrics
from ardiff.serving.remote import RemoteStep, ReplicaLost
from ardiff.serving.zero import GpuError, on_zero_gpu, with_gpu


log = logging.getLogger(__name__)


TICK = 0.1
"""Shortest time between two progress events: a browser is sent at most ten pictures of the run a second."""

PREVIEW_SHARE = 0.15
"""Decoding guesses of unfinished frames may take at most this share of a run's time."""

STOP_SECONDS = 10.0
"""How long visitors have to be given what was finished when their runs are ended."""

GPU_SECONDS = 5
"""Seconds of ZeroGPU beyond a run's own: to start its process, and for a single picture."""


@dataclass(eq=False)
class _Run:
    request: GenerationRequest
    id: str
    visitor: str
    stop: threading.Event = field(default_factory=threading.Event)
    events: queue.SimpleQueue[Event | None] = field(default_factory=queue.SimpleQueue)
    future: Future[float] | None = None
    limit: float | None = None  # the seconds that were up, where that is why it stopped


@dataclass(frozen=True, eq=False)
class Call:
    """What a run gave up to the end of one call of the network: plain data in main memory, which other processes can send.

    `finished` and `previews` are (frame index, picture) pairs; `due`: the visitor should hear of it; `decoding`: seconds
    that the previews took; `preview`: seconds that one takes, as far as is known.
    """

    iteration: int
    num_iterations: int
    step_index: tuple[int, ...]
    noise_level: tuple[float, ...]
    finished: tuple[tuple[int, np.ndarray], ...]
    previews: tuple[tuple[int, np.ndarray], ...]
    due: bool
    decoding: float
    preview: float | None


class PreviewPace:
    """Decides how many guesses may be decoded now so that decoding stays within its share of the run's time.

    `each`: seconds that decoding a frame takes, None as long as nobody knows.
    """

    def __init__(self, each: float | None) -> None:
        self.each = each
        self.spent = 0.0
        self.last_shown: dict[int, int] = {}

    def choose(self, active: Sequence[int], elapsed: float) -> list[int]:
        """Neighbouring frames, from the one not seen for longest on: neighbours share most of what decoding them needs."""
        budget = PREVIEW_SHARE * elapsed - self.spent
        count = 1 if self.each is None else int(budget / self.each)
        oldest = min(range(len(active)), key=lambda at: self.last_shown.get(active[at], -1), default=0)
        return list(active[oldest : oldest + max(count, 0)])

    def paid(self, frames: Sequence[int], iteration: int, seconds: float) -> None:
        self.spent += seconds
        each = seconds / len(frames)
        self.each = each if self.each is None else 0.7 * self.each + 0.3 * each
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
        limits: what the operator lets visitors do.
        warm_up: measure a model's speed once, in the background, so that the first estimate is honest.

    `store` keeps the runs and what visitors sent until the session is closed. `metrics` counts what happens.

    Raises:
        ValueError: there is no model, or the first one cannot be loaded.
    """

    def __init__(
        self,
        sources: Mapping[str, Callable[[], Any]],
        *,
        limits: Limits = PRESETS["space"],
        workers: int = 1,
        warm_up: bool = True,
    ) -> None:
        self.limits = limits
        self.metrics = Metrics(lambda: len(self._waiting))
        self.decoder = Decoder(limits)
        self.store = RunStore(limits)
        self._num_workers = workers
        self._worker = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="ardiff-model")
        self._lock = threading.Lock()
        self._waiting: list[_Run] = []
        self._running: list[_Run] = []
        self._draining = False
        self._live: dict[str, _Run] = {}
        self._errands: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        # On ZeroGPU the device is there for visitors' runs alone; the first of them tell how fast it is.
        warm_up = warm_up and not on_zero_gpu()
        measure = (lambda model: self._worker.submit(self._measure, model)) if warm_up else (lambda model: None)
        self.models = ModelMenu(sources, measure)
        self._gpu_calls = with_gpu(self._calls, self._gpu_seconds, describe)
        self._gpu_reconstruct = with_gpu(self._reconstruct, lambda model, frames: GPU_SECONDS, describe)
        self.models.get()
        self._closing = threading.Event()
        threading.Thread(target=self._sweep_at_times, name="ardiff-sweep", daemon=True).start()

    @property
    def first(self) -> LoadedModel:
        """The model that a visitor starts with."""
        return self.models.get()

    # What a visitor does -----------------------------------------------------------------------------------------

    def run(self, request: GenerationRequest, visitor: str = "") -> Iterator[Event]:
        """Queue `request` and give its events: Queued, then FrameReady / Preview / Progress, then Finished or Failed.

        `visitor` tells visitors apart, for the limit of runs that each may have at the same time; "" is not counted. It is
        forgotten with the run.
        Raises ValueError at once, with one sentence, for more than the operator allows, a model that is not on the menu,
        a scene that it does not know, a gap that keeps more frames in flight than its window, and when too many wait.
        """
        try:
            return self._enter(request, visitor)
        except ValueError:
            self.metrics.run_refused()
            raise

    def _enter(self, request: GenerationRequest, visitor: str) -> Iterator[Event]:
        request.check(self.limits)
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
        self._check_memory(request, model)
        run = _Run(request, uuid.uuid4().hex, visitor)
        # What belongs to the visitor's call (on ZeroGPU, whose share of the GPU is used) goes along to the worker.
        context = contextvars.copy_context()
        with self._lock:
            if self._draining:
                raise ValueError(
                    "The studio is about to restart and takes no new runs; please try again in a few minutes."
                )
            if len(self._waiting) >= self.limits.queue:
                raise ValueError(f"{len(self._waiting)} visitors are waiting already; please try again in a minute.")
            own = sum(other.visitor == visitor for other in self._live.values())
            if visitor and own >= self.limits.runs_per_visitor:
                raise ValueError(
                    f"Each visitor can have {self.limits.runs_per_visitor} runs at the same time; "
                    "please wait until one has ended."
                )
            self.store.begin(run.id, request)
            self._live[run.id] = run
            self._waiting.append(run)
            place = self._place(run)
            run.future = self._worker.submit(context.run, self._work, run)
        run.future.add_done_callback(lambda _: run.events.put(None))
        self.store.sweep()
        return self._events(run, place)

    def memory(self, model: LoadedModel) -> str:
        """Free memory of the model's device in words; of the machine where the device has none of its own."""
        if on_zero_gpu():
            return "ZeroGPU"
        free, total = self.free_memory(model)
        return f"{free / 2**30:.1f} of {total / 2**30:.0f} GB free"

    def free_memory(self, model: LoadedModel) -> tuple[int, int]:
        """Bytes that are free on the model's device, and all it has."""
        if model.device.startswith("cuda"):
            free, total = torch.cuda.mem_get_info(model.device)
            # What torch holds without using it is free for a run too.
            held = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
            return free + held, total
        machine = psutil.virtual_memory()
        return machine.available, machine.total

    def _check_memory(self, request: GenerationRequest, model: LoadedModel) -> None:
        if on_zero_gpu():  # the device that the run gets is not there yet
            return
        plan, guided = self._plan(request).numpy(), self._is_guided(request, model)
        needed, free = model.run_memory(plan, request.num_prompt_frames, guided), self.free_memory(model)[0]
        if needed > free:
            raise ValueError(
                f"The run would take about {needed / 2**30:.1f} GB of memory and {free / 2**30:.1f} GB are free; choose a "
                "larger gap or a shorter length, or no guidance."
            )

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
        """`request` as a continuation of a kept run: its last finished frames, as many as may be a prompt, are the prompt.

        The length of `request` is the number of new frames. Raises ValueError with one sentence.
        """
        kept = self.store.recover(run_id)
        frames = kept.frames[-self.limits.prompt_frames :]
        if not frames:
            raise ValueError("There is no finished frame to go on from.")
        size = self.models.get(request.model).image_size
        if len(frames[0]) != size:
            raise ValueError(
                f"The frames of that run have {len(frames[0])} px and this model makes {size} px; choose the model "
                f"{kept.request.model} to go on from them."
            )
        length = min(request.num_frames + len(frames), self.limits.frames)
        prompt = Prompt(np.stack(frames), f"run {run_id[:8]}")
        return replace(request, prompt=prompt, num_frames=length, continues=run_id)

    def read_prompt(
        self,
        paths: Sequence[str | Path],
        *,
        model: str | None = None,
        start: int = 0,
        stride: int = 1,
        count: int | None = None,
    ) -> Prompt | None:
        """Read uploaded pictures, or `count` frames of one video, every `stride`-th from frame `start` on.

        None for no file; a `count` of None is as many as may be a prompt. Raises ValueError with one sentence.
        """
        size = self.models.get(model).image_size
        count = self.limits.prompt_frames if count is None else count
        return self.decoder.prompt(paths, size, start=start, stride=stride, count=count) if paths else None

    def read_settings(self, path: str | Path) -> GenerationRequest:
        """The request of an uploaded settings file. Raises ValueError with one sentence."""
        return self.decoder.settings(path)

    def prompt_preview(self, prompt: Prompt, model: str | None = None) -> list[np.ndarray]:
        """The prompt frames as the model sees them: through its encoder and decoder and back."""
        name = self.models.get(model).name
        return self._on_worker(lambda: self._gpu_reconstruct(name, prompt.frames))

    def _sweep_at_times(self) -> None:
        while not self._closing.wait(min(self.limits.keep_seconds / 2, 600.0)):
            self.store.sweep()

    def drain(self, seconds: float) -> bool:
        """Refuse new runs and wait until those that were taken are over. After `seconds` they end as by `stop`.

        Returns whether all came to their own end.
        """
        with self._lock:
            self._draining = True
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
        self._closing.set()
        with self._lock:
            runs = list(self._live.values())
        for run in runs:
            run.stop.set()
        self._worker.shutdown(wait=True, cancel_futures=True)
        self.decoder.close()
        self.store.close()

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
            self.store.end(run.id)

    def _conclude(self, run: _Run) -> Finished | Failed:
        error = None if run.future.cancelled() else run.future.exception()
        seconds = 0.0 if error or run.future.cancelled() else run.future.result()
        folder = self.store.find(run.id)
        count, total = len(list(folder.glob("frame-*.png"))), len(video_frames(folder))
        settings, video = {**run.request.settings(), "finished_frames": count, "seconds": seconds}, None
        try:
            video = self.store.export(run.id, "mp4") if count else None
            if error is None:
                self.store.add_settings(run.id, settings)
        except (OSError, RuntimeError) as not_written:  # of two errors the first one is the cause
            error = error or not_written
        if error is not None:
            return Failed(run.id, describe(error), video, count)
        stopped = count < run.request.num_frames
        return Finished(run.id, video, count, total, stopped, seconds, settings, run.limit if stopped else None)

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
        self.metrics.run_started()
        begun, outcome = time.monotonic(), "failed"
        try:
            seconds = self._generate(run)
            outcome = "stopped" if run.stop.is_set() else "finished"
            return seconds
        except Exception:
            log.warning("a run broke off", exc_info=True, extra={"run": run.id, "model": run.request.model})
            raise
        finally:
            taken = time.monotonic() - begun
            self.metrics.run_ended(outcome, taken)
            told = {"run": run.id, "outcome": outcome, "seconds": round(taken, 3), "model": run.request.model}
            told |= {"frames": run.request.num_frames, "steps": run.request.num_inference_steps}
            log.info("a run ended", extra={"event": "run_ended", **told})
            with self._lock:
                self._running.remove(run)

    def _generate(self, run: _Run) -> float:
        # Asked for again: the model may have left memory while the run waited.
        request, model = run.request, self.models.get(run.request.model)
        ahead = self._seconds_ahead(request, model)
        started = marked = time.monotonic()
        decoding = 0.0
        calls = self._gpu_calls(model.name, request, model.cost.preview)
        try:
            for call in calls:
                now = time.monotonic()
                self.metrics.model_called(max(now - marked - call.decoding, 0.0))
                decoding, model.cost.preview = decoding + call.decoding, call.preview
                for index, frame in call.finished:
                    # Kept here, not where events are drawn: what had finished stays when the visitor is gone.
                    self.store.add_frame(run.id, index, frame)
                    run.events.put(FrameReady(run.id, index, frame))
                if call.previews:
                    run.events.put(Preview(run.id, call.previews))
                if call.due:
                    times = now - started, self._time_left(ahead, call.iteration, now - started)
                    told = call.iteration, call.num_iterations, call.step_index, call.noise_level
                    run.events.put(Progress(run.id, *told, *times))
                if now - started > self.limits.run_seconds and call.iteration < call.num_iterations:
                    run.limit = self.limits.run_seconds
                    run.stop.set()
                if run.stop.is_set():
                    break
                self._run_errands()
                marked = time.monotonic()
        finally:
            calls.close()
        seconds = time.monotonic() - started
        if not run.stop.is_set():
            model.cost.learn(float(ahead[0]), seconds - decoding)
        return seconds

    def _calls(self, model: str, request: GenerationRequest, preview: float | None) -> Iterator[Call]:
        """All that needs the model's device, from plain arguments to plain data. Yields after every call of the network, so
        that closing it frees the device at once. `preview`: seconds that decoding a guess takes, None when not known.
        """
        pace, started, ticked = PreviewPace(preview), time.monotonic(), float("-inf")
        stream = self.models.get(model).pipeline.stream(**self.arguments(request))
        try:
            for step in stream:
                remote = isinstance(step, RemoteStep)  # what to decode was decided where the model is, on a tick there
                due = time.monotonic() - ticked >= TICK or step.iteration == step.num_iterations
                spent, previews = pace.spent, step.guesses if remote else ()
                if due and not remote:
                    previews = pace.decode(step, request.num_inference_steps, time.monotonic() - started)
                due = due or bool(previews)
                if due:
                    ticked = time.monotonic()
                yield Call(
                    iteration=step.iteration,
                    num_iterations=step.num_iterations,
                    step_index=tuple(step.step_index.tolist()),
                    noise_level=tuple(step.noise_level.tolist()),
                    finished=tuple(step.finished),
                    previews=previews,
                    due=due,
                    decoding=pace.spent - spent,
                    preview=pace.each,
                )
        finally:
            stream.close()

    def _gpu_seconds(self, model: str, request: GenerationRequest, preview: float | None) -> int:
        """Seconds to ask ZeroGPU for: the plan's, with room for previews and for a machine that is not at its best."""
        expected = self._seconds_ahead(request, self.models.get(model))[0]
        return math.ceil(min(GPU_SECONDS + 1.5 * float(expected), GPU_SECONDS + self.limits.run_seconds))

    def _reconstruct(self, model: str, frames: np.ndarray) -> list[np.ndarray]:
        return list(self.models.get(model).pipeline.reconstruct(frames))

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
        guided = self._is_guided(request, model)
        rows = [model.cost.seconds(1, count, guided) for count in model.evaluations(self._plan(request).numpy())]
        return np.append(np.cumsum(rows[::-1])[::-1], 0.0)

    def _is_guided(self, request: GenerationRequest, model: LoadedModel) -> bool:
        return model.pipeline.is_guided(request.guidance_scale, request.scene is not None)

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
            model.cost.record(0.0, (time.monotonic() - begun) / model.window)
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
        model.cost.record(max(medians[0] - evaluations / 2 * frame, medians[0] / 10), frame)

    def _on_worker(self, call: Callable[[], Any]) -> Any:
        """Run a short `call` on the model's thread: between two iterations when a run is under way."""
        future: Future[Any] = Future()
        self._errands.append((future, partial(contextvars.copy_context().run, call)))
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
    if isinstance(error, ValueError | GpuError | ReplicaLost):
        return str(error)
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        reason = error.strerror or "no video could be written"  # ffmpeg's own words fill a screen
        return f"The server's disk is full or failed ({reason}); what had finished is kept."
    if isinstance(error, torch.OutOfMemoryError):
        return "The device ran out of memory; what had finished is kept. Choose a larger gap, a shorter length or no guidance."
    return f"The run broke off ({type(error).__name__}: {error}); what had finished is kept."
