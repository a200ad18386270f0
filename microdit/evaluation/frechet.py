"""Frechet distance between Gaussians fitted to the features of two sets of pictures (FID, Heusel et al. 2017, arXiv 1706.08500).

- The trace of the matrix square root needs no inverse and no complex numbers: it is right for singular covariances too.
- A finite sample lifts the distance: `frechet_infinity` removes that bias, and `frechet_interval` says how far chance moves it.

Shapes: N samples, D features, R the rank of a covariance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from microdit.errors import UserError
from microdit.evaluation.intervals import Interval, half_sample_interval
from microdit.evaluation.vectors import float64_features, refuse_other_dimensions

_Matrix = NDArray[np.float64]


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
    centred_ND = features_ND - mean_D  # before it is squared, so that far from the origin no digits are lost
    return Gaussian(mean_D, centred_ND.T @ centred_ND / (len(features_ND) - 1), len(features_ND))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), equation 6 of arXiv 1706.08500: squared, as FID is. Never below 0.

    Raises UserError if a and b are of different D.
    """
    refuse_other_dimensions(len(a.mean), len(b.mean))
    return _distance(a, b, a.root, b.root)


@dataclass(frozen=True)
class ExtrapolatedDistance:
    """`distance` for infinitely many samples, and the distances at finite `counts` through which the line was laid."""

    distance: float
    counts: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_infinity(
    features_ND: Tensor, reference: Gaussian, points: int = 15, smallest: int | None = None, seed: int = 0
) -> ExtrapolatedDistance:
    """FID_infinity (Chong & Forsyth 2020, arXiv 1911.07023): the bias of FID is linear in 1/N, so a line through FIDs ends at 0 bias.

    `points` random subsets of `smallest` (a tenth of N, as the paper's 5,000 of 50,000) to N samples; least squares in 1/N. The bias is
    linear only where N is well above D. About 0 the result may be negative: it is unbiased, not a distance. The reference's own bias
    stays. Raises UserError for fewer than 2 points, or if `smallest` does not lie in [2, N).
    """
    features_ND = float64_features(features_ND).cpu()
    total = len(features_ND)
    smallest = max(2, total // 10) if smallest is None else smallest
    if points < 2 or not 2 <= smallest < total:
        raise UserError(
            f"FID-infinity needs at least 2 subsets, of 2 to {total - 1} of the {total} samples: not {points} from {smallest} upwards."
        )
    refuse_other_dimensions(features_ND.shape[1], len(reference.mean))
    generator = torch.Generator().manual_seed(seed)
    counts = [round(count) for count in np.linspace(smallest, total, points)]
    distances = [_distance_of_samples(features_ND[torch.randperm(total, generator=generator)[:count]], reference) for count in counts]
    _, intercept = np.polyfit(1 / np.array(counts), distances, deg=1)
    return ExtrapolatedDistance(float(intercept), tuple(counts), tuple(distances))


def frechet_interval(
    features_ND: Tensor, reference: Gaussian, resamples: int = 50, seed: int = 0, on_resample: Callable[[int], None] | None = None
) -> Interval:
    """The distance of the samples to `reference`, and a 95% interval of what other samples of the same number would give.

    The reference is taken as it is, and so is what a finite number of samples adds to the distance; there may be fewer samples than
    dimensions. `on_resample(1)` is called for the distance and for each of `2 * resamples` halves. Raises UserError as
    `half_sample_interval` does.
    """
    features_ND = float64_features(features_ND).cpu()
    refuse_other_dimensions(features_ND.shape[1], len(reference.mean))

    def distance(sample_ND: Tensor) -> float:
        if on_resample:
            on_resample(1)
        return _distance_of_samples(sample_ND, reference)

    return half_sample_interval(distance, features_ND, resamples, seed)


def _distance_of_samples(features_ND: Tensor, reference: Gaussian) -> float:
    """As `frechet_distance`. Of fewer samples than dimensions, the centred samples themselves are a root of their covariance."""
    if len(features_ND) > features_ND.shape[1]:
        return frechet_distance(fit_gaussian(features_ND), reference)
    mean_D = features_ND.mean(dim=0)
    root_ND = (features_ND - mean_D) / (len(features_ND) - 1) ** 0.5
    apart = (mean_D - reference.mean).square().sum()
    root_trace = np.linalg.svd(root_ND.numpy() @ reference.root, compute_uv=False).sum()
    return max(0.0, float(apart + root_ND.square().sum() + reference.covariance.trace() - 2 * root_trace))


def _distance(a: Gaussian, b: Gaussian, root_a_DR: _Matrix, root_b_DR: _Matrix) -> float:
    """The eigenvalues of C_a C_b are those of the symmetric F_a^T C_b F_a, where F F^T = C, and their square roots are the singular values
    of F_a^T F_b. These are taken directly: the root of an eigenvalue that is 0 but for rounding would keep only half of the digits."""
    root_trace = np.linalg.svd(root_a_DR.T @ root_b_DR, compute_uv=False).sum()
    apart = (a.mean - b.mean).square().sum()
    return max(0.0, float(apart + a.covariance.trace() + b.covariance.trace() - 2 * root_trace))


def _root(covariance_DD: Tensor) -> _Matrix:
    """F (D, R) with F F^T = C: Cholesky's factor, or, where C is singular but for rounding, eigenvectors without those of the value 0.

    By numpy: on CPUs its decompositions were measured to be several times faster than those of torch.
    """
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
