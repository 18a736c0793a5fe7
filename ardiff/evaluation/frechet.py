"""Frechet distance between Gaussians fitted to two sets of feature vectors, in float64.

Shapes: n vectors in a set, D features. The distance is squared (as in FID and FVD): |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)).
With fewer vectors than features the covariances are singular: that is allowed. The estimate grows as n gets smaller, so
distances are comparable only between sets of the same sizes.
"""

import torch


def frechet_distance(features: torch.Tensor, other: torch.Tensor) -> float:
    """Squared Frechet distance between the Gaussians of two sets of vectors, (n, D) and (n', D), >= 0.

    Raises:
        ValueError: a set is not a matrix of at least 2 finite vectors, or the numbers of features differ.
    """
    for name, vectors in (("features", features), ("other", other)):
        if vectors.ndim != 2 or len(vectors) < 2:
            raise ValueError(
                f"`{name}` must have shape (clips, features) with at least 2 clips but has {tuple(vectors.shape)}."
            )
        if not bool(vectors.isfinite().all()):
            raise ValueError(
                f"`{name}` must be finite but has {int((~vectors.isfinite()).sum())} entries that are not."
            )
    if features.shape[1] != other.shape[1]:
        raise ValueError(
            f"`other` must have {features.shape[1]} features, as `features` has, but has {other.shape[1]}."
        )
    return gaussian_distance(*_moments(features), *_moments(other))


def bootstrap_interval(
    features: torch.Tensor, other: torch.Tensor, *, num_draws: int = 100, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """An interval around the Frechet distance of two sets for how much it varies with the clips that happen to be in them.

    Clips of both sets are drawn anew with replacement, all vectors of a clip together. A drawn set has repeated clips, so
    its distances are larger on the whole than that of the sets (the estimate grows as n gets smaller): the quantiles of
    their deviations from their own mean are laid around the sets' distance. The interval is one of the spread at these
    sizes, and keeps the bias of the estimate, as any distance of that many clips does.

    Args:
        features, other: (n, D), or (n, k, D) with k vectors of each clip.
        num_draws: at least 2. level: in (0, 1).

    Raises:
        ValueError: see `frechet_distance`, or an argument is out of range.
    """
    if num_draws < 2 or not 0.0 < level < 1.0:
        raise ValueError(f"`num_draws` must be at least 2 and `level` in (0, 1) but are {num_draws} and {level}.")
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(num_draws):
        drawn = [
            vectors[torch.randint(len(vectors), (len(vectors),), generator=generator)] for vectors in (features, other)
        ]
        draws.append(frechet_distance(*(vectors.flatten(0, -2) for vectors in drawn)))
    draws = torch.tensor(draws, dtype=torch.float64)
    tails = torch.tensor([(1.0 - level) / 2.0, (1.0 + level) / 2.0], dtype=torch.float64)
    distance = frechet_distance(features.flatten(0, -2), other.flatten(0, -2))
    low, high = (distance + torch.quantile(draws - draws.mean(), tails)).tolist()
    return max(low, 0.0), high


def gaussian_distance(
    mean: torch.Tensor, covariance: torch.Tensor, other_mean: torch.Tensor, other_covariance: torch.Tensor
) -> float:
    """Squared Frechet distance between two Gaussians: means (D,), symmetric positive semi-definite covariances (D, D)."""
    roots = _root(covariance.double()) @ _root(other_covariance.double())
    # With A, A' the roots: tr (C C')^(1/2) = tr (A C' A)^(1/2) = tr ((A A') (A A')^T)^(1/2), the sum of the singular values
    # of A A'. No root of a small eigenvalue is taken, so a singular covariance costs no digits.
    shared = torch.linalg.svdvals(roots).sum()
    apart = (mean.double() - other_mean.double()).square().sum()
    distance = apart + covariance.double().trace() + other_covariance.double().trace() - 2.0 * shared
    return max(float(distance), 0.0)  # rounding can leave -1e-15


def _moments(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) and unbiased covariance (D, D), float64."""
    vectors = vectors.double()
    mean = vectors.mean(0)
    centred = vectors - mean
    return mean, centred.T @ centred / (len(vectors) - 1)


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """Symmetric square root of a symmetric matrix whose eigenvalues are >= 0 up to rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
