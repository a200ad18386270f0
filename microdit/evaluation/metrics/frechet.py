"""Frechet distance between Gaussians fitted to the features of two image sets (FID, Heusel et al. 2017, arXiv 1706.08500).

- The trace of the matrix square root is computed without inverses or complex numbers, and is exact for singular covariances too.
- A finite sample biases the distance upwards: `frechet_infinity` removes that bias, and `frechet_interval` estimates the sampling error.
  Both need the distances of many subsets, so the samples are projected onto the root of the reference covariance once.

The computation uses numpy on the CPU, which computes only one half of x.T @ x and decomposes matrices at least as fast as torch.

Shapes: N samples, S in a subset, D features, R the rank of a covariance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from microdit.errors import UserError
from microdit.evaluation.metrics import check_same_dimensions, float64_features
from microdit.evaluation.metrics.bootstrap import Interval, half_sample_interval

_Matrix = NDArray[np.float64]
POINTS = 15  # subsets that `frechet_infinity` fits a line to
PRECISION = 1e-6  # largest relative error of a distance due to rounding


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and unbiased covariance (D, D) of `count` feature vectors, both float64 on the CPU.

    `deviations` (D, N) are the centred features over (N - 1)^(1/2), kept where they are fewer than D: a root of the covariance already.
    """

    mean: Tensor
    covariance: Tensor
    count: int
    deviations: _Matrix | None = None

    @cached_property
    def root(self) -> _Matrix:
        """F (D, R) with F F^T = covariance."""
        return _root(self.covariance) if self.deviations is None else self.deviations


