"""The benchmark on the tiny pipeline: counters equal the formulas, contestants agree, and what it measures is what it says."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ardiff import ad_schedule, benchmark, cli
from ardiff.benchmark import Counters, LivePeak, build_pipeline, count_call


F, N = 5, 4


@pytest.fixture
def on_tiny(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(benchmark, "build_pipeline", lambda size, device: tiny_pipeline)


@pytest.mark.parametrize("gap", [0, 1, N])
def test_counters_and_agreement(on_tiny, gap):
    report = benchmark.benchmark(frames=[F], gaps=[gap], num_steps=N, rounds=2)
    (cell,) = report["cells"]
    calls, commits = len(ad_schedule(F, N, gap)), F - 1 if gap else 0
    expected = {
        "reference": (calls, F * calls, 0),
        "separate": (calls + commits, F * N + commits, commits),
        **dict.fromkeys(("merged", "table", "bfloat16"), (calls, F * N + commits, commits)),
    }
    for name, one in cell["contestants"].items():
        assert (one["forwards"], one["frame_evaluations"], one["commits"]) == expected.pop(name)
        assert one["total_s"][1] <= one["total_s"][0] <= one["total_s"][2]
        assert (one["interval_p50_s"] is None) == (gap == 0)
        assert one["peak_bytes"] > 0
        if name != "bfloat16":
            assert one["difference"] <= 1e-5
    assert expected == {}
    assert 1e-4 < cell["contestants"]["bfloat16"]["difference"] < 0.5
    assert cell["contestants"]["reference"]["times_faster"] == [1.0, 1.0, 1.0]


def test_memory_does_not_grow_with_the_video(tiny_pipeline):
    case = {"batch_size": 1, "gap": 1, "num_steps": 3}
    peaks = [benchmark.peak_bytes("table", tiny_pipeline, num_frames=frames, **case) for frames in (40, 80)]
    # What is kept here of every finished frame: four tokens of four channels.
    assert peaks[1] - peaks[0] <= 40 * 4 * 4 * 4 + 4096


@torch.no_grad()
def test_operations_are_those_that_run(tiny_transformer):
    """One frame behind a held one sees all of both, so that nothing is masked."""
    hidden_states, cache = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)), None
    cache = tiny_transformer.new_cache(3)
    modulation = tiny_transformer.modulate(torch.zeros(3, 1, dtype=torch.int64))
    tiny_transformer(hidden_states, cache=cache, num_commit=1, modulation=modulation)
    counters = Counters()
    count_call(counters, tiny_transformer, num_frames=1, num_held=1, num_commit=0)
    # The fused kernel of the CPU is not one that torch counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        tiny_transformer(hidden_states, cache=cache, modulation=modulation)
    assert 3 * counters.flops == counted.get_total_flops()


def test_live_peak_counts_what_lives():
    with LivePeak() as live:
        kept = torch.empty(1000)
        view = kept[:10]
        torch.empty(500)
        torch.empty(700)
        assert live.now == 4000
        del kept
        assert live.now == 4000
        del view
        assert live.now == 0
    assert live.peak == 4 * 1700


def test_command(on_tiny, capsys):
    assert (
        cli.main(["bench", "--frames", "3", "--steps", "2", "--rounds", "1", "--contestants", "merged", "table"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert [cell["gap"] for cell in report["cells"]] == [0, 1, 2]
    rows = [line.split() for line in lines[:-1]]
    counted = [row for row in rows if row[:1] == ["3"] and len(row) == 9]
    assert [int(row[4]) for row in counted if row[2] == "table"] == [6, 8, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "`rounds` must be at least 1 but is 0"),
        ({"threads": 0}, "`threads` must be at least 1 but is 0"),
        ({"contestants": ["table", "magic"]}, "`contestants` must be some of reference, .* but has .*magic"),
        ({"frames": [16, 40], "gaps": [1]}, "`ar_step` must be at least 4 for 40 frames"),
    ],
)
def test_bad_input_is_one_clear_sentence(on_tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark.benchmark(**arguments)


def test_the_published_size():
    with pytest.raises(ValueError, match="`size` must be one of mini, published but is 'huge'"):
        build_pipeline("huge", "cpu")
    pipe = build_pipeline("published", "meta")
    blocks = sum(parameter.numel() for parameter in pipe.transformer.blocks.parameters())
    assert blocks == 28 * (12 * 1152**2 + 9 * 1152 + 6 * 1152)
    assert (pipe.vae.config.image_size, pipe.vae.config.num_tokens) == (256, pipe.transformer.config.num_tokens)
