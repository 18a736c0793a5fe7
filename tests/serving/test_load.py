"""Twenty visitors at once: nothing mixed, nothing leaked, everyone in turn, and the page answers meanwhile."""

import sys
import time
from pathlib import Path

import pytest
import torch
from load import Figures, alone, measure, request, served, slope, summary

from ardiff.serving.limits import PRESETS


VISITORS = PRESETS["laptop"].queue


def test_the_summary_sees_what_goes_wrong():
    figures = Figures(runs={0: 3, 1: 1}, mixed=["one"], places=[[2, 1, 0], [1, 2]], waits=[1.0, 2.0])
    figures.answers = {"page": [0.1] * 95 + [2.0] * 5}
    figures.samples = [(second, 100 + second, 10 + second // 30) for second in range(120)]
    told = summary(figures)
    assert (told["runs"], told["mixed"], told["places_that_went_up"], told["runs_of_a_visitor"]) == (4, 1, 1, [1, 3])
    assert told["memory_mib_per_minute"] == pytest.approx(60)
    assert told["threads_per_minute"] > 1
    assert told["p95_ms"]["all"] > 100
    assert slope([(second, 7.0) for second in range(60)]) == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_twenty_visitors_for_twenty_seconds(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "tiny")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    asked = [request(seed, scene=scene, gap=gap) for seed, (scene, gap) in enumerate([("balls", 0), ("clouds", 2), ("no scene", 5)])]  # fmt: skip
    wanted = [(data, alone(None, data, tiny_pipeline)) for data in asked]
    torch.set_num_threads(before)
    assert len({tuple(frames) for _, frames in wanted}) == 3
    command = [sys.executable, "app.py", "--device", "cpu", "--model", str(tmp_path / "tiny")]
    with served(command, tmp_path / "studio.log", threads=1) as (process, url):
        begun = time.monotonic()
        figures = measure(process, url, 20.0, VISITORS, wanted)
        assert time.monotonic() - begun < 120
    told = summary(figures)
    assert not figures.mixed
    assert not figures.failed
    assert not figures.refused
    assert told["runs"] >= VISITORS
    assert told["runs_of_a_visitor"][1] - told["runs_of_a_visitor"][0] <= 2  # in turn
    assert told["runs_that_saw_a_place"] >= VISITORS - 1
    assert told["places_that_went_up"] == 0
    assert told["p95_ms"]["all"] < 300
    assert told["threads"][2] < 100
    assert Path(tmp_path / "studio.log").stat().st_size < 1_000_000
