"""Which real picture is nearest to each generated one: the nearest of all may be copies, the farthest are the odd ones out."""

import torch
from torch import Tensor

from microdit.evaluation.vectors import same_space

BLOCK = 256  # rows of the distances that are held at once


def nearest(generated_MD: Tensor, real_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) Euclidean distances to the nearest real vector, and (M,) its row. Raises UserError if they are of different encoders."""
    generated_MD, real_ND = same_space(generated_MD, real_ND)
    centre_D = real_ND.mean(dim=0)  # far from the origin digits are lost
    found = [torch.cdist(block - centre_D, real_ND - centre_D).min(dim=1) for block in generated_MD.split(BLOCK)]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])
