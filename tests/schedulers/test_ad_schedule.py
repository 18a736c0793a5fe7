"""The plan against the paper's frame-by-frame rule, its laws, and its counts against a walk over the rows."""

import itertools

import pytest
import torch

from ardiff.schedulers.ad_schedule import (
    PROFILES,
    ADPlan,
    ad_schedule,
    check_window,
    plan_counts,
    profile_gaps,
    smallest_gap,
)


def paper_rule(num_frames, num_steps, gaps, num_prompt_frames):
    """Row after row, frame after frame, as the paper's algorithm states it; `gaps` has one entry per new frame but one."""
    rows = [[num_steps] * num_prompt_frames + [0] * (num_frames - num_prompt_frames)]
    while rows[-1] != [num_steps] * num_frames:
        before, row = rows[-1], [num_steps] * num_prompt_frames
        for frame in range(num_prompt_frames, num_frames):
            if frame == num_prompt_frames or before[frame - 1] == num_steps:
                index = before[frame] + 1
            else:
                index = row[frame - 1] - gaps[frame - num_prompt_frames - 1]
            row.append(min(max(index, 0), num_steps))
        rows.append(row)
    return rows[1:]


def small_plans():
    for num_frames, num_steps in itertools.product(range(1, 7), range(1, 8)):
        for num_prompt_frames, ar_step in itertools.product(range(num_frames), range(num_steps + 1)):
            yield num_frames, num_steps, ar_step, num_prompt_frames


def uneven_plans(num_plans=150):
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_plans):
        num_frames = int(torch.randint(1, 8, (), generator=generator))
        num_steps = int(torch.randint(1, 9, (), generator=generator))
        num_prompt_frames = int(torch.randint(num_frames, (), generator=generator))
        num_gaps = num_frames - num_prompt_frames - 1
        gaps = torch.randint(num_steps + 1, (num_gaps,), generator=generator).tolist()
        yield num_frames, num_steps, gaps, num_prompt_frames


def with_start_row(plan, num_steps, num_prompt_frames):
    start = torch.zeros_like(plan[:1])
    start[:, :num_prompt_frames] = num_steps
    return torch.cat([start, plan])


def test_equals_the_papers_rule_for_every_small_plan():
    for num_frames, num_steps, ar_step, num_prompt_frames in small_plans():
        plan = ad_schedule(num_frames, num_steps, ar_step, num_prompt_frames=num_prompt_frames)
        expected = paper_rule(num_frames, num_steps, [ar_step] * num_frames, num_prompt_frames)
        assert plan.dtype == torch.int64
        assert plan.tolist() == expected, (num_frames, num_steps, ar_step, num_prompt_frames)


def test_uneven_gaps_equal_the_papers_rule():
    for num_frames, num_steps, gaps, num_prompt_frames in uneven_plans():
        plan = ad_schedule(num_frames, num_steps, gaps, num_prompt_frames=num_prompt_frames)
        assert plan.tolist() == paper_rule(num_frames, num_steps, gaps, num_prompt_frames)


def test_laws_of_uneven_gaps():
    for num_frames, num_steps, gaps, num_prompt_frames in uneven_plans():
        plan = ad_schedule(num_frames, num_steps, gaps, num_prompt_frames=num_prompt_frames)
        rows = with_start_row(plan, num_steps, num_prompt_frames)
        advance = rows.diff(dim=0)
        assert len(plan) == num_steps + sum(gaps)
        assert set(advance.unique().tolist()) <= {0, 1}
        assert (advance[:, num_prompt_frames:].sum(0) == num_steps).all()
        assert (advance[:, :num_prompt_frames] == 0).all()
        assert (rows.diff(dim=1) <= 0).all(), "a frame is ahead of an earlier one"
        assert (rows[-1] == num_steps).all()
        assert advance.any(1).all(), "an iteration that advances nobody"


@pytest.mark.parametrize("ar_step", [0, 1, 3, 5])
def test_equal_gaps_equal_the_int(ar_step):
    expected = ad_schedule(6, 5, ar_step, num_prompt_frames=2)
    assert torch.equal(ad_schedule(6, 5, [ar_step] * 3, num_prompt_frames=2), expected)
    assert torch.equal(ad_schedule(6, 5, (ar_step,) * 3, num_prompt_frames=2), expected)


