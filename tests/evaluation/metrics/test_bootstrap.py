import math

import numpy as np
import pytest
import torch

from microdit.errors import UserError
from microdit.evaluation.metrics.bootstrap import bootstrap_interval, half_sample_interval, share_interval


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


def test_by_halves_the_interval_of_a_mean_is_the_textbooks_too():
    samples = normal(401, 1)[:, 0]
    interval = half_sample_interval(lambda s: float(s.mean()), samples, resamples=4000)
    error = float(samples.std()) / math.sqrt(401)
    assert interval.value == pytest.approx(float(samples.mean()))
    assert interval.high - interval.value == pytest.approx(1.96 * error, rel=0.05)
    assert interval.value - interval.low == pytest.approx(1.96 * error, rel=0.05)
    assert interval == half_sample_interval(lambda s: float(s.mean()), samples, resamples=4000)
    assert interval != half_sample_interval(lambda s: float(s.mean()), samples, resamples=4000, seed=1)


def test_by_halves_the_interval_of_a_mean_over_pairs_is_not_twice_as_wide():
    """The squared mean of standard normal numbers, at N = 100: its variance is 2 / N^2, where a jackknife would say 4 / N^2."""
    squares = []
    for seed in range(40):
        interval = half_sample_interval(lambda rows: float(rows.mean(dim=0).square().sum()), normal(100, 20, seed), 40)
        squares.append(((interval.high - interval.value) / 1.96) ** 2)
    assert np.mean(squares) == pytest.approx(20 * 2 / 100**2, rel=0.25)


def test_an_interval_of_nothing_is_refused():
    for samples, settings in ((torch.ones(1), {}), (torch.ones(9), {"resamples": 1}), (torch.ones(9), {"confidence": 1.0})):
        with pytest.raises(UserError, match="A bootstrap interval needs at least 2 samples and resamples"):
            bootstrap_interval(lambda s: float(s.mean()), samples, **settings)
    for samples, resamples in ((torch.ones(3), 9), (torch.ones(9), 1)):
        with pytest.raises(UserError, match="A half-sample interval needs at least 4 samples and 2 resamples"):
            half_sample_interval(lambda s: float(s.mean()), samples, resamples)


def test_the_interval_of_a_share_is_that_of_a_binomial():
    hits = torch.arange(400) < 100
    interval = share_interval(hits, resamples=4000)
    error = math.sqrt(0.25 * 0.75 / 400)
    assert interval.value == 0.25
    assert interval.low == pytest.approx(0.25 - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(0.25 + 1.96 * error, abs=0.15 * error)
