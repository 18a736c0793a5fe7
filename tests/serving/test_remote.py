"""A model elsewhere, without a cluster: the replica's own class in this process, and every step pickled on its way."""

import asyncio
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ardiff.demo.presets import Failed, Finished, FrameReady, GenerationRequest, Preview, Progress, Prompt, Queued
from ardiff.demo.session import Session
from ardiff.serving.cluster import Cluster, Model, serve_studio
from ardiff.serving.remote import ATTEMPTS, RemotePipeline, ReplicaLost


SMALL = {"num_frames": 6, "num_inference_steps": 6, "ar_step": 2}


@pytest.fixture
def folder(tiny_pipeline, tmp_path) -> str:
    tiny_pipeline.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


class Replica:
    """`Model` and its wire. `dies_after`: steps of the next runs, after which the replica is gone, run by run."""

    def __init__(self, folder: str) -> None:
        self.model = Model([folder], "cpu", "float32", threads=torch.get_num_threads())
        self.dies_after: list[int] = []
        self.asked = self.busy = 0

    def open_steps(self, name: str, arguments: dict) -> Iterator[dict]:
        # A thread of its own, as a replica has: that of the tests may have the loop of a browser.
        thread, loop = ThreadPoolExecutor(1), asyncio.new_event_loop()
        steps = self.model.steps(name, pickle.loads(pickle.dumps(arguments)))
        last = self.dies_after.pop(0) if self.dies_after else None
        self.asked, count = self.asked + 1, 0
        try:
            while count != last:
                try:
                    step = thread.submit(lambda: loop.run_until_complete(anext(steps))).result()
                    yield pickle.loads(pickle.dumps(step))
                except StopAsyncIteration:
                    return
                count += 1
            raise ReplicaLost
        finally:
            thread.submit(lambda: loop.run_until_complete(steps.aclose())).result()
            thread.shutdown()
            loop.close()


@pytest.fixture
def replicas(folder) -> list[Replica]:
    return [Replica(folder), Replica(folder)]


@pytest.fixture
def session(folder, replicas) -> Iterator[Session]:
    """Two workers, each run on the replica that has nothing to do."""

    choosing = threading.Lock()

    def open_steps(name: str, arguments: dict) -> Iterator[dict]:
        with choosing:
            replica = min(replicas, key=lambda replica: replica.busy)
            replica.busy += 1
        try:
            yield from replica.open_steps(name, arguments)
        finally:
            with choosing:
                replica.busy -= 1

    session = Session({"tiny": lambda: RemotePipeline(folder, open_steps, "2 replicas")}, workers=2, warm_up=False)
    yield session
    session.close()


def frames_of(events: list) -> np.ndarray:
    return np.stack([event.frame for event in events if isinstance(event, FrameReady)])


def expected(pipeline, session, request: GenerationRequest) -> np.ndarray:
    return np.concatenate(
        [np.stack([frame for _, frame in step.finished]) for step in pipeline.stream(**session.arguments(request)) if step.finished]
    )  # fmt: skip


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def test_frames_equal_the_pipeline_and_guesses_come_along(session, tiny_pipeline):
    prompt = Prompt(torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator()).numpy(), "")
    request = GenerationRequest(scene="clouds", prompt=prompt, seed=3, **SMALL)
    events = list(session.run(request))
    assert isinstance(events[0], Queued)
    assert isinstance(events[-1], Finished)
    assert np.array_equal(frames_of(events), expected(tiny_pipeline, session, request))
    rows = [event.step_index for event in events if isinstance(event, Progress)]
    assert rows[-1] == (6,) * 6
    assert any(isinstance(event, Preview) for event in events)


def test_what_the_page_asks_of_a_model_is_that_of_the_pipeline(session, tiny_pipeline):
    near = session.first.pipeline
    for attribute in ("image_size", "class_names", "min_frames", "supports_frame_cache"):
        assert getattr(near, attribute) == getattr(tiny_pipeline, attribute)
    assert near.transformer.config.window == tiny_pipeline.transformer.config.window
    assert {parameter.device.type for parameter in near.transformer.parameters()} == {"meta"}
    picture = np.full((1, 32, 32, 3), 99, np.uint8)
    assert np.array_equal(near.reconstruct(picture), tiny_pipeline.reconstruct(picture))
    assert session.first.device == "2 replicas"