def test_chunk_by_chunk():
    assert ad_schedule(4, 2, [0, 2, 0]).tolist() == [[1, 1, 0, 0], [2, 2, 0, 0], [2, 2, 1, 1], [2, 2, 2, 2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ar_step": -1}, r"`ar_step` must be in \[0, 5\] but is -1"),
        ({"ar_step": 6}, r"`ar_step` must be in \[0, 5\] but is 6"),
        ({"ar_step": True}, r"`ar_step` must be an integer .* but is True"),
        ({"ar_step": 1.0}, r"`ar_step` must be an integer .* but is 1.0"),
        ({"ar_step": "3"}, r"`ar_step` must be an integer .* but is '3'"),
        ({"ar_step": [1, 1]}, r"`ar_step` must be one int or have one gap .* 3 here, but has 2"),
        ({"ar_step": [1, 1, 1, 1]}, r"3 here, but has 4"),
        ({"ar_step": [0, -1, 2]}, r"`ar_step\[1\]` must be in \[0, 5\] but is -1"),
        ({"ar_step": [0, 1, 6]}, r"`ar_step\[2\]` must be in \[0, 5\] but is 6"),
        ({"ar_step": [0, 1, False]}, r"`ar_step\[2\]` must be an integer"),
        ({"ar_step": [0, 1, 2.0]}, r"`ar_step\[2\]` must be an integer"),
        ({"num_prompt_frames": 4}, r"`num_prompt_frames` must be in \[0, 3\] but is 4"),
        ({"num_prompt_frames": -1}, r"`num_prompt_frames` must be in \[0, 3\] but is -1"),
        ({"num_frames": 0}, r"`num_frames` must be >= 1 but is 0"),
        ({"num_frames": 4.0}, r"`num_frames` must be an integer"),
        ({"num_inference_steps": 0}, r"`num_inference_steps` must be >= 1 but is 0"),
        ({"num_inference_steps": True}, r"`num_inference_steps` must be an integer"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ad_schedule(**{"num_frames": 4, "num_inference_steps": 5, "ar_step": 1, **arguments})


def test_smallest_gap_is_the_smallest_that_keeps_a_long_video_in_the_window():
    assert smallest_gap(16, 50) == 4
    for window, num_steps in itertools.product(range(1, 9), range(1, 13)):
        num_frames = 3 * window + 2
        working = [
            gap
            for gap in range(num_steps + 1)
            if plan_counts(ad_schedule(num_frames, num_steps, gap)).max_in_flight <= window
        ]
        assert smallest_gap(window, num_steps) == working[0]


def test_a_plan_row_by_row_is_the_table():
    for num_frames, num_steps, ar_step, num_prompts in itertools.chain(small_plans(), uneven_plans()):
        table = ad_schedule(num_frames, num_steps, ar_step, num_prompt_frames=num_prompts)
        plan, rows = ADPlan(num_frames, num_steps, ar_step, num_prompt_frames=num_prompts), []
        before = with_start_row(table, num_steps, num_prompts)
        for index, row in enumerate(plan.rows()):
            assert torch.equal(plan[index], table[index])
            assert (before[index] != table[index]).nonzero().flatten().tolist() == list(range(row.start, row.stop))
            assert before[index, row.start : row.stop].tolist() == list(row.steps)
            assert row.num_finished == int((table[index] == num_steps).sum())
            rows.append(row)
        assert len(rows) == len(plan) == len(table)
        assert plan.max_in_flight == max(row.stop - row.start for row in rows)


def test_a_plan_without_end_is_a_long_plan_that_goes_on():
    for gap, num_prompts in itertools.product((1, 3, 7), (0, 2)):
        endless, long = (ADPlan(frames, 7, gap, num_prompt_frames=num_prompts) for frames in (None, 50))
        assert endless.max_in_flight == long.max_in_flight
        for index, (row, expected) in enumerate(zip(endless.rows(), itertools.islice(long.rows(), 40), strict=False)):
            assert row == expected
            assert torch.equal(endless.step_index(index, 1, row.stop), long[index][1 : row.stop])
    for ar_step in (0, [1, 2]):
        with pytest.raises(ValueError, match="`ar_step` must be"):
            ADPlan(None, 7, ar_step)
    with pytest.raises(ValueError, match="`ar_step` must be at least 4 for endless frames at 50 steps"):
        check_window(ADPlan(None, 50, 3), 16)


def test_check_window_names_the_gap_that_works():
    message = (
        r"`ar_step` must be at least 4 for 40 frames at 50 steps: .* holds 16 frames but this plan has 17 in flight"
    )
    with pytest.raises(ValueError, match=message):
        check_window(ad_schedule(40, 50, 3), 16)
    check_window(ad_schedule(40, 50, 4), 16)


def test_check_window_counts_only_frames_in_flight():
    check_window(ad_schedule(16, 50, 0), 16)
    check_window(ad_schedule(20, 50, 0, num_prompt_frames=4), 16)
    check_window(ad_schedule(4, 5, [0, 5, 0]), 2)
    with pytest.raises(ValueError, match="4 in flight"):
        check_window(ad_schedule(4, 5, [0, 1, 0]), 2)
    with pytest.raises(ValueError, match="`window` must be >= 1"):
        check_window(ad_schedule(4, 5, 1), 0)


def walked_counts(num_frames, num_steps, gaps, num_prompt_frames):
    """Walk the paper's rows: evaluate what moves, and a finished frame once more while a later one still moves."""
    rows = paper_rule(num_frames, num_steps, gaps, num_prompt_frames)
    before = [num_steps] * num_prompt_frames + [0] * (num_frames - num_prompt_frames)
    updates = commits = max_in_flight = 0
    first = None
    for iteration, row in enumerate(rows, start=1):
        moving = [frame for frame in range(num_frames) if row[frame] != before[frame]]
        updates += len(moving)
        max_in_flight = max(max_in_flight, len(moving))
        for frame in moving:
            if row[frame] == num_steps:
                first = first or iteration
                commits += any(row[later] < num_steps for later in range(frame + 1, num_frames))
        before = row
    return len(rows), updates + commits + num_prompt_frames, commits, first, max_in_flight


def as_tuple(counts):
    return (
        counts.iterations,
        counts.frame_evaluations,
        counts.commits,
        counts.first_frame_iteration,
        counts.max_in_flight,
    )


def test_plan_counts_equal_a_walk_over_the_rows():
    plans = [(f, n, [gap] * (f - p - 1), p) for f, n, gap, p in small_plans()]
    for num_frames, num_steps, gaps, num_prompt_frames in [*plans, *uneven_plans()]:
        plan = ad_schedule(num_frames, num_steps, gaps, num_prompt_frames=num_prompt_frames)
        expected = walked_counts(num_frames, num_steps, gaps, num_prompt_frames)
        assert as_tuple(plan_counts(plan, num_prompt_frames=num_prompt_frames)) == expected
        if num_steps > 1:
            assert as_tuple(plan_counts(plan)) == expected, "prompt frames not read from the plan"


@pytest.mark.parametrize("num_frames", [1, 2, 16, 40])
@pytest.mark.parametrize("ar_step", [0, 1, 5, 50])
@pytest.mark.parametrize("num_prompt_frames", [0, 1, 4])
def test_plan_counts_formula(num_frames, ar_step, num_prompt_frames):
    counts = plan_counts(ad_schedule(num_frames + num_prompt_frames, 50, ar_step, num_prompt_frames=num_prompt_frames))
    commits = num_frames - 1 if ar_step else 0
    assert counts.frame_evaluations == num_frames * 50 + commits + num_prompt_frames
    assert counts.commits == commits
    assert counts.iterations == 50 + ar_step * (num_frames - 1)
    assert counts.first_frame_iteration == 50
    assert counts.max_in_flight == min(num_frames, -(-50 // ar_step) if ar_step else num_frames)


def gaps(profile, frames, *, gap=5, chunk=3, steps=50):
    return profile_gaps(profile, gap=gap, chunk=chunk, num_new_frames=frames, num_inference_steps=steps)


def test_profiles_are_what_they_say():
    assert gaps("even", 9) == 5
    assert gaps("chunks", 8) == (0, 0, 50, 0, 0, 50, 0)
    assert gaps("chunks", 4, chunk=1) == (50, 50, 50)
    assert gaps("chunks", 4, chunk=9) == (0, 0, 0)
    assert gaps("ramp", 6, gap=10) == (0, 3, 5, 8, 10)
    assert gaps("ramp", 2) == (5,)
    assert gaps("ramp", 1) == gaps("chunks", 1) == ()


@pytest.mark.parametrize("profile", PROFILES[1:])
@pytest.mark.parametrize("frames", [1, 2, 5, 16])
def test_every_profile_is_a_plan(profile, frames):
    plan = ad_schedule(frames, 12, gaps(profile, frames, gap=7, chunk=4, steps=12))
    assert (plan[-1] == 12).all()
    assert (plan[:, :-1] >= plan[:, 1:]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"profile": "drawn"}, "one of even, chunks, ramp but is 'drawn'"),
        ({"profile": "chunks", "chunk": 0}, "`chunk` must be >= 1 but is 0"),
        ({"profile": "ramp", "gap": 51}, "`gap` must be in \\[0, 50\\] but is 51"),
        ({"profile": "even", "frames": 0}, "`num_new_frames` must be >= 1"),
    ],
)
def test_profiles_out_of_range_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        gaps(**{"frames": 8, **change})
