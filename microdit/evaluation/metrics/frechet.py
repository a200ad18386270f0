"""Frechet distance between Gaussians fitted to the features of two sets of pictures (FID, Heusel et al. 2017, arXiv 1706.08500).

- The trace of the matrix square root needs no inverse and no complex numbers: it is right for singular covariances too.
- A finite sample lifts the distance: `frechet_infinity` removes that bias, and `frechet_interval` says how far chance moves it. Both take
  the distances of many subsets, for which the samples are projected onto the root of the reference's covariance once.

By numpy on the CPU: of x.T @ x it computes only one half, and its decompositions are as fast as those of torch or faster.

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
from microdit.evaluation.metrics.bootstrap import Interval, half_sample_interval
from microdit.evaluation.metrics.feature_matrix import float64_features, refuse_other_dimensions

_Matrix = NDArray[np.float64]
POINTS = 15  # of the line of `frechet_infinity`
PRECISION = 1e-6  # the share of a distance that rounding may cost at most


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and unbiased covariance (D, D), both float64 on the CPU, of `count` feature vectors."""

    mean: Tensor
    covariance: Tensor
    count: int

    @cached_property
    def root(self) -> _Matrix:
        """F (D, R) with F F^T = covariance."""
        return _root(self.covariance)


def fit_gaussian(features_ND: Tensor) -> Gaussian:
    """Raises UserError for fewer than 2 feature vectors, which have no covariance, or for features that are not finite."""
    features_ND = float64_features(features_ND).cpu()
    if len(features_ND) < 2:
        raise UserError(f"A covariance needs the features of at least 2 pictures, and there are {len(features_ND)}.")
    mean_D = features_ND.mean(dim=0)
    centred_ND = (features_ND - mean_D).numpy()  # before it is squared, so that far from the origin no digits are lost
    return Gaussian(mean_D, torch.from_numpy(centred_ND.T @ centred_ND / (len(features_ND) - 1)), len(features_ND))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), equation 6 of arXiv 1706.08500: squared, as FID is. Never below 0.

    Raises UserError if a and b are of different D.
    """
    refuse_other_dimensions(len(a.mean), len(b.mean))
    traces = float(a.covariance.trace() + b.covariance.trace())
    return _distance((a.mean - b.mean).numpy(), traces, a.root.T @ b.root)


def sample_distance(features_ND: Tensor, reference: Gaussian) -> float:
    """The distance of the samples' Gaussian, fast where there are fewer samples than features. Raises UserError as its parts do."""
    return _Projected(features_ND, reference).distance(torch.arange(len(features_ND)))


