"""What is kept of runs: frames, files and settings, for how long, and going on from them."""

import json
import os
import time
import zipfile
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image

from ardiff.data.video import write_video
from ardiff.demo.presets import Finished, FrameReady, GenerationRequest, Prompt, read_settings
from ardiff.demo.session import Session
from ardiff.demo.storage import EXPORTS


SMALL = {"num_frames": 6, "num_inference_steps": 6, "ar_step": 2}


def finish(session: Session, request: GenerationRequest) -> tuple[Finished, np.ndarray]:
    events = list(session.run(request))
    assert isinstance(events[-1], Finished)
    return events[-1], np.stack([event.frame for event in events if isinstance(event, FrameReady)])


def decoded(path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize("gaps", [(0, 0, 6, 0, 0), (0, 1, 2, 3, 4), (6, 0, 0, 0, 1)])
def test_a_list_of_gaps_equals_the_pipeline(session, gaps):
    request = GenerationRequest(**{**SMALL, "ar_step": gaps}, seed=3)
    _, frames = finish(session, request)
    video = session.first.pipeline(**session.arguments(request), output_type="np").frames[0]
    np.testing.assert_array_equal(frames, np.rint(255 * video).astype(np.uint8))


def test_settings_of_a_run_give_its_frames_again(session):
    pixels = np.random.default_rng(0).integers(0, 256, (2, *[session.first.image_size] * 2, 3), dtype=np.uint8)
    request = GenerationRequest(
        scene=session.first.scenes[0], prompt=Prompt(pixels, "x.png"), num_frames=6, ar_step=(1, 6, 0), num_inference_steps=6,
        guidance_scale=1.5, seed=8,
    )  # fmt: skip
    last, frames = finish(session, request)
    stored = session.store.export(last.run_id, "json").read_text()
    assert json.loads(stored)["finished_frames"] == 6
    np.testing.assert_array_equal(finish(session, read_settings(stored))[1], frames)


def test_a_run_goes_on_without_end(session):
    first, begun = finish(session, GenerationRequest(**SMALL, seed=1))
    request = session.continuation(first.run_id, GenerationRequest(**SMALL, seed=2))
    assert request.num_prompt_frames == 6
    assert request.num_frames == 12
    second, added = finish(session, request)
    third, more = finish(session, session.continuation(second.run_id, GenerationRequest(**SMALL, seed=3)))
    assert (first.total_frames, second.total_frames, third.total_frames) == (6, 12, 18)
    assert third.num_frames == 8 + 6
    with zipfile.ZipFile(session.store.export(third.run_id, "zip")) as archive:
        kept = np.stack([np.asarray(Image.open(archive.open(name))) for name in sorted(archive.namelist())])
    # What had finished stays as it was: the prompt that the model sees is never put in its place.
    np.testing.assert_array_equal(kept, np.concatenate([begun, added[6:], more[8:]]))
    assert decoded(third.video) == 18
    with pytest.raises(ValueError, match="not kept any more"):
        session.continuation("0" * 32, GenerationRequest(**SMALL))


def test_every_export_holds_every_frame(session):
    last, frames = finish(session, GenerationRequest(**SMALL, seed=4))
    assert decoded(session.store.export(last.run_id, "mp4")) == 6
    for kind in ("gif", "webp"):
        with Image.open(session.store.export(last.run_id, kind)) as picture:
            assert getattr(picture, "n_frames", 1) >= 2
    with zipfile.ZipFile(session.store.export(last.run_id, "zip")) as archive:
        kept = np.stack([np.asarray(Image.open(archive.open(name))) for name in sorted(archive.namelist())])
    np.testing.assert_array_equal(kept, frames)
    assert {session.store.export(last.run_id, kind).name for kind in EXPORTS} == set(EXPORTS.values())
    written = session.store.export(last.run_id, "gif").stat().st_mtime_ns
    assert session.store.export(last.run_id, "gif").stat().st_mtime_ns == written
    for run_id, kind, words in (
        (last.run_id, "exe", "mp4, gif, webp, zip, json"),
        ("../x", "gif", "not kept any more"),
    ):
        with pytest.raises(ValueError, match=words):
            session.store.export(run_id, kind)


def test_finished_frames_are_there_when_the_visitor_has_left(session):
    request = GenerationRequest(**{**SMALL, "num_inference_steps": 20, "ar_step": 20}, seed=5)
    run = session.run(request)
    # The visitor's side never asks for an event after this one.
    run_id = next(run).run_id
    end = time.monotonic() + 10
    while len(session.store.recover(run_id).frames) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    run.close()
    recovered = session.store.recover(run_id)
    whole = session._on_worker(
        lambda: session.first.pipeline(**session.arguments(request), output_type="np").frames[0]
    )
    kept = np.stack(recovered.frames)
    np.testing.assert_array_equal(kept, np.rint(255 * whole).astype(np.uint8)[: len(kept)])
    assert recovered.request == replace(request, model="tiny")
    assert decoded(session.store.export(run_id, "mp4")) == len(kept)
    session.store.sweep(max_age=-1)
    with pytest.raises(ValueError, match="not kept any more"):
        session.store.recover(run_id)


def test_a_thousand_runs_leave_a_bounded_disk(session):
    session.store.limits = replace(session.limits, disk_megabytes=1, upload_megabytes=1)
    last, _ = finish(session, GenerationRequest(**SMALL))
    for index in range(1000):
        folder = session.store.runs / f"{index:032x}"
        folder.mkdir()
        (folder / "settings.json").write_text("{}")
        os.utime(folder, (time.time() - 2000 + index,) * 2)
        if index % 50 == 0:
            session.store.sweep()
    finish(session, GenerationRequest(**SMALL))
    kept = {folder.name for folder in session.store.runs.iterdir()}
    taken = sum(max(path.stat().st_size, 4096) for path in session.store.runs.rglob("*.*"))
    assert 2**20 * 0.9 < taken < 2**20 * 1.2
    assert 200 < len(kept) < 257
    assert last.run_id in kept
    assert f"{999:032x}" in kept
    assert f"{0:032x}" not in kept
    assert not session._live
    assert not session._waiting


def test_a_stopped_iteration_never_overlaps_the_next_run(session, monkeypatch):
    stream, running, overlaps, order = session.first.pipeline.stream, [], [], []

    def watched(*args, **arguments):
        seed = arguments["generator"].initial_seed()
        steps = stream(*args, **arguments)
        while True:
            overlaps.extend(running)
            running.append(seed)
            time.sleep(0.05)
            step = next(steps, None)
            running.remove(seed)
            order.append(seed)
            if step is None:
                return
            yield step

    monkeypatch.setattr(session.first.pipeline, "stream", watched)
    first = session.run(GenerationRequest(**SMALL, seed=1))
    run_id = next(first).run_id
    second = session.run(GenerationRequest(**SMALL, seed=2))
    while not order:
        time.sleep(0.01)
    session.stop(run_id)
    first.close()
    list(second)
    assert order.count(1) < 16
    assert order == sorted(order)
    assert not overlaps


def test_twenty_runs_of_two_visitors_never_mix(session):
    kept = []
    for pair in range(10):
        requests = [
            GenerationRequest(**{**SMALL, "ar_step": pair % 7}, seed=10 * visitor + pair) for visitor in (1, 2)
        ]
        runs = [session.run(request) for request in requests]
        frames: list[list[np.ndarray]] = [[], []]
        open_runs = [0, 1]
        while open_runs:
            for visitor in list(open_runs):
                event = next(runs[visitor], None)
                if event is None:
                    open_runs.remove(visitor)
                elif isinstance(event, FrameReady):
                    frames[visitor].append(event.frame)
        kept += zip(requests, frames, strict=True)
    assert len(kept) == 20
    for request, frames in kept:
        video = session.first.pipeline(**session.arguments(request), output_type="np").frames[0]
        np.testing.assert_array_equal(np.stack(frames), np.rint(255 * video).astype(np.uint8))


def test_a_video_is_trimmed_and_its_crop_is_shown(session, tmp_path):
    clip = np.random.default_rng(1).integers(0, 256, (12, 40, 80, 3), dtype=np.uint8)
    write_video(clip, tmp_path / "clip.mp4")
    everything = session.read_prompt([tmp_path / "clip.mp4"])
    trimmed = session.read_prompt([tmp_path / "clip.mp4"], start=1, stride=3, count=2)
    np.testing.assert_array_equal(trimmed.frames, everything.frames[[1, 4]])
    picture, crop = trimmed.views[0]
    assert picture.shape[:2] == (80, 160)
    assert crop == (0.25, 0.0, 0.75, 1.0)
    for wrong, words in (
        ({"start": 12}, "12 frames"),
        ({"count": 9}, "from 1 to 8, got 9"),
        ({"stride": 0}, "stride"),
    ):
        with pytest.raises(ValueError, match=words):
            session.read_prompt([tmp_path / "clip.mp4"], **wrong)


def test_uploads_share_the_disk_with_runs_and_the_page_keeps_its_own(session):
    session.store.limits = replace(session.limits, disk_megabytes=1, upload_megabytes=1)
    (session.store.uploads / "example").mkdir()
    (session.store.uploads / "example" / "balls.mp4").write_bytes(bytes(300_000))
    session.store.keep_page_files()
    for index in range(40):
        folder = session.store.uploads / f"{index:02d}"
        folder.mkdir()
        (folder / "picture.png").write_bytes(bytes(100_000))
        os.utime(folder / "picture.png", (time.time() - 1000 + index,) * 2)
    session.store.sweep()
    left = sorted(path.name for path in session.store.uploads.iterdir())
    assert left == [*(f"{index:02d}" for index in range(30, 40)), "example"]
    os.utime(session.store.uploads / "39" / "picture.png", (time.time() - 4000,) * 2)
    session.store.sweep()
    assert not (session.store.uploads / "39").exists()
