"""The samplers against their exact laws: brute enumeration where it is small, closed forms where it is not."""

import itertools
import math
from collections import Counter

import pytest
import torch

from ardiff.training.timesteps import (
    SYNCHRONOUS_SHARE,
    sample_fopp,
    sample_incremental,
    sample_independent,
    sample_lagged,
    sample_synchronous,
)


ORDERED = [sample_fopp, sample_incremental, sample_lagged, sample_synchronous]
SAMPLERS = [*ORDERED, sample_independent]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_counts_follow(counts, law, num_draws):
    """Chi-square over all outcomes, within 5 standard deviations of its mean; fixed seeds, so it never flickers."""
    assert math.isclose(sum(law.values()), 1, rel_tol=1e-9)
    assert min(law.values()) * num_draws > 5, "too few draws for a chi-square"
    assert not set(counts) - set(law), "an outcome that the law does not have"
    chi_square = sum((counts[key] - num_draws * p) ** 2 / (num_draws * p) for key, p in law.items())
    freedom = len(law) - 1
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def counted(timesteps):
    return Counter(map(tuple, timesteps.tolist()))


def all_non_decreasing(num_frames, num_train_timesteps):
    return list(itertools.combinations_with_replacement(range(num_train_timesteps), num_frames))


def fopp_law(num_frames, num_train_timesteps):
    """An anchor (frame, timestep) is uniform, and so is the sequence among those that pass through it."""
    sequences = all_non_decreasing(num_frames, num_train_timesteps)
    through = Counter((frame, timestep) for sequence in sequences for frame, timestep in enumerate(sequence))
    num_anchors = num_frames * num_train_timesteps
    return {
        sequence: sum(1 / through[frame, timestep] for frame, timestep in enumerate(sequence)) / num_anchors
        for sequence in sequences
    }


def fopp_marginal(frame, num_frames, num_train_timesteps):
    """P(timestep of `frame` = t) from the counts of ways to go on, S, and of ways to come, P."""
    last_frame, last = num_frames - 1, num_train_timesteps - 1

    def S(t, f):
        return math.comb(last - t + last_frame - f, last_frame - f)

    def P(t, f):
        return math.comb(t + f, f)

    law = dict.fromkeys(range(num_train_timesteps), 0.0)
    for anchor, u in itertools.product(range(num_frames), range(num_train_timesteps)):
        between = abs(frame - anchor) - 1
        if frame == anchor:
            law[u] += 1
        elif frame > anchor:
            for t in range(u, num_train_timesteps):
                law[t] += math.comb(t - u + between, between) * S(t, frame) / S(u, anchor)
        else:
            for t in range(u + 1):
                law[t] += math.comb(u - t + between, between) * P(t, frame) / P(u, anchor)
    return {t: weight / (num_frames * num_train_timesteps) for t, weight in law.items()}


def fopp_mean(frame, num_frames, num_train_timesteps):
    """Between two ends, the i-th of n ordered timesteps lies at i / (n + 1) of the way on average."""
    middle = (num_train_timesteps - 1) / 2
    share = [
        1 + (frame - anchor) / (num_frames - anchor) if frame >= anchor else (frame + 1) / (anchor + 1)
        for anchor in range(num_frames)
    ]
    return middle * sum(share) / num_frames


@pytest.mark.parametrize(("num_frames", "num_train_timesteps"), [(4, 10), (3, 2), (2, 7), (6, 4)])
def test_fopp_joint_law(num_frames, num_train_timesteps):
    num_draws = 200_000
    timesteps = sample_fopp(num_draws, num_frames, num_train_timesteps, generator=seeded())
    assert timesteps.dtype == torch.int64
    assert_counts_follow(counted(timesteps), fopp_law(num_frames, num_train_timesteps), num_draws)


def test_fopp_marginals():
    num_draws, num_frames, num_train_timesteps = 100_000, 7, 40
    timesteps = sample_fopp(num_draws, num_frames, num_train_timesteps, generator=seeded(1))
    for frame in range(num_frames):
        law = fopp_marginal(frame, num_frames, num_train_timesteps)
        assert_counts_follow(Counter(timesteps[:, frame].tolist()), law, num_draws)


@pytest.mark.parametrize("num_frames", [16, 64])
def test_fopp_means_at_full_size(num_frames):
    num_draws = 40_000
    timesteps = sample_fopp(num_draws, num_frames, 1000, generator=seeded(2)).double()
    expected = torch.tensor([fopp_mean(frame, num_frames, 1000) for frame in range(num_frames)], dtype=torch.float64)
    deviation = (timesteps.mean(0) - expected) / (timesteps.std(0) / math.sqrt(num_draws))
    assert deviation.abs().max() < 5
    if num_frames == 16:
        rounded = [105, 182, 245, 300]
        assert torch.allclose(expected[:4], torch.tensor(rounded, dtype=torch.float64), rtol=0, atol=1)
        assert 160 < timesteps.std(0).min() < timesteps.std(0).max() < 275


