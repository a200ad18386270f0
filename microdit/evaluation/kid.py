"""Distances between two sets of features as the maximum mean discrepancy (MMD) of a kernel: no Gaussian is assumed.

KID (Binkowski et al. 2018, arXiv 1801.01401) is unbiased at any number of samples, and so may be compared between sets of different size.
CMMD (Jayasumana et al. 2024, arXiv 2401.09603) is the MMD of CLIP embeddings, with a kernel that sees any difference of distributions.

Shapes: N samples of one set, M of the other, D features, S in a subset.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from microdit.errors import UserError
from microdit.evaluation.vectors import same_space

SIGMA = 10.0  # the width of CMMD's kernel, and the factor by which its numbers are made readable
SCALE = 1000.0
BLOCK = 1024  # rows of a kernel matrix that are held at once


@dataclass(frozen=True)
class KID:
    """`value` is the mean over subsets, `subset_deviation` the standard deviation among them (what papers print after the ±).

    `standard_error` is that of `value`. Subsets that overlap repeat each other, so it counts no more of them than fit into the samples
    side by side.
    """

    value: float
    standard_error: float
    subset_deviation: float


def kid(features_ND: Tensor, others_MD: Tensor, subset_size: int = 1000, subsets: int = 100, seed: int = 0) -> KID:
    """Mean of the unbiased squared MMD with the kernel (x.y / D + 1)^3 over random subsets, each without repeats. It may be below 0.

    Not multiplied by 1000, as some papers do. Raises UserError for features that do not fit together, for fewer samples than a subset
    takes, fewer than 2 samples in a subset, or fewer than 2 subsets.
    """
    features_ND, others_MD = same_space(features_ND, others_MD)
    fewest = min(len(features_ND), len(others_MD))
    if not 2 <= subset_size <= fewest or subsets < 2:
        raise UserError(
            f"KID needs at least 2 subsets of 2 to {fewest} samples, for there are {len(features_ND)} and {len(others_MD)} of them: "
            f"not {subsets} subsets of {subset_size}."
        )
    generator = torch.Generator().manual_seed(seed)
    values = np.array(
        [_unbiased_mmd(*(_subset(set_ND, subset_size, generator) for set_ND in (features_ND, others_MD))) for _ in range(subsets)]
    )
    deviation = float(values.std(ddof=1))
    independent = min(subsets, fewest / subset_size)
    return KID(float(values.mean()), deviation / independent**0.5, deviation)


def cmmd(embeddings_ND: Tensor, others_MD: Tensor) -> float:
    """1000 times the squared MMD of CLIP embeddings, scaled to length 1, with the kernel exp(-|x - y|^2 / (2 sigma^2)), sigma = 10.

    The estimator of least variance (equation 5 of Gretton et al. 2012, a sample's pair with itself included), as in the authors' code: 0
    for a set and itself, never below. Raises UserError for embeddings that do not fit together.
    """
    embeddings_ND, others_MD = (F.normalize(set_ND, dim=1) for set_ND in same_space(embeddings_ND, others_MD))
    within = _mean_kernel(embeddings_ND, embeddings_ND) + _mean_kernel(others_MD, others_MD)
    return max(0.0, SCALE * (within - 2 * _mean_kernel(embeddings_ND, others_MD)))


def _subset(features_ND: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return features_ND[torch.randperm(len(features_ND), generator=generator)[:size].to(features_ND.device)]


def _unbiased_mmd(x_SD: Tensor, y_SD: Tensor) -> float:
    """Equation 3 of Gretton et al. 2012 (JMLR 13): pairs of a sample with itself are left out."""
    size = len(x_SD)
    within = 0.0
    for set_SD in (x_SD, y_SD):
        kernel_SS = _cubic_kernel(set_SD, set_SD)
        within += float(kernel_SS.sum() - kernel_SS.trace()) / (size * (size - 1))
    return within - 2 * float(_cubic_kernel(x_SD, y_SD).mean())


def _cubic_kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3


def _mean_kernel(x_ND: Tensor, y_MD: Tensor) -> float:
    return sum(float(_gaussian_kernel(block, y_MD).sum()) for block in x_ND.split(BLOCK)) / (len(x_ND) * len(y_MD))


def _gaussian_kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """Of vectors of length 1, whose squared distance is 2 - 2 x.y."""
    return torch.exp((x_ND @ y_MD.T - 1) / SIGMA**2)
