"""How far chance alone moves a metric: intervals from the samples themselves."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from microdit.errors import UserError

NORMAL_95 = 1.96  # standard errors


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

    The interval is for the metric's expectation at this N, and the metric should be nearly a mean over rows. It is the pivotal one, from
    the resamples' deviations from their own mean. Raises UserError for fewer than 2 samples or resamples, or a confidence outside (0, 1).
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


def half_sample_interval(metric: Callable[[Tensor], float], samples: Tensor, resamples: int = 50, seed: int = 0) -> Interval:
    """Return `metric(samples)` and a 95% interval of its expectation at this N, where `samples` (N, ...) are independent rows.

    The rows are halved at random, again and again (half-samples: McCarthy 1969), and the metric is taken of both halves. Unlike a
    bootstrap's, halves repeat no row, so this suits a metric that repeats would distort, such as a Frechet distance of fewer rows than
    dimensions. With a mean over rows and a mean over pairs of rows in the metric, half of the halves' difference has the variance of the
    first and twice that of the second, their mean that of the second. Raises UserError for fewer than 4 samples or 2 resamples.
    """
    count = len(samples)
    if count < 4 or resamples < 2:
        raise UserError(f"An interval by halves needs at least 4 samples and 2 resamples: not {count} samples and {resamples} resamples.")
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
    """Of the share of True among `hits_N`."""
    return bootstrap_interval(lambda rows: float(rows.mean()), hits_N.double(), resamples, seed=seed)
