"""Which real picture is nearest to each generated one: the nearest of all may be copies, the farthest are the odd ones out.

Do generated pictures look like real ones, and do they show all of their variety? Two numbers each, from nearest neighbours.

A set's manifold is the union of balls around its feature vectors, each reaching to the k-th nearest other vector of that set.
Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) and density and coverage (Naeem et al. 2020, arXiv 2002.09797), which
one outlier cannot spoil. The border of a ball belongs to it. All four come of the same distances, which are computed once: within the
real pictures, within the generated ones, and between the two.

Shapes: N real samples, M generated, B rows of a block, D features, K neighbours. The N x M distances are never held at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from microdit.errors import UserError
from microdit.evaluation.metrics.feature_matrix import same_space

BLOCK = 256  # rows of the distances that are held at once


def nearest(generated_MD: Tensor, real_ND: Tensor, on_rows: Callable[[int], None] | None = None) -> tuple[Tensor, Tensor]:
    """(M,) Euclidean distances to the nearest real vector, and (M,) its row. Raises UserError if they are of different encoders.

    `on_rows(n)`: after n more generated ones.
    """
    generated_MD, real_ND = same_space(generated_MD, real_ND)
    centre_D = real_ND.mean(dim=0)  # far from the origin digits are lost
    real_ND = real_ND - centre_D
    found = []
    for block in generated_MD.split(BLOCK):
        found.append(torch.cdist(block - centre_D, real_ND).min(dim=1))
        if on_rows:
            on_rows(len(block))
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


BLOCK_ENTRIES = 1 << 24  # distances held at once: 128 MiB of float64
ROUNDING = 1e-12  # squared distances below this share of the squared lengths are 0


@dataclass(frozen=True)
class Manifolds:
    """What each picture has to do with the other set.

    `precise_M`: which generated pictures lie in the manifold of the real ones; `recalled_N`: the other way round. Bool.
    `density_M`: in how many real balls each generated picture lies, over k (1 is expected of equal distributions), float64;
    `covered_N`: which real balls hold a generated picture, bool.
    """

    precise_M: Tensor
    recalled_N: Tensor
    density_M: Tensor
    covered_N: Tensor

    @property
    def precision(self) -> float:
        return float(self.precise_M.double().mean())

    @property
    def recall(self) -> float:
        return float(self.recalled_N.double().mean())

    @property
    def density(self) -> float:
        return float(self.density_M.mean())

    @property
    def coverage(self) -> float:
        return float(self.covered_N.double().mean())


def compare_manifolds(
    real_ND: Tensor, generated_MD: Tensor, k: int = 3, density_k: int = 5, on_rows: Callable[[int], None] | None = None
) -> Manifolds:
    """Equations 1 and 2 of arXiv 1904.06991, and section 3 of arXiv 2002.09797 with `density_k`, each with its paper's k.

    `on_rows(n)` is called after n more rows of distances, of `rows_to_compare`. Raises UserError for features that do not fit together, or
    a k outside [1, the number of pictures).
    """
    on_rows = on_rows or (lambda _: None)
    real_ND, generated_MD = _centred(real_ND, generated_MD, (k, density_k))
    radii_N, density_radii_N = _squared_radii(real_ND, (k, density_k), on_rows).unbind(dim=1)
    radii_M = _squared_radii(generated_MD, (k,), on_rows)[:, 0]
    precise_M = torch.zeros(len(generated_MD), dtype=torch.bool, device=generated_MD.device)
    balls_M = torch.zeros(len(generated_MD), dtype=torch.float64, device=generated_MD.device)
    recalled, covered = [], []
    for rows, distances_BM in _squared_distances(real_ND, generated_MD, on_rows):
        precise_M |= (distances_BM <= radii_N[rows, None]).any(dim=0)
        recalled.append((distances_BM <= radii_M).any(dim=1))
        inside_BM = distances_BM <= density_radii_N[rows, None]
        balls_M += inside_BM.sum(dim=0)
        covered.append(inside_BM.any(dim=1))
    return Manifolds(precise_M, torch.cat(recalled), balls_M / density_k, torch.cat(covered))


def rows_to_compare(real_ND: Tensor, generated_MD: Tensor) -> int:
    """How many rows of distances `compare_manifolds` computes."""
    return 2 * len(real_ND) + len(generated_MD)


def _centred(real_ND: Tensor, generated_MD: Tensor, ks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Both as float64, moved so that the real ones have mean 0: distances stay, and lose fewer digits. Raises UserError."""
    real_ND, generated_MD = same_space(real_ND, generated_MD)
    fewest = min(len(real_ND), len(generated_MD))
    for k in ks:
        if not 1 <= k < fewest:
            raise UserError(
                f"There is no neighbour number {k} among {fewest} pictures: take more pictures, or a k from 1 below their number."
            )
    centre_D = real_ND.mean(dim=0)
    return real_ND - centre_D, generated_MD - centre_D


def _squared_radii(points_ND: Tensor, ks: tuple[int, ...], on_rows: Callable[[int], None]) -> Tensor:
    """(N, K): from each point to its k-th nearest other one, for each k."""
    columns = torch.tensor(ks) - 1
    radii = []
    for rows, distances_BN in _squared_distances(points_ND, points_ND, on_rows):
        distances_BN[torch.arange(len(distances_BN)), torch.arange(rows.start, rows.stop)] = torch.inf  # a point is not its own neighbour
        nearest_BK = distances_BN.topk(max(ks), dim=1, largest=False).values
        radii.append(nearest_BK[:, columns])
    return torch.cat(radii)


def _squared_distances(x_ND: Tensor, y_MD: Tensor, on_rows: Callable[[int], None]) -> Iterator[tuple[slice, Tensor]]:
    """Of some rows of x to all of y, (B, M), block by block; equal points are at distance 0 in spite of rounding."""
    lengths_N, lengths_M = x_ND.square().sum(dim=1), y_MD.square().sum(dim=1)
    block = max(1, BLOCK_ENTRIES // len(y_MD))
    for start in range(0, len(x_ND), block):
        rows = slice(start, min(start + block, len(x_ND)))
        sums_BM = lengths_N[rows, None] + lengths_M
        distances_BM = torch.addmm(sums_BM, x_ND[rows], y_MD.T, alpha=-2)
        yield rows, distances_BM.masked_fill_(distances_BM < ROUNDING * sums_BM, 0)
        on_rows(rows.stop - rows.start)
