import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from microdit.errors import UserError
from microdit.evaluation.metrics import kid as kid_file
from microdit.evaluation.metrics.kid import cmmd, kid, paired_kid


def normal(count: int, dimensions: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """Equation 3 of Gretton et al. 2012, as it is written."""

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_of_subsets_that_are_the_whole_it_is_the_naive_double_loop():
    x, y = normal(30, 5, 1), 1.3 * normal(30, 5, 2) + 0.4
    found = kid(x, y, subset_size=30, subsets=3)
    assert found.value == pytest.approx(naive_mmd(x, y), rel=1e-12)
    assert found.subset_deviation == pytest.approx(0, abs=1e-12)


def test_it_is_what_torchmetrics_gives():
    peer = pytest.importorskip("torchmetrics.image.kid")
    x, y = normal(50, 8, 1), normal(50, 8, 2).exp()
    assert kid(x, y, subset_size=50, subsets=2).value == pytest.approx(float(peer.poly_mmd(x, y)), rel=1e-9)


def test_of_equal_distributions_it_is_0_on_average_at_any_size():
    """Within 3 of its own standard errors, over 400 pairs of sets."""
    for size in (5, 50):
        values = np.array([kid(normal(size, 6, 2 * s), normal(size, 6, 2 * s + 1), size, 2).value for s in range(400)])
        assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
        assert (values < 0).any()


def test_of_pairs_it_is_the_naive_double_loop():
    """Equation 4 of Gretton et al. 2012, as it is written."""
    x, y = normal(20, 5, 1), 1.3 * normal(20, 5, 2) + 0.4

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    pairs = [(i, j) for i in range(20) for j in range(20) if i != j]
    h = [kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i]) for i, j in pairs]
    assert paired_kid(x, y) == pytest.approx(sum(h) / (20 * 19), rel=1e-12)


def test_pairs_that_are_alike_do_not_lower_it():
    """Of one distribution, y following x: 0 on average, where the estimator for independent sets lies below. Of x and itself: 0."""
    paired, independent = [], []
    for seed in range(400):
        x = normal(20, 6, 2 * seed)
        y = 0.8 * x + 0.6 * normal(20, 6, 2 * seed + 1)
        paired.append(paired_kid(x, y))
        independent.append(kid(x, y, 20, 2).value)
    for values, expected in ((np.array(paired), True), (np.array(independent), False)):
        assert bool(abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))) is expected
    assert paired_kid(x, x) == pytest.approx(0, abs=1e-12)
    with pytest.raises(UserError, match="sets of equal size, not 20 images in one set and 19"):
        paired_kid(x, x[1:])


@dataclass(frozen=True)
class Normal:
    """Independent normal features: `dimensions` of them, each of this mean and deviation."""

    dimensions: int
    mean: float = 0.0
    deviation: float = 1.0

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randn(count, self.dimensions, dtype=torch.float64, generator=generator)
        return self.mean + self.deviation * rows


def exact_kernel(p: Normal, q: Normal) -> float:
    """E (x.y / D + 1)^3 for independent x of p and y of q: by the binomial, from the first three moments of x.y."""
    d, v, w = p.dimensions, p.deviation**2, q.deviation**2
    m, mm, nn = d * p.mean * q.mean, d * p.mean**2, d * q.mean**2
    second = d * v * w + w * mm + v * nn + m**2
    third = m**3 + 3 * m * v * nn + 3 * m * (w * mm + d * v * w) + 6 * v * w * m  # y given x is normal, and then x is
    return 1 + 3 * m / d + 3 * second / d**2 + third / d**3


def exact_mmd(p: Normal, q: Normal) -> float:
    return exact_kernel(p, p) + exact_kernel(q, q) - 2 * exact_kernel(p, q)


def test_the_closed_form_is_what_many_samples_give():
    p, q = Normal(3, 0.5, 1.2), Normal(3, -0.2, 0.7)
    generator = torch.Generator().manual_seed(0)
    drawn = (p.draw(100_000, generator) * q.draw(100_000, generator)).mean(dim=1)
    assert float(((drawn + 1) ** 3).mean()) == pytest.approx(exact_kernel(p, q), rel=0.02)


def coverage(p: Normal, q: Normal, sizes: tuple[int, int], repetitions: int, **settings: int) -> float:
    """How often the 95% interval of samples of `p` and `q` holds their exact distance."""
    generator, exact, held = torch.Generator().manual_seed(0), exact_mmd(p, q), 0
    for _ in range(repetitions):
        found = kid(p.draw(sizes[0], generator), q.draw(sizes[1], generator), **settings)
        held += found.low <= exact <= found.high
    return held / repetitions


