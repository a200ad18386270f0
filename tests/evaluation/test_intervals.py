import math

import numpy as np
import pytest
import torch

from microdit.errors import UserError
from microdit.evaluation.frechet import Gaussian, fit_gaussian, frechet_distance
from microdit.evaluation.intervals import bootstrap_interval, share_interval


def normal(count: int, dimensions: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_interval_of_a_mean_is_the_textbooks():
    """Of normal samples: mean -+ 1.96 standard errors."""
    samples = normal(400, 1)[:, 0]
    interval = bootstrap_interval(lambda s: float(s.mean()), samples, resamples=4000)
    error = float(samples.std()) / math.sqrt(400)
    assert interval.value == pytest.approx(float(samples.mean()))
    assert interval.low == pytest.approx(interval.value - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(interval.value + 1.96 * error, abs=0.15 * error)
    assert interval == bootstrap_interval(lambda s: float(s.mean()), samples, resamples=4000)
    assert interval != bootstrap_interval(lambda s: float(s.mean()), samples, resamples=4000, seed=1)


def test_the_interval_of_a_frechet_distance_holds_its_expectation_as_often_as_it_says():
    """Nine times in ten of 80; an interval of percentiles, which the resamples' own bias lifts, mostly does not."""
    reference = Gaussian(torch.zeros(16, dtype=torch.float64), torch.eye(16, dtype=torch.float64), 10**9)

    def distance(features: torch.Tensor) -> float:
        return frechet_distance(fit_gaussian(features), reference)

    expectation = np.mean([distance(normal(60, 16, 1000 + seed) + 0.5) for seed in range(1000)])
    held = held_by_percentiles = 0
    for seed in range(80):
        drawn = []

        def kept(features: torch.Tensor, drawn: list[float] = drawn) -> float:
            drawn.append(distance(features))
            return drawn[-1]

        interval = bootstrap_interval(kept, normal(60, 16, seed) + 0.5, 100, 0.9, seed)
        held += interval.low <= expectation <= interval.high
        low, high = np.quantile(drawn[1:], [0.05, 0.95])
        held_by_percentiles += low <= expectation <= high
    assert 61 <= held <= 80  # 72 are expected, with a deviation of 2.7
    assert held_by_percentiles < 40


def test_an_interval_of_nothing_is_refused():
    for samples, settings in ((torch.ones(1), {}), (torch.ones(9), {"resamples": 1}), (torch.ones(9), {"confidence": 1.0})):
        with pytest.raises(UserError, match="A bootstrap interval needs at least 2 samples and resamples"):
            bootstrap_interval(lambda s: float(s.mean()), samples, **settings)


def test_the_interval_of_a_share_is_that_of_a_binomial():
    hits = torch.arange(400) < 100
    interval = share_interval(hits, resamples=4000)
    error = math.sqrt(0.25 * 0.75 / 400)
    assert interval.value == 0.25
    assert interval.low == pytest.approx(0.25 - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(0.25 + 1.96 * error, abs=0.15 * error)
