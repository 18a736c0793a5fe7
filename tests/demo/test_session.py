"""The studio without its page: one worker, many visitors, nothing lost and nothing mixed."""

import json
import resource
import time
from collections import deque
from dataclasses import replace
from itertools import zip_longest

import av
import numpy as np
import pytest
import torch
from PIL import Image

from ardiff import ARDiffPipeline, bundled_model
from ardiff.data.video import write_video
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
from ardiff.demo.session import Session
from ardiff.demo.view import RunView
from ardiff.serving.metrics import LOG_FIELDS, JsonFormatter


SMALL = {"num_frames": 6, "num_inference_steps": 6, "ar_step": 2}


@pytest.fixture
def slow(session, monkeypatch) -> Session:
    """The same session with iterations that take long enough to do something in between; they are counted."""
    stream = session.first.pipeline.stream
    session.iterations = 0

    def slowly(*args, **arguments):
        for step in stream(*args, **arguments):
            time.sleep(0.03)
            session.iterations += 1
            yield step

    monkeypatch.setattr(session.first.pipeline, "stream", slowly)
    return session


def frames_of(events: list[Event]) -> np.ndarray:
    ready = [event for event in events if isinstance(event, FrameReady)]
    assert [event.index for event in ready] == list(range(len(ready)))
    return np.stack([event.frame for event in ready])


def expected(session: Session, request: GenerationRequest) -> np.ndarray:
    video = session.first.pipeline(**session.arguments(request), output_type="np").frames[0]
    return np.rint(255 * video).astype(np.uint8)


def wait_until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def test_events_come_in_order_and_end_with_the_video(session):
    events = list(session.run(GenerationRequest(**SMALL, seed=3)))
    assert isinstance(events[0], Queued)
    assert events[0].place == 0
    assert isinstance(events[-1], Finished)
    assert not any(isinstance(event, Finished | Failed) for event in events[:-1])
    progress = [event for event in events if isinstance(event, Progress)]
    iterations = [event.iteration for event in progress]
    assert iterations == sorted(set(iterations))
    assert iterations[-1] == progress[-1].num_iterations == 16
    assert all(len(event.noise_level) == len(event.step_index) == 6 for event in progress)
    assert progress[-1].noise_level == (0.0,) * 6
    assert progress[-1].time_left == 0.0
    assert {event.run_id for event in events} == {events[0].run_id}


@pytest.mark.parametrize("gap", [0, 2, 6])
def test_frames_equal_the_pipeline(session, gap):
    request = GenerationRequest(**{**SMALL, "ar_step": gap}, seed=11, scene=session.first.scenes[0])
    np.testing.assert_array_equal(frames_of(list(session.run(request))), expected(session, request))


def test_prompt_frames_come_first_and_equal_the_pipeline(session):
    pixels = np.random.default_rng(0).integers(0, 256, (2, *[session.first.image_size] * 2, 3), dtype=np.uint8)
    prompt = Prompt(pixels, "noise")
    request = GenerationRequest(**SMALL, seed=1, prompt=prompt)
    events = list(session.run(request))
    np.testing.assert_array_equal(frames_of(events), expected(session, request))
    np.testing.assert_array_equal(frames_of(events)[:2], session.prompt_preview(prompt))


