"""Do generated pictures look like real ones, and do they show all of their variety? Two numbers each, from nearest neighbours.

A set's manifold is the union of balls around its feature vectors, each reaching to the k-th nearest other vector of that set.
Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) and density and coverage (Naeem et al. 2020, arXiv 2002.09797), which
one outlier cannot spoil. The border of a ball belongs to it.

Shapes: N real samples, M generated, B rows of a block, D features. The N x M distances are never held at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from microdit.errors import UserError
from microdit.evaluation.frechet import float64_features

BLOCK_ENTRIES = 1 << 24  # distances held at once: 128 MiB of float64
ROUNDING = 1e-12  # squared distances below this share of the squared lengths are 0


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares of generated pictures in the manifold of the real ones, and of real pictures in the manifold of the generated ones."""

    precision: float
    recall: float


@dataclass(frozen=True)
class DensityCoverage:
    """In how many real balls a generated picture lies, over k (1 is expected of equal distributions); share of real balls that hold one."""

    density: float
    coverage: float


def precision_recall(real_ND: Tensor, generated_MD: Tensor, k: int = 3) -> PrecisionRecall:
    """Equations 1 and 2 of arXiv 1904.06991, with its k. Raises UserError for features that do not fit together, or k outside [1, N)."""
    real_ND, generated_MD = _centred(real_ND, generated_MD, k)
    return PrecisionRecall(_share_inside(generated_MD, real_ND, k), _share_inside(real_ND, generated_MD, k))


def density_coverage(real_ND: Tensor, generated_MD: Tensor, k: int = 5) -> DensityCoverage:
    """Section 3 of arXiv 2002.09797, with its k. Raises UserError for features that do not fit together, or k outside [1, N)."""
    real_ND, generated_MD = _centred(real_ND, generated_MD, k)
    radii_N = _squared_radii(real_ND, k)
    inside, covered = 0, 0
    for rows, distances_BM in _squared_distances(real_ND, generated_MD):
        inside_BM = distances_BM <= radii_N[rows, None]
        inside += int(inside_BM.sum())
        covered += int(inside_BM.any(dim=1).sum())
    return DensityCoverage(inside / (k * len(generated_MD)), covered / len(real_ND))


def _centred(real_ND: Tensor, generated_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both as float64, moved so that the real ones have mean 0: distances stay, and lose fewer digits. Raises UserError."""
    real_ND, generated_MD = float64_features(real_ND), float64_features(generated_MD)
    if real_ND.shape[1] != generated_MD.shape[1]:
        raise UserError(
            f"Features of {real_ND.shape[1]} and of {generated_MD.shape[1]} dimensions cannot be compared: they are of different encoders."
        )
    fewest = min(len(real_ND), len(generated_MD))
    if not 1 <= k < fewest:
        raise UserError(f"There is no neighbour number {k} among {fewest} pictures: choose k from 1, below the number of pictures.")
    centre_D = real_ND.mean(dim=0)
    return real_ND - centre_D, generated_MD - centre_D


def _share_inside(points_ND: Tensor, manifold_MD: Tensor, k: int) -> float:
    """Of the points that lie in at least one ball of the manifold."""
    radii_M = _squared_radii(manifold_MD, k)
    return sum(int((distances_BM <= radii_M).any(dim=1).sum()) for _, distances_BM in _squared_distances(points_ND, manifold_MD)) / len(
        points_ND
    )


def _squared_radii(points_ND: Tensor, k: int) -> Tensor:
    """(N,): from each point to its k-th nearest other one."""
    radii = []
    for rows, distances_BN in _squared_distances(points_ND, points_ND):
        distances_BN[torch.arange(len(distances_BN)), torch.arange(rows.start, rows.stop)] = torch.inf  # a point is not its own neighbour
        radii.append(distances_BN.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _squared_distances(x_ND: Tensor, y_MD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Of some rows of x to all of y, (B, M), block by block; equal points are at distance 0 in spite of rounding."""
    lengths_N, lengths_M = x_ND.square().sum(dim=1), y_MD.square().sum(dim=1)
    block = max(1, BLOCK_ENTRIES // len(y_MD))
    for start in range(0, len(x_ND), block):
        rows = slice(start, min(start + block, len(x_ND)))
        sums_BM = lengths_N[rows, None] + lengths_M
        distances_BM = torch.addmm(sums_BM, x_ND[rows], y_MD.T, alpha=-2)
        yield rows, distances_BM.masked_fill_(distances_BM < ROUNDING * sums_BM, 0)
