"""Is the picture of a caption recognisably its picture? The rank of the right one among all training pictures."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Retrieval:
    """Shares of generated pictures whose true picture is among the 1 or 10 nearest of all."""

    top_1: float
    top_10: float
    captions: int
    chance_top_10: float


def retrieval(generated_ND: Tensor, pictures_MD: Tensor, right_N: Tensor) -> Retrieval:
    """Cosine similarity of features. `right_N` holds, for each generated picture, the row of its true one in `pictures_MD`."""
    similarity_NM = F.normalize(generated_ND, dim=1) @ F.normalize(pictures_MD, dim=1).T
    right_similarity_N1 = similarity_NM.gather(1, right_N[:, None])
    rank_N = (similarity_NM > right_similarity_N1).sum(dim=1)
    top_1, top_10 = ((rank_N < top).float().mean().item() for top in (1, 10))
    return Retrieval(top_1, top_10, len(generated_ND), min(1.0, 10 / len(pictures_MD)))


def spread_ids(rows: int, count: int) -> Tensor:
    """`count` row numbers spread evenly over `rows`: the same captions for every model."""
    return torch.linspace(0, rows - 1, min(count, rows), dtype=torch.float64).round().long()