def test_incremental_is_uniform_over_all_non_decreasing_sequences():
    sequences = all_non_decreasing(4, 10)
    timesteps = sample_incremental(200_000, 4, 10, generator=seeded(3))
    assert_counts_follow(counted(timesteps), dict.fromkeys(sequences, 1 / len(sequences)), 200_000)


def test_incremental_means_at_full_size():
    timesteps = sample_incremental(40_000, 16, 1000, generator=seeded(4)).double()
    expected = torch.arange(1, 17) * 999 / 17
    assert ((timesteps.mean(0) - expected) / (timesteps.std(0) / 200)).abs().max() < 5


def test_synchronous_and_independent_laws():
    law = {(t, t, t): 1 / 8 for t in range(8)}
    assert_counts_follow(counted(sample_synchronous(20_000, 3, 8, generator=seeded(5))), law, 20_000)
    law = dict.fromkeys(itertools.product(range(6), repeat=3), 1 / 6**3)
    assert_counts_follow(counted(sample_independent(40_000, 3, 6, generator=seeded(6))), law, 40_000)


def test_lagged_law():
    """A lag (0, or log-uniform over 1..T), then every row of its plan equally often, but the one that is all clean."""
    num_frames, num_train_timesteps, num_draws = 3, 6, 200_000
    lags = {0: SYNCHRONOUS_SHARE}
    for lag in range(1, num_train_timesteps + 1):
        lags[lag] = (1 - SYNCHRONOUS_SHARE) * math.log((lag + 1) / lag) / math.log(num_train_timesteps + 1)
    law = Counter()
    for lag, probability in lags.items():
        rows = [
            tuple(min(max(start + lag * frame, 0), num_train_timesteps - 1) for frame in range(num_frames))
            for start in range(-lag * (num_frames - 1), num_train_timesteps)
        ]
        rows = [row for row in rows if row[-1] > 0]
        for row in rows:
            law[row] += probability / len(rows)
    timesteps = sample_lagged(num_draws, num_frames, num_train_timesteps, generator=seeded(7))
    assert_counts_follow(counted(timesteps), law, num_draws)


def test_lagged_clips_have_one_lag():
    timesteps = sample_lagged(2000, 16, 1000, generator=seeded(8))
    gaps = timesteps.diff(dim=1)
    inner = (timesteps[:, :-1] > 0) & (timesteps[:, 1:] < 999)
    largest = gaps.amax(1, keepdim=True)
    assert (gaps[inner] == largest.expand_as(gaps)[inner]).all()
    assert (timesteps[:, -1] > 0).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("num_frames", "num_train_timesteps"), [(1, 1000), (2, 2), (16, 1000), (64, 1000), (300, 5)])
def test_shape_range_and_order(sampler, num_frames, num_train_timesteps):
    timesteps = sampler(500, num_frames, num_train_timesteps, generator=seeded(9))
    assert timesteps.shape == (500, num_frames)
    assert timesteps.dtype == torch.int64
    assert 0 <= timesteps.min()
    assert timesteps.max() < num_train_timesteps
    if sampler in ORDERED:
        assert (timesteps.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("sampler", [sample_fopp, sample_incremental, sample_synchronous, sample_independent])
def test_a_single_frame_is_uniform(sampler):
    timesteps = sampler(20_000, 1, 50, generator=seeded(10))
    assert_counts_follow(Counter(timesteps[:, 0].tolist()), dict.fromkeys(range(50), 1 / 50), 20_000)


def test_a_single_timestep_is_zero():
    for sampler in (sample_fopp, sample_incremental):
        assert (sampler(5, 3, 1, generator=seeded()) == 0).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_the_generator_is_drawn_from(sampler):
    state = torch.get_rng_state()
    first = sampler(32, 8, 1000, generator=seeded(11))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, sampler(32, 8, 1000, generator=seeded(11)))
    assert not torch.equal(first, sampler(32, 8, 1000, generator=seeded(12)))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 4, 10), "`batch_size` must be an integer >= 1 but is 0"),
        ((2.0, 4, 10), "`batch_size` must be an integer >= 1 but is 2.0"),
        ((2, 0, 10), "`num_frames` must be an integer >= 1 but is 0"),
        ((2, True, 10), "`num_frames` must be an integer >= 1 but is True"),
        ((2, 4, 0), "`num_train_timesteps` must be an integer >= . but is 0"),
    ],
)
def test_wrong_sizes_are_refused(sampler, sizes, message):
    with pytest.raises(ValueError, match=message):
        sampler(*sizes, generator=seeded())


def test_lagged_needs_two_timesteps():
    with pytest.raises(ValueError, match="`num_train_timesteps` must be an integer >= 2 but is 1"):
        sample_lagged(2, 4, 1, generator=seeded())