def test_two_runs_are_under_way_at_once_and_the_third_has_a_place(session, replicas, tiny_pipeline, monkeypatch):
    gate = threading.Event()
    for replica in replicas:
        open_steps = replica.open_steps

        def held(name: str, arguments: dict, open_steps: Callable = open_steps) -> Iterator[dict]:
            for number, step in enumerate(open_steps(name, arguments)):
                assert number == 0 or gate.wait(10)
                yield step

        monkeypatch.setattr(replica, "open_steps", held)
    requests = [GenerationRequest(scene="balls", seed=seed, **SMALL) for seed in range(4)]
    runs = [session.run(request) for request in requests]
    until(lambda: [replica.asked for replica in replicas] == [1, 1])
    assert [next(run).place for run in runs][2:] == [1, 2]
    gate.set()
    for run, request in zip(runs, requests, strict=True):
        assert np.array_equal(frames_of(list(run)), expected(tiny_pipeline, session, request))


def test_a_lost_replica_is_told_and_the_finished_frames_stay(session, replicas, tiny_pipeline):
    request = GenerationRequest(scene="balls", seed=5, **SMALL)
    replicas[0].dies_after = [9]
    events = list(session.run(request))
    failed = events[-1]
    assert isinstance(failed, Failed)
    assert "The machine that was making this video stopped" in failed.message
    assert "ReplicaLost" not in failed.message
    kept = frames_of(events)
    assert 0 < failed.num_frames == len(kept) < 6
    assert failed.video.stat().st_size > 0
    assert np.array_equal(kept, expected(tiny_pipeline, session, request)[: len(kept)])
    assert len(frames_of(list(session.run(request)))) == 6


def test_a_replica_that_dies_before_the_first_step_costs_nothing(session, replicas, tiny_pipeline):
    request = GenerationRequest(scene="balls", seed=6, **SMALL)
    replicas[0].dies_after = [0] * (ATTEMPTS - 1)
    events = list(session.run(request))
    assert isinstance(events[-1], Finished)
    assert replicas[0].asked == ATTEMPTS
    assert np.array_equal(frames_of(events), expected(tiny_pipeline, session, request))
    replicas[0].dies_after = [0] * ATTEMPTS
    assert isinstance(list(session.run(request))[-1], Failed)


def test_stop_frees_the_replica_and_its_model_s_error_arrives(session, replicas):
    run = session.run(GenerationRequest(num_frames=64, num_inference_steps=100, ar_step=100))
    begun = next(event for event in run if isinstance(event, Progress))
    session.stop(begun.run_id)
    assert list(run)[-1].stopped
    until(lambda: not any(replica.busy for replica in replicas))
    with pytest.raises(ValueError, match="`class_labels` must name classes"):
        next(session.first.pipeline.stream(class_labels=["no such"], generator=torch.Generator()))


def test_draining_refuses_new_runs_and_lets_those_taken_finish(session):
    taken = [session.run(GenerationRequest(seed=seed, **SMALL)) for seed in range(3)]
    ended: list[list] = []
    readers = [threading.Thread(target=lambda run=run: ended.append(list(run))) for run in taken]
    for reader in readers:
        reader.start()
    assert session.drain(30)
    for reader in readers:
        reader.join()
    assert [events[-1].num_frames for events in ended] == [6, 6, 6]
    with pytest.raises(ValueError, match="about to restart"):
        session.run(GenerationRequest(**SMALL))


def test_draining_ends_what_takes_too_long_and_keeps_its_frames(session):
    run = session.run(GenerationRequest(num_frames=64, num_inference_steps=50, ar_step=50))
    while not isinstance(next(run), FrameReady):
        pass
    seen: list = []
    reader = threading.Thread(target=lambda: seen.extend(run))
    reader.start()
    assert not session.drain(0.0)
    reader.join()
    assert seen[-1].stopped
    assert seen[-1].video.stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replicas": 1, "min_replicas": 2}, "`min_replicas` must be from 1 to 1 but is 2"),
        ({"min_replicas": 0}, "`min_replicas` must be from 1 but is 0"),
        ({"grace": -1.0}, "must be at least 0 but are 0, 0 and -1"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Cluster(**options)


def test_without_ray_there_is_one_sentence(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="`ardiff serve` needs Ray: python -m pip install"):
        serve_studio(Cluster(models=(folder,)), say=print)
