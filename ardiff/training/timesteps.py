"""Training timesteps, one per frame: the FoPP sampler of the paper, its baselines, and rows of real plans.

All return int64 (B, F) in [0, T), B clips, F frames, T training timesteps, and draw only from `generator` (CPU).
FoPP (section 3.2): a uniform anchor (frame, timestep), then a uniformly random non-decreasing sequence through it.

The number of ways to go on decides the next frame. With m frames left beyond it and v = its distance from the end of
the range, there are C(v + m, m) ways, so those with distance <= v number C(v + m + 1, m + 1): the CDF is a closed form.
It is kept as a float64 logarithm (lgamma): no number of frames overflows; relative error about 1e-12 for 64 frames.
"""

import math

import torch


# Share of synchronous clips (lag 0) in `sample_lagged`: one end of the sampling range must not go unseen.
SYNCHRONOUS_SHARE = 0.2


def sample_fopp(
    batch_size: int, num_frames: int, num_train_timesteps: int, *, generator: torch.Generator
) -> torch.Tensor:
    """Non-decreasing timesteps (batch_size, num_frames), int64: the paper's FoPP law, exact.

    An anchor frame and its timestep are uniform; given them, all non-decreasing sequences through them are equally
    likely. All sizes are >= 1.
    """
    _check_sizes(batch_size, num_frames, num_train_timesteps)
    last = num_train_timesteps - 1
    anchor_frame = torch.randint(num_frames, (batch_size,), generator=generator)
    anchor = torch.randint(num_train_timesteps, (batch_size,), generator=generator)
    timesteps = anchor[:, None].repeat(1, num_frames)
    for frame in range(1, num_frames):
        log_counts = _log_counts(num_frames - 1 - frame, num_train_timesteps)
        drawn = last - _draw_distance(log_counts, last - timesteps[:, frame - 1], generator)
        timesteps[:, frame] = torch.where(frame > anchor_frame, drawn, timesteps[:, frame])
    for frame in range(num_frames - 2, -1, -1):
        drawn = _draw_distance(_log_counts(frame, num_train_timesteps), timesteps[:, frame + 1], generator)
        timesteps[:, frame] = torch.where(frame < anchor_frame, drawn, timesteps[:, frame])
    return timesteps


def sample_incremental(
    batch_size: int, num_frames: int, num_train_timesteps: int, *, generator: torch.Generator
) -> torch.Tensor:
    """Non-decreasing timesteps (batch_size, num_frames), int64, uniform over all non-decreasing sequences.

    The plain baseline of the paper: early frames are almost never noisy and late ones almost never clean.
    """
    _check_sizes(batch_size, num_frames, num_train_timesteps)
    last = num_train_timesteps - 1
    distance = torch.full((batch_size,), last)
    columns = []
    for frame in range(num_frames):
        distance = _draw_distance(_log_counts(num_frames - 1 - frame, num_train_timesteps), distance, generator)
        columns.append(last - distance)
    return torch.stack(columns, dim=1)


def sample_synchronous(
    batch_size: int, num_frames: int, num_train_timesteps: int, *, generator: torch.Generator
) -> torch.Tensor:
    """One uniform timestep per clip, the same for all its frames, (batch_size, num_frames), int64."""
    _check_sizes(batch_size, num_frames, num_train_timesteps)
    return torch.randint(num_train_timesteps, (batch_size, 1), generator=generator).repeat(1, num_frames)


def sample_independent(
    batch_size: int, num_frames: int, num_train_timesteps: int, *, generator: torch.Generator
) -> torch.Tensor:
    """An independent uniform timestep per frame (Diffusion Forcing), (batch_size, num_frames), int64."""
    _check_sizes(batch_size, num_frames, num_train_timesteps)
    return torch.randint(num_train_timesteps, (batch_size, num_frames), generator=generator)


def sample_lagged(
    batch_size: int, num_frames: int, num_train_timesteps: int, *, generator: torch.Generator
) -> torch.Tensor:
    """Rows of random AD plans, (batch_size, num_frames), int64, non-decreasing: what sampling shows to the model.

    Timestep of frame f is clamp(u + lag * f, 0, T - 1). The lag of a clip, in timesteps per frame, is 0 with probability
    `SYNCHRONOUS_SHARE` and otherwise log-uniform over 1..T: P(lag) = log((lag + 1) / lag) / log(T + 1).
    u is uniform over 1 - lag * (F - 1)..T - 1: every row of that plan, from all frames at T - 1 to the last one at
    timestep 1, equally often; so the last frame is never at 0. `num_train_timesteps` is >= 2, the other sizes >= 1.
    """
    _check_sizes(batch_size, num_frames, num_train_timesteps, least_timesteps=2)
    last = num_train_timesteps - 1
    synchronous, lag_draw, row_draw = torch.rand((3, batch_size), generator=generator, dtype=torch.float64)
    lag = torch.exp(lag_draw * math.log(num_train_timesteps + 1)).long().clamp(1, num_train_timesteps)
    lag = torch.where(synchronous < SYNCHRONOUS_SHARE, 0, lag)
    num_rows = last + lag * (num_frames - 1)
    first_frame = last - (row_draw * num_rows).long()
    return (first_frame[:, None] + lag[:, None] * torch.arange(num_frames)).clamp(0, last)


def _log_counts(num_left: int, num_train_timesteps: int) -> torch.Tensor:
    """log C(v + m + 1, m + 1) for distance v = 0..T - 1 and m = `num_left` further frames, float64, shape (T,)."""
    distance = torch.arange(num_train_timesteps, dtype=torch.float64)
    return (distance + num_left + 2).lgamma() - (distance + 1).lgamma() - math.lgamma(num_left + 2)


def _draw_distance(log_counts: torch.Tensor, limit: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a distance in [0, limit] for every clip, P(distance <= v) = exp(log_counts[v] - log_counts[limit])."""
    uniform = torch.rand(limit.shape, generator=generator, dtype=torch.float64)
    drawn = torch.searchsorted(log_counts, uniform.log() + log_counts[limit], right=True)
    return torch.minimum(drawn, limit)  # a uniform draw next to 1 may round up to the limit's own count


def _check_sizes(batch_size: int, num_frames: int, num_train_timesteps: int, least_timesteps: int = 1) -> None:
    sizes = {"batch_size": (batch_size, 1), "num_frames": (num_frames, 1)}
    sizes["num_train_timesteps"] = (num_train_timesteps, least_timesteps)
    for name, (size, least) in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < least:
            raise ValueError(f"`{name}` must be an integer >= {least} but is {size!r}.")