def test_video_and_settings_are_written(session):
    request = GenerationRequest(**SMALL, seed=5)
    finished = list(session.run(request))[-1]
    with av.open(str(finished.video)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert sum(1 for _ in container.decode(stream)) == 6
    again = {key: finished.settings[key] for key in ("scene", *SMALL, "guidance_scale", "seed")}
    assert GenerationRequest(**again) == request
    stored = sorted(finished.video.parent.glob("frame-*.png"))
    np.testing.assert_array_equal(
        np.stack([np.asarray(Image.open(path)) for path in stored]), expected(session, request)
    )


def test_stop_keeps_the_finished_frames(slow):
    request = GenerationRequest(**SMALL, seed=2)
    events = []
    for event in slow.run(request):
        events.append(event)
        if isinstance(event, FrameReady) and event.index == 2:
            assert slow.stop(event.run_id)
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.stopped
    assert 3 <= last.num_frames < 6
    kept = frames_of(events)
    assert len(kept) == last.num_frames
    np.testing.assert_array_equal(kept, expected(slow, request)[: len(kept)])
    with av.open(str(last.video)) as container:
        assert sum(1 for _ in container.decode(video=0)) == last.num_frames


def test_stop_before_the_first_frame_and_of_an_unknown_run(slow):
    run = slow.run(GenerationRequest(**SMALL))
    slow.stop(next(run).run_id)
    last = list(run)[-1]
    assert isinstance(last, Finished)
    assert last.stopped
    assert last.video is None
    assert not slow.stop("no such run")


def test_two_runs_do_not_mix_and_the_second_sees_its_place(slow):
    requests = [GenerationRequest(**SMALL, seed=seed) for seed in (20, 21)]
    runs = [slow.run(request) for request in requests]
    events = [[next(run)] for run in runs]
    assert [first[0].place for first in events] == [0, 1]
    for pair in zip_longest(*runs):
        for known, event in zip(events, pair, strict=True):
            known += [event] if event is not None else []
    for known, request in zip(events, requests, strict=True):
        assert {event.run_id for event in known} == {known[0].run_id}
        np.testing.assert_array_equal(frames_of(known), expected(slow, request))
    assert events[0][-1].video.parent != events[1][-1].video.parent


def test_closing_frees_the_worker_at_its_next_iteration(slow):
    request = GenerationRequest(**{**SMALL, "num_inference_steps": 50})
    run = slow.run(request)
    while not isinstance(next(run), Progress):
        pass
    run.close()
    begun = slow.iterations
    events = list(slow.run(GenerationRequest(**SMALL, seed=4)))
    assert isinstance(events[-1], Finished)
    assert slow.iterations <= begun + 2 + 16
    assert not slow._live
    assert not slow._running


def test_leaving_the_queue_lets_the_next_one_up(slow):
    first, second, third = (slow.run(GenerationRequest(**SMALL, seed=seed)) for seed in range(3))
    places = [next(run).place for run in (first, second, third)]
    second.close()
    assert places == [0, 1, 2]
    assert next(third).place == 1
    first.close()
    assert isinstance(list(third)[-1], Finished)


def test_previews_keep_their_share_and_never_change_the_result(session, monkeypatch):
    decoding = 0.0
    request = GenerationRequest(**{**SMALL, "num_inference_steps": 40}, seed=9)
    monkeypatch.setattr("ardiff.demo.session.TICK", 0.0)
    stream = session.first.pipeline.stream

    def timed(*args, **arguments):
        nonlocal decoding
        for step in stream(*args, **arguments):
            time.sleep(0.004)
            decode = step.decode_guess

            def measured(frames, decode=decode):
                nonlocal decoding
                begun = time.monotonic()
                # Dear enough that showing every frame each time would take most of the run.
                time.sleep(0.004 * len(frames))
                pictures = decode(frames)
                decoding += time.monotonic() - begun
                return pictures

            object.__setattr__(step, "decode_guess", measured)
            yield step

    monkeypatch.setattr(session.first.pipeline, "stream", timed)
    list(session.run(request))
    decoding = 0.0
    events = list(session.run(request))
    previews = [event for event in events if isinstance(event, Preview)]
    assert len(previews) > 3
    # A single decode may take longer than expected; the share is kept on the whole.
    assert decoding <= 0.2 * events[-1].seconds
    np.testing.assert_array_equal(frames_of(events), expected(session, request))


def test_no_more_than_ten_progress_events_a_second(slow):
    events = list(slow.run(GenerationRequest(**{**SMALL, "num_inference_steps": 40})))
    progress = [event for event in events if isinstance(event, Progress)]
    assert 3 < len(progress) <= 10 * events[-1].seconds + 2


def test_a_failing_model_is_told_in_a_sentence_and_the_next_run_works(session, monkeypatch):
    stream = session.first.pipeline.stream

    def failing(*args, **arguments):
        for step in stream(*args, **arguments):
            yield step
            if step.iteration == 9:
                raise RuntimeError("broken pipe in the basement")

    with monkeypatch.context() as patch:
        patch.setattr(session.first.pipeline, "stream", failing)
        last = list(session.run(GenerationRequest(**SMALL)))[-1]
    assert isinstance(last, Failed)
    assert "broken pipe in the basement" in last.message
    assert last.num_frames == 2
    assert last.video.stat().st_size > 0
    assert isinstance(list(session.run(GenerationRequest(**SMALL)))[-1], Finished)


def test_a_full_disk_is_told_in_a_sentence_and_the_next_run_works(slow):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    events = []
    try:
        for event in slow.run(GenerationRequest(**SMALL)):
            events.append(event)
            if isinstance(event, FrameReady):  # a limit on the size of files: from here on writing fails for real
                resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(events[-1], Failed)
    assert events[-1].message == "The server's disk is full or failed (File too large); what had finished is kept."
    assert 1 <= events[-1].num_frames == len(slow.store.recover(events[-1].run_id).frames) < SMALL["num_frames"]
    assert isinstance(list(slow.run(GenerationRequest(**SMALL)))[-1], Finished)


def test_out_of_memory_is_told_and_what_had_finished_is_kept(session, monkeypatch):
    stream = session.first.pipeline.stream

    def failing(*args, **arguments):
        for step in stream(*args, **arguments):
            yield step
            if step.iteration == 9:
                raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(session.first.pipeline, "stream", failing)
    last = list(session.run(GenerationRequest(**SMALL)))[-1]
    assert isinstance(last, Failed)
    assert last.message.startswith("The device ran out of memory; what had finished is kept.")
    assert last.num_frames == len(session.store.recover(last.run_id).frames) == 2
    assert " GB free" in session.memory(session.first)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_frames": 3}, "length"),
        ({"num_frames": 5000}, "from 4 to 4096, got 5000"),
        ({"num_inference_steps": 4}, "steps"),
        ({"ar_step": 7}, "from 0 to 6, got 7"),
        ({"ar_step": 2.5}, "got 2.5"),
        ({"guidance_scale": 9}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"prompt": Prompt(np.zeros((6, 8, 8, 3), np.uint8), "x")}, "larger than the 6 prompt frames"),
        ({"scene": 3}, "scene"),
        ({"seed": 10**5000}, "thousands of digits"),
        ({"guidance_scale": float("nan")}, "guidance"),
        ({"prompt": Prompt(np.zeros((65, 8, 8, 3), np.uint8), "x"), "num_frames": 80}, "at most 64"),
    ],
)
def test_requests_out_of_range_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        GenerationRequest(**{**SMALL, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_frames": 65}, "from 4 to 64, got 65"),
        ({"num_inference_steps": 101}, "from 5 to 100, got 101"),
        (
            {"prompt": Prompt(np.zeros((9, 8, 8, 3), np.uint8), "x"), "num_frames": 20},
            "at most 8 prompt frames, got 9",
        ),
    ],
)
def test_more_than_the_operator_allows_is_refused(session, change, words):
    request = GenerationRequest(**{**SMALL, **change})
    with pytest.raises(ValueError, match=words):
        session.run(request)
    assert "ardiff_runs_refused_total 1\n" in session.metrics.text()


