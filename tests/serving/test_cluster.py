"""`ardiff serve` as a person starts it: one page, two replicas on the CPU, visitors through real HTTP and in Chromium."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from load import alone, digest, events, picture, request, served
from studio_page import PHASE, STAGE, press, settle, shown_frames, visit, wait_for


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install -e '.[serve]'"),
]

LONG = {"frames": 32, "gap": 100, "steps": 100}
"""1,600 calls: five seconds or more, time enough to do something meanwhile."""


@pytest.fixture
def studio(tmp_path_factory, tiny_pipeline, started) -> SimpleNamespace:
    """The cluster, started by the first test that needs it."""
    if not hasattr(started, "url"):
        model = tmp_path_factory.mktemp("models") / "tiny"
        tiny_pipeline.save_pretrained(model)
        command = [sys.executable, "-m", "ardiff.cli", "serve", "--model", str(model), "--device", "cpu"]
        command += ["--replicas", "2", "--min-replicas", "2", "--cpus", "1", "--grace", "60"]
        log = model.parent / "studio.log"
        started.process, started.url = started.stack.enter_context(served(command, log, threads=1, start_seconds=240))
        started.log = log
        until(lambda: started.url in log.read_text())  # the page may answer before the second replica has its model
    torch.set_num_threads(1)
    started.pipeline = tiny_pipeline
    return started


@pytest.fixture(scope="module")
def started() -> Iterator[SimpleNamespace]:
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        yield SimpleNamespace(stack=stack)
    torch.set_num_threads(threads)


class Visitor(threading.Thread):
    """A run through HTTP: its events with the time of each."""

    def __init__(self, url: str, data: list) -> None:
        super().__init__()
        self.url, self.data = url, data
        self.seen: list[tuple[float, dict]] = []
        self.error = ""
        self.start()

    def run(self) -> None:
        try:
            for event in events(self.url, self.data):
                self.seen.append((time.monotonic(), event))
        except RuntimeError as error:
            self.error = str(error)

    def told(self, kind: str) -> list[dict]:
        return [event for _, event in self.seen if event["event"] == kind]

    def frames(self) -> list[str]:
        return [digest(picture(event["frame"])) for event in self.told("FrameReady")]

    def span(self) -> tuple[float, float]:
        times = [when for when, event in self.seen if event["event"] == "Progress"]
        return times[0], times[-1]


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def replicas(studio) -> list[psutil.Process]:
    """The processes that hold a model."""
    found = []
    for process in psutil.Process(studio.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] == ["ray::ServeReplica:ardiff:Model"] or "ardiff:Model" in process.cmdline()[0]:
                found.append(process)
    return found


def test_two_visitors_run_in_parallel_and_get_the_frames_of_one_process(studio):
    asked = [request(seed, scene="clouds", **LONG) for seed in (1, 2)]
    visitors = [Visitor(studio.url, data) for data in asked]
    until(lambda: all(visitor.told("Progress") for visitor in visitors))
    third = Visitor(studio.url, request(3, frames=4))
    until(lambda: third.told("Queued"))
    assert third.told("Queued")[0]["place"] == 1
    for visitor in [*visitors, third]:
        visitor.join()
    (begun, ended), (other_begun, other_ended) = (visitor.span() for visitor in visitors)
    assert max(begun, other_begun) < min(ended, other_ended)
    assert third.span()[0] > min(ended, other_ended) - 0.2  # the three streams are read by three threads
    assert all(visitor.told("Preview") for visitor in visitors)
    assert [visitor.frames() for visitor in visitors] == [alone(None, data, studio.pipeline) for data in asked]


def test_the_page_is_that_of_the_demo(studio, browser, tmp_path):
    studio.url += "/"
    try:
        with visit(browser, studio) as page:
            settle(page)
            press(page, "Generate")
            wait_for(page, "done")
            data = request(7, scene="balls", frames=6, gap=5, steps=10)
            assert [digest(frame) for frame in shown_frames(page)] == alone(None, data, studio.pipeline)
            settle(page, length=64, steps=200, gap=200)
            press(page, "Generate")
            # Pressed by the page itself, in the moment that it can be: the run may be over when word of it is here.
            button = "document.getElementById('ar-stop')"
            started = f"{PHASE} === 'running' && {STAGE}.value.finished >= 1 && !{button}.disabled"
            page.wait_for_function(f"{started} && ({button}.click(), true)", timeout=90_000)
            wait_for(page, "done")
            assert 1 <= len(shown_frames(page)) < 64
    finally:
        studio.url = studio.url.rstrip("/")


def test_a_killed_replica_loses_its_own_run_alone(studio):
    asked = [request(seed, scene="sunset", **LONG) for seed in (4, 5)]
    visitors = [Visitor(studio.url, data) for data in asked]
    until(lambda: all(visitor.told("FrameReady") for visitor in visitors))
    (victim, *others) = replicas(studio)
    assert len(others) == 1
    os.kill(victim.pid, signal.SIGKILL)
    for visitor in visitors:
        visitor.join()
    (lost,) = (visitor for visitor in visitors if visitor.told("Failed"))
    (kept,) = (visitor for visitor in visitors if visitor is not lost)
    failed = lost.told("Failed")[0]
    assert "what had finished is kept" in failed["message"]
    assert "Error" not in failed["message"]
    expected = dict(zip(visitors, (alone(None, data, studio.pipeline) for data in asked), strict=True))
    assert kept.frames() == expected[kept]
    assert 0 < failed["num_frames"] == len(lost.frames()) < 32
    assert lost.frames() == expected[lost][: failed["num_frames"]]
    assert Path(failed["video"]).stat().st_size > 0
    again = Visitor(studio.url, request(6, frames=4))
    again.join()
    assert again.frames() == alone(None, again.data, studio.pipeline)
    until(lambda: len(replicas(studio)) == 2)


def test_a_stop_lets_runs_finish_and_refuses_new_ones(studio):
    running = Visitor(studio.url, request(8, scene="balls", **LONG))
    until(lambda: running.told("FrameReady"))
    studio.process.send_signal(signal.SIGTERM)
    until(lambda: "new ones are refused" in studio.log.read_text())
    late = None
    while late is None or not late.error:  # the word reaches the page a moment after it is written
        late = Visitor(studio.url, request(9, frames=4))
        late.join()
        assert not running.told("Finished")
    assert "about to restart" in late.error
    running.join()
    assert running.told("Finished")
    assert running.frames() == alone(None, running.data, studio.pipeline)
    assert studio.process.wait(60) == 0
    assert "every run came to its end" in studio.log.read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--cpus", "10000"], "cores need"), (["--model", "nowhere/at/all"], "Repo id must be")],
)
def test_what_cannot_work_is_one_line(options, words):
    command = [sys.executable, "-m", "ardiff.cli", "serve", "--device", "cpu", *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert words in ended.stderr.splitlines()[-1]
