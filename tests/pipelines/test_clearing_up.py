"""The moving picture of `examples/clearing_up.py`: its clock, and what it shows."""

import clearing_up
import numpy as np
import pytest
import torch
from PIL import Image

from ardiff import ad_schedule
from ardiff.schedulers.ad_schedule import plan_counts


@pytest.fixture
def arguments():
    return {"class_labels": [0], "num_frames": 4, "num_inference_steps": 6, "guidance_scale": 1.0}


def run(pipe, count, arguments, gap):
    generator = torch.Generator().manual_seed(0)
    return list(clearing_up.moments(pipe, count, arguments | {"ar_step": gap, "generator": generator}))


@pytest.mark.parametrize("gap", [0, 2, 6])
def test_a_moment_is_an_even_part_of_the_work(tiny_pipeline, arguments, gap):
    plan = ad_schedule(4, 6, gap)
    total = plan_counts(plan).frame_evaluations
    generator = torch.Generator().manual_seed(0)
    steps = list(tiny_pipeline.stream(**arguments, ar_step=gap, generator=generator))
    done = np.cumsum([step.frame_evaluations for step in steps])
    assert done[-1] == total
    found = run(tiny_pipeline, 5, arguments, gap)
    for part, moment in enumerate(found, start=1):
        # The first call by which so much is done.
        assert moment.calls == 1 + int((done * 5 >= part * total).argmax())
        assert moment.noise_level.tolist() == steps[moment.calls - 1].noise_level.tolist()
        assert moment.num_finished == int((plan[moment.calls - 1] == 6).sum())
    assert len(found) == 5
    assert found[-1].num_finished == 4
    finished = [frame for step in steps for _, frame in step.finished]
    np.testing.assert_array_equal(found[-1].guesses, finished)


def test_more_moments_than_calls_repeat_them(tiny_pipeline, arguments):
    assert [moment.calls for moment in run(tiny_pipeline, 12, arguments, 0)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


def test_noise_is_grain_and_a_bar(tiny_pipeline, arguments):
    rows = {gap: run(tiny_pipeline, 3, arguments, gap)[1] for gap in (0, 6)}
    picture = np.asarray(clearing_up.draw(rows, 0)).astype(int)
    left, top = clearing_up.MARGIN * 2 + clearing_up.PLAYER, clearing_up.MARGIN + clearing_up.TITLE + 4
    side, space = clearing_up.TILE, clearing_up.SPACE
    below = top + clearing_up.PLAYER + clearing_up.MARGIN + clearing_up.TITLE
    accent = np.array([184, 63, 22])
    for row, y in zip(rows.values(), (top, below), strict=True):
        for index, level in enumerate(row.noise_level):
            x = left + index * (side + space)
            frame = Image.fromarray(row.guesses[index]).resize((side, side), Image.Resampling.LANCZOS)
            covered = np.abs(picture[y : y + side, x : x + side] - np.asarray(frame)).mean()
            assert (covered == 0) == (level == 0)
            bar = (picture[y + side + 5, x : x + side] == accent).all(-1).sum()
            assert bar == (round(level * (side - 1)) + 1 if level > 0 else 0)
    assert (picture == picture[0, 0]).all(-1).mean() > 0.2


def test_the_command_writes_the_picture(tiny_pipeline, tmp_path, monkeypatch):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    out = tmp_path / "out.webp"
    given = (
        f"x --model {tmp_path / 'model'} --scene clouds --gaps 0 3 --num-frames 4 --steps 3 --pictures 6 --out {out}"
    )
    monkeypatch.setattr("sys.argv", given.split())
    clearing_up.main()
    with Image.open(out) as picture:
        assert (picture.format, picture.n_frames) == ("WEBP", 6 + 4)
