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
from microdit.evaluation.vectors import same_space

BLOCK_ENTRIES = 1 << 24  # distances held at once: 128 MiB of float64
ROUNDING = 1e-12  # squared distances below this share of the squared lengths are 0


@dataclass(frozen=True)
class PrecisionRecall:
    """`precise_M`: which generated pictures lie in the manifold of the real ones; `recalled_N`: the other way round. Bool."""

    precise_M: Tensor
    recalled_N: Tensor

    @property
    def precision(self) -> float:
        return float(self.precise_M.double().mean())

    @property
    def recall(self) -> float:
        return float(self.recalled_N.double().mean())


@dataclass(frozen=True)
class DensityCoverage:
    """`density_M`: in how many real balls each generated picture lies, over k (1 is expected of equal distributions), float64;
    `covered_N`: which real balls hold a generated picture, bool."""

    density_M: Tensor
    covered_N: Tensor

    @property
    def density(self) -> float:
        return float(self.density_M.mean())

    @property
    def coverage(self) -> float:
        return float(self.covered_N.double().mean())


def precision_recall(real_ND: Tensor, generated_MD: Tensor, k: int = 3) -> PrecisionRecall:
    """Equations 1 and 2 of arXiv 1904.06991, with its k. Raises UserError for features that do not fit together, or k outside [1, N)."""
    real_ND, generated_MD = _centred(real_ND, generated_MD, k)
    return PrecisionRecall(_inside(generated_MD, real_ND, k), _inside(real_ND, generated_MD, k))


def density_coverage(real_ND: Tensor, generated_MD: Tensor, k: int = 5) -> DensityCoverage:
    """Section 3 of arXiv 2002.09797, with its k. Raises UserError for features that do not fit together, or k outside [1, N)."""
    real_ND, generated_MD = _centred(real_ND, generated_MD, k)
    radii_N = _squared_radii(real_ND, k)
    balls_M = torch.zeros(len(generated_MD), dtype=torch.float64)
    covered = []
    for rows, distances_BM in _squared_distances(real_ND, generated_MD):
        inside_BM = distances_BM <= radii_N[rows, None]
        balls_M += inside_BM.sum(dim=0).cpu()
        covered.append(inside_BM.any(dim=1))
    return DensityCoverage(balls_M / k, torch.cat(covered))


def _centred(real_ND: Tensor, generated_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both as float64, moved so that the real ones have mean 0: distances stay, and lose fewer digits. Raises UserError."""
    real_ND, generated_MD = same_space(real_ND, generated_MD)
    fewest = min(len(real_ND), len(generated_MD))
    if not 1 <= k < fewest:
        raise UserError(f"There is no neighbour number {k} among {fewest} pictures: choose k from 1, below the number of pictures.")
    centre_D = real_ND.mean(dim=0)
    return real_ND - centre_D, generated_MD - centre_D


def _inside(points_ND: Tensor, manifold_MD: Tensor, k: int) -> Tensor:
    """(N,) bool: which points lie in at least one ball of the manifold."""
    radii_M = _squared_radii(manifold_MD, k)
    return torch.cat([(distances_BM <= radii_M).any(dim=1) for _, distances_BM in _squared_distances(points_ND, manifold_MD)])


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
