"""The Frechet distance against scipy's matrix root, closed forms, and its laws."""

import pytest
import scipy.linalg
import torch

from ardiff.evaluation.frechet import bootstrap_interval, frechet_distance, gaussian_distance


def draw(generator: torch.Generator, num_clips: int, num_features: int, scale: float = 1.0) -> torch.Tensor:
    """Vectors whose features are correlated and of very different size."""
    mix = torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)
    size = torch.logspace(-2, 1, num_features, dtype=torch.float64)
    return scale * torch.randn(num_clips, num_features, generator=generator, dtype=torch.float64) @ mix * size + scale


def covariance(generator: torch.Generator, num_features: int, rank: int) -> torch.Tensor:
    factor = torch.randn(num_features, rank, generator=generator, dtype=torch.float64)
    return factor @ factor.T


def test_equals_the_formula_with_scipys_matrix_root(generator):
    a, b = draw(generator, 60, 12), draw(generator, 50, 12, scale=1.5)
    root = scipy.linalg.sqrtm((a.T.cov() @ b.T.cov()).numpy()).real
    expected = (a.mean(0) - b.mean(0)).square().sum() + (a.T.cov() + b.T.cov()).trace() - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_equal_covariances_leave_the_squared_distance_of_the_means(generator):
    a = draw(generator, 40, 8)
    shift = torch.randn(8, generator=generator, dtype=torch.float64)
    assert frechet_distance(a, a + shift) == pytest.approx(float(shift.square().sum()), abs=1e-6)


def test_commuting_covariances_have_a_closed_form():
    mean, other_mean = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, -1.0])
    variance, other_variance = torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 9.0, 25.0])
    expected = 1.0 + 9.0 + (2 - 1) ** 2 + (1 - 3) ** 2 + (0 - 5) ** 2
    distance = gaussian_distance(mean, variance.diag(), other_mean, other_variance.diag())
    assert distance == pytest.approx(expected, abs=1e-12)


def test_orthogonal_singular_covariances_share_nothing():
    mean, variance = torch.zeros(2), torch.tensor([4.0, 0.0])
    assert gaussian_distance(mean, variance.diag(), mean, variance.flip(0).diag()) == pytest.approx(8.0, abs=1e-12)


def test_same_singular_covariance_turned_is_found_by_scaling(generator):
    # C' = 9 C: the root of the product is 3 C, so the distance is (3 - 1)^2 tr C, at any rank.
    matrix = covariance(generator, 20, rank=5)
    mean = torch.zeros(20)
    assert gaussian_distance(mean, matrix, mean, 9 * matrix) == pytest.approx(4 * float(matrix.trace()), rel=1e-12)


@pytest.mark.parametrize("num_clips", [2, 5, 200])
def test_a_set_is_at_distance_zero_from_itself(generator, num_clips):
    a = draw(generator, num_clips, 30)
    assert 0.0 <= frechet_distance(a, a) <= 1e-6


@pytest.mark.parametrize(("num_clips", "num_others"), [(5, 7), (100, 60)])
def test_symmetric_and_blind_to_order(generator, num_clips, num_others):
    a, b = draw(generator, num_clips, 20), draw(generator, num_others, 20)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a.flip(0), b) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_float32_features_are_measured_in_float64(generator):
    # Far from the origin: in float32 the covariance would be lost in rounding.
    a = (draw(generator, 50, 6) * 0.01 + 100.0).float()
    b = (draw(generator, 50, 6) * 0.01 + 100.0).float()
    assert frechet_distance(a, b) == frechet_distance(a.double(), b.double())


def test_many_draws_of_known_gaussians_come_to_their_closed_form(generator):
    factor, other_factor = (torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    noise, other_noise = (torch.randn(200_000, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    covariances = (factor @ factor.T).numpy(), (other_factor @ other_factor.T).numpy()
    root = scipy.linalg.sqrtm(scipy.linalg.sqrtm(covariances[0]) @ covariances[1] @ scipy.linalg.sqrtm(covariances[0]))
    expected = 9.0 * 5 + (covariances[0] + covariances[1] - 2 * root.real).trace()
    found = frechet_distance(noise @ factor.T, other_noise @ other_factor.T + 3.0)
    assert found == pytest.approx(float(expected), rel=0.01)


def test_interval_is_as_wide_as_the_distances_of_new_sets_vary(generator):
    def sets():
        return [torch.randn(150, 4, generator=generator, dtype=torch.float64) + shift for shift in (0.0, 0.5)]

    distances, widths = [], []
    for _ in range(60):
        a, b = sets()
        low, high = bootstrap_interval(a, b, num_draws=60)
        distances.append(frechet_distance(a, b))
        assert low <= distances[-1] <= high
        widths.append(high - low)
    expected = 2 * 1.96 * float(torch.tensor(distances).std())
    assert sum(widths) / len(widths) == pytest.approx(expected, rel=0.25)


def test_interval_lies_around_the_distance_though_drawn_sets_are_farther_apart(generator):
    a, b = (torch.randn(24, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    distance, (low, high) = frechet_distance(a, b), bootstrap_interval(a, b)
    assert 0.2 * (high - low) < distance - low < 0.8 * (high - low)


def test_interval_draws_clips_with_all_their_frames(generator):
    a, b = draw(generator, 40, 3), draw(generator, 40, 3)
    repeated = a[:, None].expand(-1, 8, -1), b[:, None].expand(-1, 8, -1)
    low, high = bootstrap_interval(a, b, seed=3)
    assert bootstrap_interval(a, b, seed=3) == (low, high)
    assert bootstrap_interval(a, b, seed=4) != (low, high)
    # Eight equal frames of a clip tell no more than one: an interval of 320 free vectors would be far narrower.
    clips_low, clips_high = bootstrap_interval(*repeated, seed=3)
    assert clips_high - clips_low == pytest.approx(high - low, rel=0.05)
    loose_low, loose_high = bootstrap_interval(*(vectors.flatten(0, 1) for vectors in repeated), seed=3)
    assert loose_high - loose_low < 0.6 * (high - low)


@pytest.mark.parametrize(("num_draws", "level"), [(1, 0.95), (10, 0.0), (10, 1.0)])
def test_interval_refuses_what_has_none(num_draws, level):
    with pytest.raises(ValueError, match="`num_draws` must be at least 2 and `level` in"):
        bootstrap_interval(torch.zeros(3, 2), torch.zeros(3, 2), num_draws=num_draws, level=level)


@pytest.mark.parametrize(
    ("features", "other", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(4, 3), r"`features` must have shape .* at least 2 clips but has \(1, 3\)"),
        (torch.zeros(4, 3), torch.zeros(4, 3, 1), r"`other` must have shape .* but has \(4, 3, 1\)"),
        (torch.zeros(4, 3), torch.zeros(4, 2), "`other` must have 3 features, as `features` has, but has 2"),
        (torch.full((4, 3), torch.nan), torch.zeros(4, 3), "`features` must be finite but has 12 entries"),
    ],
)
def test_refuses_what_has_no_distance(features, other, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(features, other)
