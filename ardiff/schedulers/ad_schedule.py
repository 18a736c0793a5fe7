"""The AD schedule: how many denoising steps every frame has had after every iteration. Integers only.

Closed form: step_index[r, f] = clamp(r - offset[f], 0, N), offset = cumulative sum of the gaps between neighbours.
Shapes: R iterations, F frames (prompt frames included), N inference steps. Row r - 1 of a plan is iteration r.
Paper: section 3.3, asynchronous denoising scheduler.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from numbers import Integral

import torch


PROFILES = ("even", "chunks", "ramp")
"""Shapes of a plan that `profile_gaps` makes: one gap for all, chunks that follow each other, gaps that grow."""


@dataclass(frozen=True, kw_only=True)
class PlanCounts:
    """What a plan costs, counted from its rows.

    Attributes:
        iterations: network calls, one per row.
        frame_evaluations: frames the network evaluates: updates + commits + one for every prompt frame.
        commits: finished new frames that are evaluated once more as finished, because a later frame still needs
            their keys and values. Prompt frames are not in this number.
        first_frame_iteration: 1-based iteration in which the first new frame is finished.
        max_in_flight: the most frames that are updated in one iteration.
    """

    iterations: int
    frame_evaluations: int
    commits: int
    first_frame_iteration: int
    max_in_flight: int


def ad_schedule(
    num_frames: int, num_inference_steps: int, ar_step: int | Sequence[int], *, num_prompt_frames: int = 0
) -> torch.Tensor:
    """Step index of every frame after every iteration, shape (iterations, num_frames), int64.

    0 = pure noise, `num_inference_steps` = clean. The row before the first iteration (0 for new frames) is not in it.

    Args:
        num_frames: all frames, prompt frames included, >= 1.
        num_inference_steps: denoising steps of a new frame, >= 1.
        ar_step: lag of a frame behind its left neighbour in [0, `num_inference_steps`]; or one lag for every new frame
            after the first, `num_frames - num_prompt_frames - 1` of them.
        num_prompt_frames: given frames, clean in every row, in [0, `num_frames` - 1].

    Raises:
        ValueError: an argument is not an integer or outside its range.
    """
    gaps = _check_plan(num_frames, num_inference_steps, ar_step, num_prompt_frames)
    if isinstance(gaps, int):
        gaps = [gaps] * (num_frames - num_prompt_frames - 1)
    offset = torch.tensor([0, *gaps], dtype=torch.int64).cumsum(0)
    iteration = torch.arange(1, num_inference_steps + int(offset[-1]) + 1)
    new_frames = (iteration[:, None] - offset).clamp(0, num_inference_steps)
    prompt_frames = new_frames.new_full((len(iteration), num_prompt_frames), num_inference_steps)
    return torch.cat([prompt_frames, new_frames], dim=1)


@dataclass(frozen=True)
class PlanRow:
    """One iteration, in which the frames [`start`, `stop`) are updated.

    Attributes:
        start, stop: frame indices, prompt frames counted; the frames before `start` are finished.
        steps: the denoising steps these frames have had so far, in [0, N - 1], never increasing.
        num_finished: frames that are finished after the iteration.
    """

    start: int
    stop: int
    steps: tuple[int, ...]
    num_finished: int


class ADPlan:
    """The plan of `ad_schedule` row by row and never written out, so that a long video's plan takes no memory.

    `plan[r]` is row r of the table that `ad_schedule` gives, `len(plan)` the number of its rows.

    Args: as for `ad_schedule`; with `num_frames` None the plan has no end, and `ar_step` must be one int >= 1.

    Raises:
        ValueError: an argument is not an integer or outside its range.
    """

    def __init__(
        self,
        num_frames: int | None,
        num_inference_steps: int,
        ar_step: int | Sequence[int],
        *,
        num_prompt_frames: int = 0,
    ) -> None:
        if num_frames is None:
            _check_integer("ar_step", ar_step, 1, None)
        gaps = _check_plan(num_frames, num_inference_steps, ar_step, num_prompt_frames)
        self.num_frames = num_frames
        self.num_inference_steps = num_inference_steps
        self.num_prompt_frames = num_prompt_frames
        self._gap = gaps if isinstance(gaps, int) else None
        self._offsets = None if isinstance(gaps, int) else list(accumulate(gaps, initial=0))

    def _offset(self, new_frame: int) -> int:
        return new_frame * self._gap if self._offsets is None else self._offsets[new_frame]

    def __len__(self) -> int:
        if self.num_frames is None:
            raise TypeError("A plan without end has no length.")
        return self.num_inference_steps + self._offset(self.num_frames - self.num_prompt_frames - 1)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.step_index(row, 0, self.num_frames)

    def step_index(self, row: int, first: int, stop: int) -> torch.Tensor:
        """Step indices of the frames [`first`, `stop`) after row `row`, shape (`stop` - `first`,), int64."""
        num_prompts = min(max(self.num_prompt_frames - first, 0), stop - first)
        new_frame = torch.arange(first + num_prompts, stop) - self.num_prompt_frames
        offset = new_frame * self._gap if self._offsets is None else torch.tensor(self._offsets)[new_frame]
        steps = (row + 1 - offset).clamp(0, self.num_inference_steps)
        return torch.cat([steps.new_full((num_prompts,), self.num_inference_steps), steps])

    def rows(self) -> Iterator[PlanRow]:
        """The iterations in order."""
        num_prompts, num_steps = self.num_prompt_frames, self.num_inference_steps
        start = stop = num_prompts
        for done in count():
            while stop != self.num_frames and self._offset(stop - num_prompts) <= done:
                stop += 1
            while start < stop and done - self._offset(start - num_prompts) == num_steps:
                start += 1
            if start == stop:
                return
            steps = tuple(done - self._offset(frame - num_prompts) for frame in range(start, stop))
            yield PlanRow(start, stop, steps, start + steps.count(num_steps - 1))

    @property
    def max_in_flight(self) -> int:
        """The most frames that are updated in one iteration."""
        if self._offsets is None and self._gap:
            most = -(-self.num_inference_steps // self._gap)
            return most if self.num_frames is None else min(most, self.num_frames - self.num_prompt_frames)
        return max(row.stop - row.start for row in self.rows())


def _check_plan(
    num_frames: int | None, num_inference_steps: int, ar_step: int | Sequence[int], num_prompt_frames: int
) -> int | list[int]:
    """The gaps of a plan as ints: one for all new frames, or one for every new frame after the first."""
    if num_frames is not None:
        _check_integer("num_frames", num_frames, 1, None)
    _check_integer("num_inference_steps", num_inference_steps, 1, None)
    _check_integer("num_prompt_frames", num_prompt_frames, 0, None if num_frames is None else num_frames - 1)
    if not isinstance(ar_step, Sequence) or isinstance(ar_step, str):
        _check_integer("ar_step", ar_step, 0, num_inference_steps)
        return int(ar_step)
    num_gaps = num_frames - num_prompt_frames - 1
    if len(ar_step) != num_gaps:
        raise ValueError(
            f"`ar_step` must be one int or have one gap for every new frame after the first, {num_gaps} here, but "
            f"has {len(ar_step)}."
        )
    for index, gap in enumerate(ar_step):
        _check_integer(f"ar_step[{index}]", gap, 0, num_inference_steps)
    return [int(gap) for gap in ar_step]


def profile_gaps(
    profile: str, *, gap: int, chunk: int, num_new_frames: int, num_inference_steps: int
) -> int | tuple[int, ...]:
    """The `ar_step` of a profile: an int for "even", else one gap per new frame after the first.

    Args:
        profile: "even"; "chunks", `chunk` frames together and the next ones when these are clean; or "ramp", gaps that
            grow from 0 to `gap` in equal steps, rounded half up.
        gap: in [0, `num_inference_steps`], of no effect for "chunks". chunk: frames of a chunk, >= 1, of effect for
            "chunks" alone. num_new_frames, num_inference_steps: >= 1.

    Raises:
        ValueError: another profile, or an argument out of its range.
    """
    _check_integer("num_new_frames", num_new_frames, 1, None)
    _check_integer("num_inference_steps", num_inference_steps, 1, None)
    count = num_new_frames - 1
    if profile == "chunks":
        _check_integer("chunk", chunk, 1, None)
        return tuple(0 if frame % chunk else num_inference_steps for frame in range(1, num_new_frames))
    _check_integer("gap", gap, 0, num_inference_steps)
    if profile == "ramp":
        return tuple(
            (2 * gap * index + count - 1) // (2 * (count - 1)) if count > 1 else gap for index in range(count)
        )
    if profile == "even":
        return gap
    raise ValueError(f"`profile` must be one of {', '.join(PROFILES)} but is {profile!r}.")


def smallest_gap(window: int, num_inference_steps: int) -> int:
    """Smallest int `ar_step` with which any number of frames keeps at most `window` (>= 1) of them in flight."""
    _check_integer("window", window, 1, None)
    _check_integer("num_inference_steps", num_inference_steps, 1, None)
    return -(-num_inference_steps // window)


def check_window(schedule: torch.Tensor | ADPlan, window: int, *, num_prompt_frames: int | None = None) -> None:
    """Refuse a plan that updates more than `window` frames in one iteration.

    Args:
        schedule: a plan, or the table of one, shape (iterations, num_frames).
        window: how many frames a frame can see, itself included, >= 1.
        num_prompt_frames: of a table, as in `plan_counts`.

    Raises:
        ValueError: names the smallest gap that works.
    """
    _check_integer("window", window, 1, None)
    if isinstance(schedule, ADPlan):
        in_flight, num_steps, num_frames = schedule.max_in_flight, schedule.num_inference_steps, schedule.num_frames
    else:
        in_flight = int(_updates(schedule, num_prompt_frames).sum(1).max())
        num_steps, num_frames = int(schedule[-1, -1]), schedule.shape[1]
    if in_flight > window:
        raise ValueError(
            f"`ar_step` must be at least {smallest_gap(window, num_steps)} for {num_frames or 'endless'} frames at "
            f"{num_steps} steps: the model's window holds {window} frames but this plan has {in_flight} in flight at once."
        )


def plan_counts(schedule: torch.Tensor, *, num_prompt_frames: int | None = None) -> PlanCounts:
    """Count what a plan costs with cached keys and values.

    Args:
        schedule: a plan of `ad_schedule`, shape (iterations, num_frames).
        num_prompt_frames: None reads it from the plan: frames that are clean in the first row. With one inference
            step a new frame is clean there too, and None then takes every frame as new: pass the number.
    """
    updates = _updates(schedule, num_prompt_frames)
    num_inference_steps = schedule[-1, -1]
    new_frames = updates.any(0)
    # argmax of a boolean column is its first True; the last frame is never ahead, so it tells if anyone is unfinished.
    finished_row = (schedule == num_inference_steps).long().argmax(0)
    committed = new_frames & (schedule[finished_row, -1] < num_inference_steps)
    num_prompts = int((~new_frames).sum())
    return PlanCounts(
        iterations=schedule.shape[0],
        frame_evaluations=int(updates.sum()) + int(committed.sum()) + num_prompts,
        commits=int(committed.sum()),
        first_frame_iteration=int(finished_row[num_prompts]) + 1,
        max_in_flight=int(updates.sum(1).max()),
    )


def _updates(schedule: torch.Tensor, num_prompt_frames: int | None) -> torch.Tensor:
    """Which frames change in which iteration, bool, shape (iterations, num_frames)."""
    num_inference_steps = int(schedule[-1, -1])
    if num_prompt_frames is None:
        clean_at_once = int((schedule[0] == num_inference_steps).sum())
        num_prompt_frames = clean_at_once if num_inference_steps > 1 else 0
    _check_integer("num_prompt_frames", num_prompt_frames, 0, schedule.shape[1] - 1)
    before = torch.zeros_like(schedule[:1])
    before[:, :num_prompt_frames] = num_inference_steps
    return schedule != torch.cat([before, schedule[:-1]])


def _check_integer(name: str, value: int, low: int, high: int | None) -> None:
    allowed = f">= {low}" if high is None else f"in [{low}, {high}]"
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be an integer {allowed} but is {value!r}.")
    if value < low or (high is not None and value > high):
        raise ValueError(f"`{name}` must be {allowed} but is {value}.")
