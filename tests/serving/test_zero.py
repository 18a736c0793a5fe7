"""A run as ZeroGPU has it: in a forked process, everything that crosses pickled, the GPU free when the run is over."""

import contextvars
import inspect
import multiprocessing
import os
import pickle
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ardiff.demo.presets import Failed, Finished, FrameReady, GenerationRequest, Preview, Progress, Prompt
from ardiff.demo.session import GPU_SECONDS, Session
from ardiff.serving.zero import GpuError, with_gpu


SMALL = {"num_frames": 6, "num_inference_steps": 6, "ar_step": 2}
REQUEST = contextvars.ContextVar("request", default=None)


class Machine:
    """What `spaces.GPU` does on ZeroGPU, without the GPU: a fork for every call; arguments, yields and results as pickles;
    a stop is seen after the yield that follows it. What was asked for and what the GPU is busy with is kept.
    """

    def __init__(self) -> None:
        self.fork = multiprocessing.get_context("fork")
        self.asked, self.busy, self.pids, self.yields = [], 0, set(), 0

    def GPU(self, task=None, *, duration=None, size=None):
        if task is None:
            return lambda task: self.GPU(task, duration=duration, size=size)
        return self._generator(task, duration) if inspect.isgeneratorfunction(task) else self._function(task, duration)

    def _start(self, task, duration, args):
        self.asked.append((duration(*args), REQUEST.get()))
        here, there = self.fork.Pipe()
        stop = self.fork.Event()

        def child() -> None:
            torch.set_num_threads(1)  # the pool of threads did not come along
            given = pickle.loads(here_args)
            try:
                if inspect.isgeneratorfunction(task):
                    steps = task(*given)
                    for step in steps:
                        if stop.is_set():
                            steps.close()
                            break
                        there.send_bytes(pickle.dumps(("yield", os.getpid(), step)))
                    there.send_bytes(pickle.dumps(("end", os.getpid(), None)))
                else:
                    there.send_bytes(pickle.dumps(("end", os.getpid(), task(*given))))
            except Exception as error:
                there.send_bytes(pickle.dumps(("error", os.getpid(), type(error).__name__)))
            finally:
                os._exit(0)

        here_args = pickle.dumps(args)
        process = self.fork.Process(target=child, daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork among threads, from Python 3.12 on
            process.start()
        self.busy += 1
        return process, here, stop

    def _take(self, pipe):
        kind, pid, value = pickle.loads(pipe.recv_bytes())
        self.pids.add(pid)
        if kind == "error":
            raise RuntimeError(value)  # all that spaces tells: the type's name
        return kind, value

    def _generator(self, task, duration):
        def handler(*args):
            process, pipe, stop = self._start(task, duration, args)
            try:
                while True:
                    kind, value = self._take(pipe)
                    if kind == "end":
                        return
                    self.yields += 1
                    yield value
            except GeneratorExit:
                stop.set()
                raise
            finally:
                process.join(10)
                pipe.close()
                self.busy -= 1

        return handler

    def _function(self, task, duration):
        def handler(*args):
            process, pipe, _ = self._start(task, duration, args)
            try:
                return self._take(pipe)[1]
            finally:
                process.join(10)
                pipe.close()
                self.busy -= 1

        return handler


@pytest.fixture
def machine(monkeypatch) -> Machine:
    machine = Machine()
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=machine.GPU))
    return machine


@pytest.fixture
def session(machine, tiny_pipeline):
    session = Session({"tiny": lambda: tiny_pipeline})
    yield session
    session.close()
    assert machine.busy == 0