PAIRS = [
    pytest.param(Normal(64), Normal(64), id="equal"),
    pytest.param(Normal(64), Normal(64, 0.05), id="hardly-told"),
    pytest.param(Normal(64), Normal(64, 0.3), id="shifted"),
    pytest.param(Normal(64, 0.5), Normal(64, 0.5, 1.2), id="wider"),
    pytest.param(Normal(8), Normal(8, 1.0), id="far"),
]


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_the_interval_holds_the_true_distance_as_often_as_it_says(p, q):
    """19 times in 20; all samples are in each subset here, which once gave an interval of no width."""
    assert 0.90 <= coverage(p, q, (60, 60), 200, subset_size=60) <= 0.98
    assert 0.90 <= coverage(p, q, (40, 110), 100, subset_size=40, subsets=4) <= 0.98


def test_few_small_subsets_widen_the_interval_by_the_luck_of_their_choice():
    assert 0.90 <= coverage(Normal(64), Normal(64, 0.3), (200, 200), 150, subset_size=20, subsets=8) <= 0.98


def test_below_zero_the_interval_is_as_wide_as_the_estimates_spread():
    """Of equal distributions most lower bounds are below 0, where no true distance lies that would show one to be wrong."""
    generator, p = torch.Generator().manual_seed(0), Normal(64)
    found = [kid(p.draw(60, generator), p.draw(60, generator), subset_size=60) for _ in range(400)]
    assert sum(one.low < 0 for one in found) > 380
    spread = np.std([one.value for one in found], ddof=1)
    assert np.mean([one.value - one.low for one in found]) == pytest.approx(1.96 * spread, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("p", "q"), [PAIRS[0], PAIRS[2], PAIRS[3]])
@pytest.mark.parametrize("sizes", [(200, 200), (600, 600), (512, 1807), (2000, 2000)])
def test_at_the_sizes_of_evaluations_too(p, q, sizes):
    assert 0.90 <= coverage(p, q, sizes, 200, subset_size=min(1000, *sizes), subsets=5) <= 0.98


def test_more_subsets_take_away_what_their_choice_adds_and_no_more():
    generator = torch.Generator().manual_seed(0)
    x, y = Normal(8).draw(400, generator), Normal(8, 0.5).draw(400, generator)
    widths = [found.high - found.low for found in (kid(x, y, 50, subsets) for subsets in (5, 30, 600))] + [
        found.high - found.low for found in [kid(x, y, 400)]
    ]
    assert widths[0] > widths[1] > 0.95 * widths[2]
    assert widths[2] == pytest.approx(widths[3], rel=0.15)


def test_the_same_seed_draws_the_same_subsets():
    x, y = normal(100, 4, 1), normal(80, 4, 2)
    assert kid(x, y, 20, 5) == kid(x, y, 20, 5)
    assert kid(x, y, 20, 5) != kid(x, y, 20, 5, seed=1)


def naive_cmmd(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = (torch.stack([row / row.norm() for row in rows]) for rows in (x, y))

    def mean_kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return sum(math.exp(-float((p - q).square().sum()) / (2 * 10**2)) for p in a for q in b) / (len(a) * len(b))

    return 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_cmmd_is_the_naive_double_loop_in_blocks_of_any_size(block, monkeypatch):
    monkeypatch.setattr(kid_file, "BLOCK", block)
    x, y = normal(20, 6, 1), normal(31, 6, 2) + 1
    assert cmmd(x, y) == pytest.approx(naive_cmmd(x, y), rel=1e-9)
    assert cmmd(x, 5 * y) == pytest.approx(cmmd(y, x), rel=1e-9)


def test_cmmd_of_a_set_and_itself_is_0_and_of_two_points_the_closed_form():
    x = normal(50, 6)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)
    opposite = cmmd(torch.tensor([[3.0, 0.0]]), torch.tensor([[-1.0, 0.0]]))
    assert opposite == pytest.approx(1000 * (2 - 2 * math.exp(-4 / 200)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="KID of sets of 500 and 2000 samples needs at least 2 subsets of 4 to 500 samples"):
        kid(normal(500, 2), normal(2000, 2))
    for settings in ({"subset_size": 3}, {"subsets": 1}):
        with pytest.raises(UserError, match="KID of sets of"):
            kid(normal(1000, 2), normal(1000, 2), **settings)
    for metric in (kid, cmmd):
        with pytest.raises(UserError, match="Features of 2 and 3 dimensions"):
            metric(normal(9, 2), normal(9, 3))
    with pytest.raises(UserError, match="not finite"):
        cmmd(torch.full((2, 2), torch.nan), normal(2, 2))
