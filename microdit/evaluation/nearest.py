"""Which real picture is nearest to each generated one: the nearest of all may be copies, the farthest are the odd ones out."""

from collections.abc import Callable

import torch
from torch import Tensor

from microdit.evaluation.vectors import same_space

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