def test_a_run_in_another_process_gives_the_same_frames(session, machine, monkeypatch):
    exported = []
    export = session.store.export
    monkeypatch.setattr(session.store, "export", lambda *args: exported.append(machine.busy) or export(*args))
    request = GenerationRequest(**SMALL, seed=3)
    REQUEST.set("of the visitor")
    events = list(session.run(request))
    last = events[-1]
    assert isinstance(last, Finished)
    assert not last.stopped
    frames = np.stack([event.frame for event in events if isinstance(event, FrameReady)])
    video = session.first.pipeline(**session.arguments(request), output_type="np").frames[0]
    np.testing.assert_array_equal(frames, np.rint(255 * video).astype(np.uint8))
    assert len(machine.pids) == 1
    assert os.getpid() not in machine.pids
    # One yield a call of the network, and the file is built when the GPU is free.
    assert machine.yields == 16 == [event for event in events if isinstance(event, Progress)][-1].num_iterations
    assert exported == [0]
    # Whose share it is comes along to the session's thread, and the seconds asked for are the plan's.
    ((seconds, visitor),) = machine.asked
    assert visitor == "of the visitor"
    assert GPU_SECONDS < seconds <= GPU_SECONDS + 5


def test_a_longer_plan_asks_for_more_seconds_and_never_for_more_than_a_run_may_take(session):
    def asked(**more) -> int:
        return session._gpu_seconds("tiny", GenerationRequest(**{**SMALL, **more}), None)

    session.first.cost.call = 0.1
    few, more, most = (
        asked(),
        asked(num_inference_steps=100),
        asked(num_frames=64, num_inference_steps=100, ar_step=100),
    )
    assert few < more < most == GPU_SECONDS + session.limits.run_seconds
    assert few >= GPU_SECONDS + 1.5 * 16 * 0.1


def test_stop_frees_the_gpu_at_the_next_call(session, machine, monkeypatch):
    stream = session.first.pipeline.stream

    def slowly(*args, **arguments):
        for step in stream(*args, **arguments):
            time.sleep(0.03)
            yield step

    monkeypatch.setattr(session.first.pipeline, "stream", slowly)
    events = []
    for event in session.run(GenerationRequest(**{**SMALL, "num_inference_steps": 40, "ar_step": 40}, seed=1)):
        events.append(event)
        if isinstance(event, FrameReady) and event.index == 0:
            session.stop(event.run_id)
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.stopped
    assert machine.yields < 80
    assert machine.busy == 0
    run = session.run(GenerationRequest(**SMALL))
    while not isinstance(next(run), Progress):
        pass
    run.close()
    end = time.monotonic() + 10
    while machine.busy:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_guesses_and_prompts_cross_too(session):
    pixels = np.random.default_rng(0).integers(0, 256, (2, *[session.first.image_size] * 2, 3), dtype=np.uint8)
    prompt = Prompt(pixels, "noise", ((pixels[0], (0.0, 0.0, 1.0, 1.0)),) * 2)
    events = list(session.run(GenerationRequest(**SMALL, prompt=prompt)))
    frames = [event.frame for event in events if isinstance(event, FrameReady)]
    np.testing.assert_array_equal(frames[:2], session.prompt_preview(prompt))
    assert any(isinstance(event, Preview) for event in events)
    assert session.first.cost.preview is not None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "The device ran out of memory"),
        (RuntimeError("broken pipe in the basement"), "broken pipe in the basement"),
    ],
)
def test_what_breaks_over_there_is_told_here(session, monkeypatch, error, words):
    stream = session.first.pipeline.stream

    def failing(*args, **arguments):
        for step in stream(*args, **arguments):
            yield step
            if step.iteration == 9:
                raise error

    monkeypatch.setattr(session.first.pipeline, "stream", failing)
    last = list(session.run(GenerationRequest(**SMALL)))[-1]
    assert isinstance(last, Failed)
    assert words in last.message
    assert last.num_frames == 2


def test_a_function_breaks_off_with_its_words(machine):
    def task(value):
        raise ValueError(f"not {value}")

    with pytest.raises(GpuError, match="not 3"):
        with_gpu(task, lambda value: 1, str)(3)


def test_elsewhere_functions_are_left_as_they_are(monkeypatch):
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    assert with_gpu(len, lambda value: 1, str) is len