def test_a_run_ends_when_its_time_is_up_and_keeps_what_had_finished(slow, monkeypatch):
    monkeypatch.setattr(slow, "limits", replace(slow.limits, run_seconds=1))
    # A first frame after 0.15 s of waiting, the last one after 2.4 s.
    request = GenerationRequest(num_frames=16, num_inference_steps=5, ar_step=5, seed=5)
    events = list(slow.run(request))
    last = events[-1]
    assert isinstance(last, Finished)
    assert (last.stopped, last.limit) == (True, 1)
    assert 0 < last.num_frames < 16
    np.testing.assert_array_equal(frames_of(events), expected(slow, request)[: last.num_frames])
    view = RunView(request, slow.first.facts)
    view.absorb(last)
    assert view.message.startswith("A run may take 1.0 s here. The ")
    assert list(slow.run(GenerationRequest(**SMALL)))[-1].limit is None
    text = slow.metrics.text()
    assert 'ardiff_runs_ended_total{outcome="stopped"} 1\n' in text
    assert 'ardiff_runs_ended_total{outcome="finished"} 1\n' in text


def test_a_visitor_has_few_runs_at_the_same_time(slow):
    runs = [slow.run(GenerationRequest(**SMALL), "one") for _ in range(slow.limits.runs_per_visitor)]
    with pytest.raises(ValueError, match="Each visitor can have 2 runs at the same time"):
        slow.run(GenerationRequest(**SMALL), "one")
    runs += [slow.run(GenerationRequest(**SMALL), visitor) for visitor in ("two", "", "", "")]
    assert isinstance(list(runs[0])[-1], Finished)
    runs.append(slow.run(GenerationRequest(**SMALL), "one"))
    for run in runs:
        next(run, None)
        run.close()


