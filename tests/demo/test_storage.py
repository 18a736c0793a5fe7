"""What is kept of a run on disk."""

import resource
import threading
import uuid

import numpy as np
import pytest
import torch

from ardiff.demo.presets import GenerationRequest
from ardiff.demo.storage import RunStore
from ardiff.serving.limits import PRESETS


@pytest.fixture
def store():
    store = RunStore(PRESETS["space"])
    yield store
    store.close()


def test_a_run_that_grows_is_read_whole(store, generator):
    """While frames and settings are written over and over, whoever reads sees them as they were or as they are."""
    run_id = uuid.uuid4().hex
    store.begin(run_id, GenerationRequest(num_frames=4))
    frames = torch.randint(256, (4, 128, 128, 3), generator=generator, dtype=torch.uint8).numpy()
    over = threading.Event()

    def grow():
        while not over.is_set():
            for index, frame in enumerate(frames):
                store.add_frame(run_id, index, frame)
            store.add_settings(run_id, GenerationRequest(num_frames=4).settings())

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        for _ in range(150):
            found = store.recover(run_id)
            assert all(np.array_equal(frame, frames[index]) for index, frame in enumerate(found.frames))
            assert found.request.num_frames == 4
    finally:
        over.set()
        writer.join()


def test_a_run_that_finds_no_room_leaves_nothing(store):
    """A limit on the size of files: writing fails for real. Its folder would stay for as long as the server runs."""
    run_id, limits = uuid.uuid4().hex, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot keep a run on its disk \(File too large\), so none was begun"):
            store.begin(run_id, GenerationRequest(num_frames=4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(store.runs.iterdir())
    store.begin(run_id, GenerationRequest(num_frames=4))
    store.end(run_id)
    store.sweep(max_age=-1)
    assert not list(store.runs.iterdir())
