"""KID and CMMD: the squared maximum mean discrepancy (MMD) of a kernel between two sets of features, without a Gaussian assumption.

KID (Binkowski et al. 2018, arXiv 1801.01401) is unbiased at any number of samples, so sets of different sizes may be compared.
CMMD (Jayasumana et al. 2024, arXiv 2401.09603) uses CLIP embeddings and a characteristic kernel, which detects any difference between
distributions.

Shapes: N samples of one set, M of the other, D features, S in a subset.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from microdit.errors import UserError
from microdit.evaluation.metrics import same_space
from microdit.evaluation.metrics.bootstrap import NORMAL_95, Interval

SUBSETS = 100  # of KID, as in the paper
SIGMA = 10.0  # width of CMMD's kernel
SCALE = 1000.0  # factor that makes CMMD readable, as in the paper
BLOCK = 1024  # rows of a kernel matrix held at once


@dataclass(frozen=True)
class KID(Interval):
    """Mean over subsets with its 95% interval, and the standard deviation over subsets, which papers print after the ±.

    The deviation describes how subsets of these samples differ, and is 0 if a subset contains all of them. The interval describes what
    other samples would have given.
    """

    subset_deviation: float


def kid(
    features_ND: Tensor,
    others_MD: Tensor,
    subset_size: int = 1000,
    subsets: int = SUBSETS,
    seed: int = 0,
    on_subset: Callable[[int], None] | None = None,
) -> KID:
    """Average the unbiased squared MMD with the kernel (x.y / D + 1)^3 over random subsets, drawn without replacement.

    The result may be negative, and is not multiplied by 1000 as in some papers. `on_subset(1)` is called after each subset. Raises
    UserError if the dimensions differ, features are not finite, a set has fewer than `subset_size` samples, `subset_size` is below 4, or
    `subsets` is below 2.
    """
    features_ND, others_MD = same_space(features_ND, others_MD)
    sizes = len(features_ND), len(others_MD)
    if not 4 <= subset_size <= min(sizes) or subsets < 2:
        raise UserError(
            f"KID of sets of {sizes[0]} and {sizes[1]} samples needs at least 2 subsets of 4 to {min(sizes)} samples, "
            f"not {subsets} subsets of {subset_size}."
        )
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(1 if sizes == (subset_size, subset_size) else subsets):  # subsets of all samples would be identical
        found.append(_moments(*(_subset(set_ND, subset_size, generator) for set_ND in (features_ND, others_MD))))
        if on_subset:
            on_subset(1)
    deviation = float(np.std([one.mmd for one in found], ddof=1)) if len(found) > 1 else 0.0
    mean = _Moments(*np.mean(found, axis=0).tolist())
    return KID(mean.mmd, *_bounds(mean, *sizes, deviation**2 / len(found)), deviation)


def paired_kid(features_ND: Tensor, others_ND: Tensor) -> float:
    """Return the KID of paired sets, where row i of both may be dependent, such as images of the same caption.

    The unbiased squared MMD of pairs (equation 4 of Gretton et al. 2012) omits the kernel within a pair, as it does between a sample and
    itself. It is 0 for a set and itself, and may be negative otherwise. Raises UserError if the dimensions or the numbers of samples
    differ, or for fewer than 2 pairs.
    """
    features_ND, others_ND = same_space(features_ND, others_ND)
    count = len(features_ND)
    if count != len(others_ND) or count < 2:
        raise UserError(
            f"Paired KID needs at least 2 pairs and sets of equal size, not {count} images in one set and {len(others_ND)} in the other."
        )
    within_NN = _cubic_kernel(features_ND, features_ND) + _cubic_kernel(others_ND, others_ND)
    kernel_NN = within_NN - 2 * _cubic_kernel(features_ND, others_ND)
    return float(kernel_NN.sum() - kernel_NN.trace()) / (count * (count - 1))


def cmmd(embeddings_ND: Tensor, others_MD: Tensor, on_rows: Callable[[int], None] | None = None) -> float:
    """Return 1000 times the squared MMD of normalised CLIP embeddings, with the kernel exp(-|x - y|^2 / (2 sigma^2)), sigma = 10.

    As in the authors' code, this is the biased estimator of minimal variance (equation 5 of Gretton et al. 2012), which includes each
    sample's pair with itself. It is 0 for a set and itself, and never negative. `on_rows(n)` is called after n more of the 2N + M rows of
    the kernel matrices. Raises UserError if the dimensions differ or embeddings are not finite.
    """
    embeddings_ND, others_MD = (F.normalize(set_ND, dim=1) for set_ND in same_space(embeddings_ND, others_MD))
    on_rows = on_rows or (lambda _: None)
    within = _mean_kernel(embeddings_ND, embeddings_ND, on_rows) + _mean_kernel(others_MD, others_MD, on_rows)
    return max(0.0, SCALE * (within - 2 * _mean_kernel(embeddings_ND, others_MD, on_rows)))


def _subset(features_ND: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return features_ND[torch.randperm(len(features_ND), generator=generator)[:size].to(features_ND.device)]


class _Moments(NamedTuple):
    """Unbiased estimates of the terms of the squared MMD and its variance, with x, x' from one distribution and y, y' from the other.

    `mmd`: the squared MMD, equation 3 of Gretton et al. 2012 (JMLR 13).
    `witness_x`: variance over x of the witness function E k(x, x') - E k(x, y); `witness_y` likewise.
    `pairs_xx`, `pairs_yy`, `pairs_xy`: E k~(x, x')^2 and so on, where k~ is k minus its means over either argument (the degenerate part).
    `spread_x`: E k(x, x) - E k(x, x'), the amount by which self-pairs would increase the MMD.
    """

    mmd: float
    witness_x: float
    witness_y: float
    pairs_xx: float
    pairs_yy: float
    pairs_xy: float
    spread_x: float
    spread_y: float


def _moments(x_SD: Tensor, y_SD: Tensor) -> _Moments:
    size = len(x_SD)
    mean_xx, pairs_xx, spread_x, effect_x_S = _within(_cubic_kernel(x_SD, x_SD))
    mean_yy, pairs_yy, spread_y, effect_y_S = _within(_cubic_kernel(y_SD, y_SD))
    kernel_SS = _cubic_kernel(x_SD, y_SD)
    over_y_S, over_x_S, mean = kernel_SS.mean(dim=1), kernel_SS.mean(dim=0), kernel_SS.mean()
    centred = kernel_SS.square().sum() - size * over_y_S.square().sum() - size * over_x_S.square().sum() + (size * mean) ** 2
    pairs_xy = centred.clamp(min=0) / (size - 1) ** 2
    # Subtract the sampling noise of the row means.
    witness_x = (effect_x_S - over_y_S).var() - pairs_xx / (size - 2) - pairs_xy / size
    witness_y = (effect_y_S - over_x_S).var() - pairs_yy / (size - 2) - pairs_xy / size
    values = (mean_xx + mean_yy - 2 * mean, witness_x, witness_y, pairs_xx, pairs_yy, pairs_xy, spread_x, spread_y)
    return _Moments(*torch.stack(values).tolist())


def _within(kernel_SS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the off-diagonal mean of one set's kernel, E k~^2, the diagonal's mean minus the former, and each sample's effect (S,).

    The estimates are unbiased, as in the U-centred distances of Szekely and Rizzo 2014 (section 2 of arXiv 1310.2926).
    """
    size = len(kernel_SS)
    others_SS = kernel_SS.clone().fill_diagonal_(0)
    row_S, total = others_SS.sum(dim=1), others_SS.sum()
    mean = total / (size * (size - 1))
    centred = others_SS.square().sum() - 2 * row_S.square().sum() / (size - 2) + total**2 / ((size - 1) * (size - 2))
    effect_S = (row_S - (size - 1) * mean) / (size - 2)
    return mean, centred.clamp(min=0) / (size * (size - 3)), kernel_SS.diagonal().mean() - mean, effect_S


def _bounds(found: _Moments, count_x: int, count_y: int, subset_variance: float) -> tuple[float, float]:
    """Return the 95% interval: all distances d within 1.96 standard errors of the estimate, with the standard error evaluated at d.

    By Hoeffding's decomposition, the variance is the sum of `chance`, which is present between equal distributions too (and includes the
    choice of subsets), and of a witness term that grows with d: `slope` times d. A variance evaluated at the estimate instead would be too
    large where the estimate is too high, and too small where it is too low.
    """
    chance = 2 * found.pairs_xx / (count_x * (count_x - 1)) + 2 * found.pairs_yy / (count_y * (count_y - 1))
    chance += 4 * found.pairs_xy / (count_x * count_y) + subset_variance
    witness = 4 * found.witness_x / count_x + 4 * found.witness_y / count_y
    distance = found.mmd
    if found.mmd <= NORMAL_95 * chance**0.5:  # may be chance alone: add its terms to both, whose ratio is stable
        distance += found.spread_x / count_x + found.spread_y / count_y
        witness += 4 * found.pairs_xx / count_x / (count_x - 2) + 4 * found.pairs_yy / count_y / (count_y - 2)
        witness += 8 * found.pairs_xy / (count_x * count_y)
    slope = max(0.0, witness / distance) if distance > 0 else 0.0

    def bound(side: int) -> float:
        without_witness = found.mmd + side * NORMAL_95 * chance**0.5
        if without_witness <= 0:  # the witness term vanishes for d <= 0
            return without_witness
        half = NORMAL_95**2 * slope / 2
        return found.mmd + half + side * max(0.0, half**2 + NORMAL_95**2 * (chance + slope * found.mmd)) ** 0.5

    return bound(-1), bound(1)


def _cubic_kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3


def _mean_kernel(x_ND: Tensor, y_MD: Tensor, on_rows: Callable[[int], None]) -> float:
    total = 0.0
    for block in x_ND.split(BLOCK):
        total += float(_gaussian_kernel(block, y_MD).sum())
        on_rows(len(block))
    return total / (len(x_ND) * len(y_MD))


def _gaussian_kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """Evaluate CMMD's kernel for vectors of length 1, whose squared distance is 2 - 2 x.y."""
    return torch.exp((x_ND @ y_MD.T - 1) / SIGMA**2)
