"""Precision, recall, density and coverage (PRDC) of generated images, and their nearest real neighbours.

A set's manifold is the union of closed balls around its feature vectors, each reaching to the k-th nearest other vector of that set.
Precision and recall are from Kynkaanniemi et al. 2019 (arXiv 1904.06991); density and coverage, which are robust to outliers, from Naeem
et al. 2020 (arXiv 2002.09797). All four use the same distances, computed once: within the real set, within the generated set, and
between the two.

Shapes: N real samples, M generated, B rows of a block, D features, K neighbours. The N x M distances are never held at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from microdit.errors import UserError
from microdit.evaluation.metrics import same_space

BLOCK = 256  # generated rows per block in `nearest`
BLOCK_ENTRIES = 1 << 24  # distances held at once: 128 MiB of float64
ROUNDING = 1e-12  # squared distances below this share of the squared lengths count as 0


@dataclass(frozen=True)
class PRDC:
    """The relation of each image to the other set, from which the four metrics are averaged.

    `precise_M`: whether each generated image lies in the real manifold, bool; `recalled_N`: the reverse for each real image.
    `density_M`: the number of real balls that contain each generated image, over k, float64; 1 is expected for equal distributions.
    `covered_N`: whether each real ball contains a generated image, bool.
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


def compute_prdc(
    real_ND: Tensor, generated_MD: Tensor, k: int = 3, density_k: int = 5, on_rows: Callable[[int], None] | None = None
) -> PRDC:
    """Compute precision and recall with `k` (equations 1 and 2 of arXiv 1904.06991), density and coverage with `density_k` (section 3
    of arXiv 2002.09797). The defaults are the papers' values.

    `on_rows(n)` is called after n more of the `prdc_rows` rows of distances. Raises UserError if the dimensions differ, features are not
    finite, or a k is not in [1, number of images).
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
    return PRDC(precise_M, torch.cat(recalled), balls_M / density_k, torch.cat(covered))


def prdc_rows(real_ND: Tensor, generated_MD: Tensor) -> int:
    """Return the number of rows of distances that `compute_prdc` computes."""
    return 2 * len(real_ND) + len(generated_MD)


def nearest(generated_MD: Tensor, real_ND: Tensor, on_rows: Callable[[int], None] | None = None) -> tuple[Tensor, Tensor]:
    """Return the Euclidean distance (M,) from each generated image to the nearest real one, and the row (M,) of the latter.

    `on_rows(n)` is called after n more generated images. Raises UserError if the dimensions differ or features are not finite.
    """
    generated_MD, real_ND = same_space(generated_MD, real_ND)
    centre_D = real_ND.mean(dim=0)  # far from the origin, digits would be lost
    real_ND = real_ND - centre_D
    found = []
    for block in generated_MD.split(BLOCK):
        found.append(torch.cdist(block - centre_D, real_ND).min(dim=1))
        if on_rows:
            on_rows(len(block))
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def _centred(real_ND: Tensor, generated_MD: Tensor, ks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return both sets as float64, shifted so that the real mean is 0, which preserves distances and loses fewer digits."""
    real_ND, generated_MD = same_space(real_ND, generated_MD)
    fewest = min(len(real_ND), len(generated_MD))
    for k in ks:
        if not 1 <= k < fewest:
            raise UserError(f"There is no neighbour number {k} among {fewest} images: use more images, or a k from 1 to {fewest - 1}.")
    centre_D = real_ND.mean(dim=0)
    return real_ND - centre_D, generated_MD - centre_D


def _squared_radii(points_ND: Tensor, ks: tuple[int, ...], on_rows: Callable[[int], None]) -> Tensor:
    """Return the squared distance (N, K) from each point to its k-th nearest other point, for each k."""
    columns = torch.tensor(ks) - 1
    radii = []
    for rows, distances_BN in _squared_distances(points_ND, points_ND, on_rows):
        distances_BN[torch.arange(len(distances_BN)), torch.arange(rows.start, rows.stop)] = torch.inf  # a point is not its own neighbour
        nearest_BK = distances_BN.topk(max(ks), dim=1, largest=False).values
        radii.append(nearest_BK[:, columns])
    return torch.cat(radii)


def _squared_distances(x_ND: Tensor, y_MD: Tensor, on_rows: Callable[[int], None]) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows of x with their squared distances (B, M) to all of y. Equal points are at distance 0 despite rounding."""
    lengths_N, lengths_M = x_ND.square().sum(dim=1), y_MD.square().sum(dim=1)
    block = max(1, BLOCK_ENTRIES // len(y_MD))
    for start in range(0, len(x_ND), block):
        rows = slice(start, min(start + block, len(x_ND)))
        sums_BM = lengths_N[rows, None] + lengths_M
        distances_BM = torch.addmm(sums_BM, x_ND[rows], y_MD.T, alpha=-2)
        yield rows, distances_BM.masked_fill_(distances_BM < ROUNDING * sums_BM, 0)
        on_rows(rows.stop - rows.start)