def test_the_log_says_what_happened_and_not_to_whom(session, caplog):
    with caplog.at_level("INFO", logger="ardiff"):
        run_id = list(session.run(GenerationRequest(**SMALL, seed=12345), "ada@example.org"))[-1].run_id
    line = json.loads(JsonFormatter().format(caplog.records[-1]))
    seconds = line.pop("seconds")
    assert 0 < seconds < 60
    assert {name: line[name] for name in LOG_FIELDS if name in line} == {
        "event": "run_ended", "run": run_id[:8], "outcome": "finished", "frames": 6, "steps": 6, "model": "tiny",
    }  # fmt: skip
    assert not [word for word in ("ada", "12345", run_id) if word in json.dumps(line)]


def peak_bytes(run) -> int:
    """The most that was allocated at the same time while `run()` ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    told = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([event.nbytes() for event in sorted(told, key=lambda event: event.start_ns())]).max())


def test_the_memory_of_a_run_is_estimated():
    pipeline = ARDiffPipeline.from_pretrained(bundled_model(), dtype=torch.float32)
    session = Session({"scenes": lambda: pipeline}, warm_up=False)
    for num_frames, gap, guidance in ((16, 0, 1.0), (16, 0, 2.0), (6, 5, 2.0)):
        request = GenerationRequest(
            scene="clouds", num_frames=num_frames, num_inference_steps=5, ar_step=gap, guidance_scale=guidance
        )
        model, plan = session.first, session._plan(request).numpy()
        estimate = model.run_memory(plan, 0, session._is_guided(request, model))
        measured = peak_bytes(lambda request=request: deque(pipeline.stream(**session.arguments(request)), maxlen=1))
        assert 0.5 < estimate / measured < 2, (num_frames, gap, guidance, estimate, measured)
    session.close()


def test_a_run_that_does_not_fit_is_refused_before_it_starts(session, monkeypatch):
    monkeypatch.setattr(session, "free_memory", lambda model: (1000, 2**30))
    with pytest.raises(ValueError, match="would take about 0.0 GB of memory and 0.0 GB are free; choose a larger gap"):
        session.run(GenerationRequest(**SMALL))


def test_runs_that_cannot_work_are_refused_at_once(session):
    with pytest.raises(ValueError, match="scene"):
        session.run(GenerationRequest(**SMALL, scene="volcano"))
    with pytest.raises(ValueError, match="must be at least"):
        session.run(GenerationRequest(num_frames=session.first.window + 1, num_inference_steps=20, ar_step=0))
    assert not session._live


def test_too_many_visitors_are_asked_to_wait(slow):
    runs = [slow.run(GenerationRequest(**SMALL))]
    wait_until(lambda: slow._running is not None)
    runs += [slow.run(GenerationRequest(**SMALL)) for _ in range(slow.limits.queue)]
    with pytest.raises(ValueError, match="waiting already"):
        slow.run(GenerationRequest(**SMALL))
    for run in runs:
        next(run)
        run.close()


def test_uploads_become_prompt_frames(session, tmp_path):
    clip = np.random.default_rng(1).integers(0, 256, (12, 40, 60, 3), dtype=np.uint8)
    size = session.first.image_size
    Image.fromarray(clip[0]).save(tmp_path / "a.png")
    Image.fromarray(clip[1]).save(tmp_path / "b.JPG")
    write_video(clip, tmp_path / "clip.mp4")
    assert session.read_prompt([]) is None
    assert session.read_prompt([tmp_path / "a.png", tmp_path / "b.JPG"]).frames.shape == (2, size, size, 3)
    assert session.read_prompt([tmp_path / "clip.mp4"]).frames.shape == (8, size, size, 3)


def test_bad_uploads_get_one_clear_sentence(session, tmp_path):
    still = np.zeros((32, 32, 3), np.uint8)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "fake.png").write_text("hello")
    (tmp_path / "fake.mp4").write_text("hello")
    (tmp_path / "empty.mp4").touch()
    Image.new("1", (8000, 5001)).save(tmp_path / "huge.png")
    write_video(np.repeat(still[None], 600, 0), tmp_path / "long.mp4", fps=8)
    write_video(still[None], tmp_path / "one.mp4")
    Image.fromarray(still).save(tmp_path / "ok.png")
    bad = {
        ("notes.txt",): "neither a picture",
        ("fake.png",): "cannot be read as a picture",
        ("fake.mp4",): "cannot be read as a video",
        ("empty.mp4",): "is empty",
        ("huge.png",): "40 megapixels",
        ("long.mp4",): "lasts 75 s; at most 60 s",
        ("ok.png", "one.mp4"): "pictures or one video",
        ("ok.png",) * 9: "at most 8",
    }
    for names, words in bad.items():
        with pytest.raises(ValueError, match=words) as caught:
            session.read_prompt([tmp_path / name for name in names])
        assert str(caught.value).count("\n") == 0
        assert str(caught.value).endswith(".")


def test_an_upload_is_shown_while_another_visitor_runs(slow):
    run = slow.run(GenerationRequest(**{**SMALL, "num_inference_steps": 60}))
    while not isinstance(next(run), Progress):
        pass
    prompt = Prompt(np.zeros((1, slow.first.image_size, slow.first.image_size, 3), np.uint8), "black")
    assert slow.prompt_preview(prompt)[0].shape == (slow.first.image_size, slow.first.image_size, 3)
    assert slow._running is not None
    run.close()


def test_old_runs_are_swept_and_close_removes_everything(session):
    finished = [list(session.run(GenerationRequest(**SMALL, seed=seed)))[-1] for seed in range(2)]
    session.store.sweep(max_age=3600)
    assert all(event.video.is_file() for event in finished)
    session.store.sweep(max_age=-1)
    assert not any(event.video.exists() for event in finished)
    session.close()
    assert not session.store.runs.exists()


def test_speed_is_measured_and_learned(tiny_pipeline):
    session = Session({"tiny": lambda: tiny_pipeline})
    before = (session.first.cost.call, session.first.cost.frame)
    wait_until(lambda: (session.first.cost.call, session.first.cost.frame) != before)
    assert 0 < session.first.cost.frame < 1
    assert 0 < session.first.cost.call < 1
    request = GenerationRequest(**SMALL)
    list(session.run(request))
    # Rough on purpose: other programs share the machine.
    assert 0.05 < session._seconds_ahead(request, session.first)[0] / list(session.run(request))[-1].seconds < 20
    session.close()


def test_the_global_random_state_is_left_alone(session):
    before = torch.get_rng_state()
    list(session.run(GenerationRequest(**SMALL, seed=1)))
    assert torch.equal(before, torch.get_rng_state())
