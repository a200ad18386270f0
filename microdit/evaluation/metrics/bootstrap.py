"""Confidence intervals of metrics by resampling: the bootstrap, and random half-samples."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from microdit.errors import UserError

NORMAL_95 = 1.96  # standard errors on either side of a 95% interval


@dataclass(frozen=True)
class Interval:
    """The metric of all samples, and the interval [low, high] for its expectation."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    metric: Callable[[Tensor], float], samples: Tensor, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Return `metric(samples)` with its bootstrap interval (Efron 1979). `samples` (N, ...) are independent rows.

    The interval is for the metric's expectation at this N. It is pivotal, from the resamples' deviations from their own mean, and suits
    metrics that are nearly a mean over rows. Raises UserError for fewer than 2 samples or resamples, or a confidence outside (0, 1).
    """
    if len(samples) < 2 or resamples < 2 or not 0 < confidence < 1:
        raise UserError(
            f"A bootstrap interval needs at least 2 samples and resamples and a confidence between 0 and 1, not {len(samples)} samples, "
            f"{resamples} resamples and a confidence of {confidence}."
        )
    generator = torch.Generator().manual_seed(seed)
    value = metric(samples)
    resampled = np.array(
        [metric(samples[torch.randint(len(samples), (len(samples),), generator=generator).to(samples.device)]) for _ in range(resamples)]
    )
    below, above = np.quantile(resampled - resampled.mean(), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, value - float(above), value - float(below))


def half_sample_interval(metric: Callable[[Tensor], float], samples: Tensor, resamples: int = 50, seed: int = 0) -> Interval:
    """Return `metric(samples)` and a 95% interval for its expectation at this N. `samples` (N, ...) are independent rows.

    The rows are repeatedly split into random halves (half-samples, McCarthy 1969), and the metric is computed on both. Unlike bootstrap
    resamples, halves repeat no row, so this suits metrics that repeats would distort, such as a Frechet distance with fewer rows than
    dimensions. For a metric that is a mean over rows plus a mean over pairs of rows, half the difference of the halves has the variance
    of the first term plus twice that of the second, and their mean has the variance of the second. Raises UserError for fewer than 4
    samples or 2 resamples.
    """
    count = len(samples)
    if count < 4 or resamples < 2:
        raise UserError(f"A half-sample interval needs at least 4 samples and 2 resamples, not {count} samples and {resamples} resamples.")
    generator = torch.Generator().manual_seed(seed)
    value = metric(samples)
    pairs = []
    for _ in range(resamples):
        order_N = torch.randperm(count, generator=generator).to(samples.device)
        pairs.append([metric(samples[half_N]) for half_N in (order_N[: count // 2], order_N[count // 2 :])])
    halves_R2 = np.array(pairs)
    of_pairs = halves_R2.mean(axis=1).var(ddof=1)
    of_both = np.diff(halves_R2).var(ddof=1) / 4
    error = NORMAL_95 * float(max(of_both - of_pairs, of_pairs)) ** 0.5
    return Interval(value, value - error, value + error)


def share_interval(hits_N: Tensor, resamples: int = 1000, seed: int = 0) -> Interval:
    """Return the share of True among `hits_N`, with its bootstrap interval."""
    return bootstrap_interval(lambda rows: float(rows.mean()), hits_N.double(), resamples, seed=seed)