def fit_gaussian(features_ND: Tensor) -> Gaussian:
    """Fit mean and covariance. Raises UserError for fewer than 2 feature vectors or for features that are not finite."""
    features_ND = float64_features(features_ND).cpu()
    if len(features_ND) < 2:
        raise UserError(f"A covariance needs the features of at least 2 images, and there are {len(features_ND)}.")
    mean_D = features_ND.mean(dim=0)
    centred_ND = (features_ND - mean_D).numpy()  # centred before squaring: far from the origin, digits would be lost
    deviations_DN = centred_ND.T / (len(features_ND) - 1) ** 0.5
    covariance_DD = torch.from_numpy(centred_ND.T @ centred_ND / (len(features_ND) - 1))
    few = deviations_DN.shape[1] < deviations_DN.shape[0]
    return Gaussian(mean_D, covariance_DD, len(features_ND), deviations_DN if few else None)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), at least 0: equation 6 of arXiv 1706.08500, squared as in FID.

    Raises UserError if the dimensions of a and b differ.
    """
    check_same_dimensions(len(a.mean), len(b.mean))
    traces = float(a.covariance.trace() + b.covariance.trace())
    return _distance((a.mean - b.mean).numpy(), traces, a.root.T @ b.root, rank=min(a.count, b.count) - 1)


def sample_distance(features_ND: Tensor, reference: Gaussian) -> float:
    """Return the distance of the samples' Gaussian to `reference`, without a (D, D) covariance of the samples.

    Raises UserError for fewer than 2 samples, features that are not finite, or other dimensions than the reference's.
    """
    return _Projected(features_ND, reference).distance(torch.arange(len(features_ND)))


@dataclass(frozen=True)
class ExtrapolatedDistance:
    """Distance extrapolated to infinitely many samples, and the distances at finite `counts` that the line was fitted to."""

    distance: float
    counts: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_infinity(
    features_ND: Tensor,
    reference: Gaussian,
    points: int = POINTS,
    smallest: int | None = None,
    seed: int = 0,
    on_distance: Callable[[int], None] | None = None,
) -> ExtrapolatedDistance:
    """Extrapolate the distance to infinitely many samples: FID_infinity (Chong & Forsyth 2020, arXiv 1911.07023).

    The bias of FID is linear in 1/N where N is well above D, so a least-squares line in 1/N through the distances of `points` random
    subsets, of `smallest` to N samples, ends at zero bias. `smallest` defaults to N / 10, like the paper's 5,000 of 50,000. The estimate
    is unbiased, so near 0 it may be negative. The reference's own bias remains. `on_distance(1)` is called for each point. Raises
    UserError for fewer than 2 points, or if `smallest` is not in [2, N).
    """
    samples, total = _Projected(features_ND, reference, on_distance), len(features_ND)
    smallest = max(2, total // 10) if smallest is None else smallest
    if points < 2 or not 2 <= smallest < total:
        raise UserError(
            f"FID-infinity needs at least 2 subsets of 2 to {total - 1} of the {total} samples, not {points} of {smallest} or more."
        )
    generator = torch.Generator().manual_seed(seed)
    counts = [round(count) for count in np.linspace(smallest, total, points)]
    distances = [samples.distance(torch.randperm(total, generator=generator)[:count]) for count in counts]
    _, intercept = np.polyfit(1 / np.array(counts), distances, deg=1)
    return ExtrapolatedDistance(float(intercept), tuple(counts), tuple(distances))


def frechet_interval(
    features_ND: Tensor, reference: Gaussian, resamples: int = 50, seed: int = 0, on_distance: Callable[[int], None] | None = None
) -> Interval:
    """Return the distance to `reference` and a 95% interval for its expectation at this number of samples.

    The reference is treated as exact, and the bias of the finite sample is kept. There may be fewer samples than dimensions.
    `on_distance(1)` is called for the distance and for each of the `2 * resamples` halves. Raises UserError as `half_sample_interval`
    does.
    """
    samples = _Projected(features_ND, reference, on_distance)
    return half_sample_interval(samples.distance, torch.arange(len(features_ND)), resamples, seed)


def few_samples_warning(count: int, dimensions: int) -> str | None:
    """Return a warning if so few samples make a Frechet distance depend mostly on their number, else None."""
    if count > dimensions:
        return None
    return (
        f"{count} samples are too few for {dimensions} features: the covariance is singular, so the Frechet distance is far too high and "
        f"its extrapolation unreliable. Compare only distances of equal sample counts, use more than {dimensions} samples, or use KID."
    )


class _Projected:
    """Centred samples X and their projection X F onto the root F of the reference covariance.

    Up to a factor, the singular values of X F are the eigenvalues of (C_a C_b)^(1/2), so no covariance of a subset is decomposed.
    """

    def __init__(self, features_ND: Tensor, reference: Gaussian, on_distance: Callable[[int], None] | None = None):
        features_ND = float64_features(features_ND).cpu()
        check_same_dimensions(features_ND.shape[1], len(reference.mean))
        mean_D = features_ND.mean(dim=0)
        self._apart_D = (mean_D - reference.mean).numpy()
        self._reference_trace, self._reference_rank = float(reference.covariance.trace()), reference.count - 1
        self._centred_ND = (features_ND - mean_D).numpy()
        self._projected_NR = self._centred_ND @ reference.root
        self._squares_N = np.einsum("nd,nd->n", self._centred_ND, self._centred_ND)
        self._on_distance = on_distance

    def distance(self, rows_S: Tensor) -> float:
        """Return the same as `frechet_distance` for the Gaussian of these rows. Raises UserError for fewer than 2 rows."""
        rows, count = rows_S.numpy(), len(rows_S)
        if count < 2:
            raise UserError(f"A covariance needs the features of at least 2 images, and there are {count}.")
        mean_D = self._centred_ND[rows].mean(axis=0)
        trace = (self._squares_N[rows].sum() - count * mean_D @ mean_D) / (count - 1)
        projected_SR = self._projected_NR[rows]
        projected_SR -= projected_SR.mean(axis=0)
        projected_SR /= (count - 1) ** 0.5
        traces, rank = float(trace) + self._reference_trace, min(count - 1, self._reference_rank)
        found = _distance(self._apart_D + mean_D, traces, projected_SR, rank)
        if self._on_distance:
            self._on_distance(1)
        return found


def _distance(apart_D: _Matrix, traces: float, matrix: _Matrix, rank: int) -> float:
    """Compute the distance from the difference of means, the sum of covariance traces, and a matrix whose singular values are summed.

    The singular values of `matrix` are those of F_a^T F_b, where F F^T = C, that is, the eigenvalues of (C_a C_b)^(1/2); at most `rank`
    of them are positive. They are computed as roots of the eigenvalues of the smaller Gram matrix, several times faster than by an SVD.
    The root of an eigenvalue near 0 keeps only half of the digits, so an SVD is used where that would exceed PRECISION.
    """
    rows, columns = matrix.shape
    squares = np.linalg.eigvalsh(matrix.T @ matrix if columns <= rows else matrix @ matrix.T)
    roots = np.sqrt(squares[-min(rows, columns, rank) :].clip(min=0))
    without_roots = float(apart_D @ apart_D) + traces
    distance = without_roots - 2 * roots.sum()
    rounding = roots.max(initial=0) ** 2 * np.finfo(np.float64).eps  # error of each square; `lost` bounds the error of each root
    lost = rounding / np.maximum(2 * roots, rounding**0.5 or 1)
    if 2 * lost.sum() > PRECISION * distance:
        distance = without_roots - 2 * np.linalg.svd(matrix, compute_uv=False).sum()
    return max(0.0, float(distance))


def _root(covariance_DD: Tensor) -> _Matrix:
    """Return F (D, R) with F F^T = C: the Cholesky factor, or scaled eigenvectors of nonzero eigenvalues if C is numerically singular."""
    matrix_DD = covariance_DD.numpy()
    rounding = len(matrix_DD) * np.finfo(np.float64).eps
    try:
        factor_DD = np.linalg.cholesky(matrix_DD)
        if factor_DD.diagonal().min() ** 2 > rounding * matrix_DD.trace():
            return factor_DD
    except np.linalg.LinAlgError:
        pass
    eigenvalues_D, vectors_DD = np.linalg.eigh(matrix_DD)
    kept_D = eigenvalues_D > np.abs(eigenvalues_D).max() * rounding
    return vectors_DD[:, kept_D] * np.sqrt(eigenvalues_D[kept_D])
