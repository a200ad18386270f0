"""How far chance alone moves a metric: bootstrap intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from microdit.errors import UserError


@dataclass(frozen=True)
class Interval:
    """The metric of all samples, and between which bounds its expectation lies."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    metric: Callable[[Tensor], float], samples: Tensor, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Of `metric(samples)`, where `samples` (N, ...) are independent rows: rows are drawn anew, with repeats (Efron 1979).

    The interval is for the metric's expectation at this N. It is the pivotal one, from the resamples' deviations from their own mean:
    repeats lift a biased metric such as FID further than the bias of the samples themselves, and percentiles would lie above the value.
    Raises UserError for fewer than 2 samples or resamples, or a confidence outside (0, 1).
    """
    if len(samples) < 2 or resamples < 2 or not 0 < confidence < 1:
        raise UserError(
            f"A bootstrap interval needs at least 2 samples and resamples, and a confidence between 0 and 1: not {len(samples)} samples, "
            f"{resamples} resamples and a confidence of {confidence}."
        )
    generator = torch.Generator().manual_seed(seed)
    value = metric(samples)
    drawn = np.array(
        [metric(samples[torch.randint(len(samples), (len(samples),), generator=generator).to(samples.device)]) for _ in range(resamples)]
    )
    below, above = np.quantile(drawn - drawn.mean(), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, value - float(above), value - float(below))


def share_interval(hits_N: Tensor, resamples: int = 1000, seed: int = 0) -> Interval:
    """Of the share of True among `hits_N`."""
    return bootstrap_interval(lambda rows: float(rows.mean()), hits_N.double(), resamples, seed=seed)