@dataclass(frozen=True)
class ExtrapolatedDistance:
    """`distance` for infinitely many samples, and the distances at finite `counts` through which the line was laid."""

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
    """FID_infinity (Chong & Forsyth 2020, arXiv 1911.07023): the bias of FID is linear in 1/N, so a line through FIDs ends at 0 bias.

    `points` random subsets of `smallest` (a tenth of N, as the paper's 5,000 of 50,000) to N samples; least squares in 1/N. The bias is
    linear only where N is well above D. About 0 the result may be negative: it is unbiased, not a distance. The reference's own bias
    stays. `on_distance(1)` is called for each point. Raises UserError for fewer than 2 points, or if `smallest` does not lie in [2, N).
    """
    samples, total = _Projected(features_ND, reference, on_distance), len(features_ND)
    smallest = max(2, total // 10) if smallest is None else smallest
    if points < 2 or not 2 <= smallest < total:
        raise UserError(
            f"FID-infinity needs at least 2 subsets, of 2 to {total - 1} of the {total} samples: not {points} from {smallest} upwards."
        )
    generator = torch.Generator().manual_seed(seed)
    counts = [round(count) for count in np.linspace(smallest, total, points)]
    distances = [samples.distance(torch.randperm(total, generator=generator)[:count]) for count in counts]
    _, intercept = np.polyfit(1 / np.array(counts), distances, deg=1)
    return ExtrapolatedDistance(float(intercept), tuple(counts), tuple(distances))


def frechet_interval(
    features_ND: Tensor, reference: Gaussian, resamples: int = 50, seed: int = 0, on_distance: Callable[[int], None] | None = None
) -> Interval:
    """The distance of the samples to `reference`, and a 95% interval of what other samples of the same number would give.

    The reference is taken as it is, and so is what a finite number of samples adds to the distance; there may be fewer samples than
    dimensions. `on_distance(1)` is called for the distance and for each of `2 * resamples` halves. Raises UserError as
    `half_sample_interval` does.
    """
    samples = _Projected(features_ND, reference, on_distance)
    return half_sample_interval(samples.distance, torch.arange(len(features_ND)), resamples, seed)


class _Projected:
    """Samples, and the same projected onto the reference's root F: of centred samples X the singular values of X F are, but for a factor,
    the eigenvalues of the square root of the two covariances' product. There is no covariance of a subset to take apart."""

    def __init__(self, features_ND: Tensor, reference: Gaussian, on_distance: Callable[[int], None] | None = None):
        features_ND = float64_features(features_ND).cpu()
        refuse_other_dimensions(features_ND.shape[1], len(reference.mean))
        mean_D = features_ND.mean(dim=0)
        self._apart_D = (mean_D - reference.mean).numpy()
        self._reference_trace = float(reference.covariance.trace())
        self._centred_ND = (features_ND - mean_D).numpy()
        self._projected_NR = self._centred_ND @ reference.root
        self._squares_N = np.einsum("nd,nd->n", self._centred_ND, self._centred_ND)
        self._on_distance = on_distance

    def distance(self, rows_S: Tensor) -> float:
        """As `frechet_distance` of the Gaussian of these rows. Raises UserError for fewer than 2, which have none."""
        rows, count = rows_S.numpy(), len(rows_S)
        if count < 2:
            raise UserError(f"A covariance needs the features of at least 2 pictures, and there are {count}.")
        mean_D = self._centred_ND[rows].mean(axis=0)
        trace = (self._squares_N[rows].sum() - count * mean_D @ mean_D) / (count - 1)
        projected_SR = self._projected_NR[rows]
        projected_SR -= projected_SR.mean(axis=0)
        projected_SR /= (count - 1) ** 0.5
        found = _distance(self._apart_D + mean_D, float(trace) + self._reference_trace, projected_SR, rank=count - 1)
        if self._on_distance:
            self._on_distance(1)
        return found


def _distance(apart_D: _Matrix, traces: float, matrix: _Matrix, rank: int | None = None) -> float:
    """From the means' difference, the sum of the covariances' traces, and a matrix with the singular values of F_a^T F_b, where
    F F^T = C: the eigenvalues of (C_a C_b)^(1/2), of which no more than `rank` are above 0.

    They are the roots of the eigenvalues of its smaller product with itself, which are found several times faster than singular values.
    But the root of an eigenvalue that is 0 but for rounding keeps only half of the digits: where that matters, singular values are taken.
    """
    rows, columns = matrix.shape
    squares = np.linalg.eigvalsh(matrix.T @ matrix if columns <= rows else matrix @ matrix.T)
    roots = np.sqrt(squares[-min(rows, columns, rank or rows) :].clip(min=0))
    without_roots = float(apart_D @ apart_D) + traces
    distance = without_roots - 2 * roots.sum()
    rounding = roots.max(initial=0) ** 2 * np.finfo(np.float64).eps  # of each square; a root loses at most what follows
    lost = rounding / np.maximum(2 * roots, rounding**0.5 or 1)
    if 2 * lost.sum() > PRECISION * distance:
        distance = without_roots - 2 * np.linalg.svd(matrix, compute_uv=False).sum()
    return max(0.0, float(distance))


def _root(covariance_DD: Tensor) -> _Matrix:
    """F (D, R) with F F^T = C: Cholesky's factor, or, where C is singular but for rounding, eigenvectors without those of the value 0."""
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
