"""Requests and settings: what a visitor asks for, written down and read back."""

import json

import numpy as np
import pytest

from ardiff.demo.presets import (
    FrameReady,
    GenerationRequest,
    Preview,
    Prompt,
    event_json,
    read_settings,
)


def random_prompt(count: int = 2, size: int = 8) -> Prompt:
    return Prompt(
        np.random.default_rng(count).integers(0, 256, (count, size, size, 3), dtype=np.uint8), "a.png, b c.png"
    )


REQUESTS = [
    GenerationRequest(),
    GenerationRequest(
        scene="clouds", num_frames=9, ar_step=0, num_inference_steps=20, guidance_scale=1.5, seed=2**32 - 1
    ),
    GenerationRequest(num_frames=5, ar_step=(0, 50, 3, 1)),
    GenerationRequest(prompt=random_prompt(), num_frames=6, num_inference_steps=7, ar_step=(7, 0, 2), seed=5),
]


def test_gaps_of_a_request_are_checked():
    assert GenerationRequest(num_frames=4, ar_step=[0, 1, 2]).ar_step == (0, 1, 2)
    for wrong, words in (
        ((1, 2), "3 here, got 2"),
        ((1, 2, 51), "got 51"),
        ((1, 2, -1), "got -1"),
        ((1, 2, True), "True"),
    ):
        with pytest.raises(ValueError, match=words):
            GenerationRequest(num_frames=4, ar_step=wrong)
    with pytest.raises(ValueError, match="1 here"):
        GenerationRequest(num_frames=4, ar_step=(1, 2, 3), prompt=random_prompt())


@pytest.mark.parametrize("request_", REQUESTS)
def test_settings_restore_every_field(request_):
    again = read_settings(json.dumps(request_.settings()))
    for name in vars(request_):
        if name != "prompt":
            assert getattr(again, name) == getattr(request_, name), name
    assert (again.prompt is None) == (request_.prompt is None)
    if request_.prompt is not None:
        assert again.prompt.source == request_.prompt.source
        np.testing.assert_array_equal(again.prompt.frames, request_.prompt.frames)
    assert again.settings() == request_.settings()


def test_settings_with_a_result_are_read_and_all_else_is_refused():
    good = GenerationRequest(prompt=random_prompt(), seed=4).settings()
    assert read_settings(json.dumps({**good, "seconds": 1.0, "model": "m", "finished_frames": 3})).seed == 4
    bad = {
        "nonsense": "JSON object",
        "[1]": "JSON object",
        json.dumps({**good, "colour": 1}): "unknown entry 'colour'",
        json.dumps({key: value for key, value in good.items() if key != "seed"}): "lacks the entry 'seed'",
        json.dumps({**good, "seed": "7"}): "seed",
        json.dumps({**good, "scene": ["x"]}): "scene",
        json.dumps({**good, "guidance_scale": "high"}): "guidance",
        json.dumps({**good, "ar_step": [1]}): "13 here, got 1",
        json.dumps({**good, "ar_step": None}): "timestep gap",
        json.dumps({**good, "prompt": {"source": "x", "frames": ["data:image/png;base64,AAAA"]}}): "cannot be read",
        json.dumps({**good, "prompt": {"source": "x", "frames": []}}): "cannot be read",
        json.dumps({**good, "prompt": 3}): "cannot be read",
        " " * (8 * 2**20 + 1): "at most 8 MB",
    }
    for text, words in bad.items():
        with pytest.raises(ValueError, match=words) as caught:
            read_settings(text)
        assert str(caught.value).endswith(".")


def test_prompt_frames_are_picked_in_order():
    prompt = random_prompt(4)
    picked = prompt.pick([2, 0])
    np.testing.assert_array_equal(picked.frames, prompt.frames[[2, 0]])
    for order in ([], [0, 0], [4], [-1]):
        with pytest.raises(ValueError, match="order"):
            prompt.pick(order)


def test_events_are_json():
    frame = np.zeros((4, 4, 3), np.uint8)
    told = json.loads(json.dumps([event_json(FrameReady("a", 1, frame)), event_json(Preview("a", ((2, frame),)))]))
    assert told[0]["event"] == "FrameReady"
    assert told[0]["frame"].startswith("data:image/png;base64,")
    assert told[1]["frames"][0][0] == 2
