import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microdit.errors import UserError
from microdit.evaluation.metrics import prdc as module
from microdit.evaluation.metrics.prdc import compute_prdc, prdc_rows


def normal(count: int, dimensions: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def balls(centres: torch.Tensor, points: torch.Tensor, k: int) -> list[list[bool]]:
    """For each centre: which points lie in its ball."""
    found = []
    for i, centre in enumerate(centres):
        radius = sorted((centre - other).norm().item() for j, other in enumerate(centres) if j != i)[k - 1]
        found.append([(centre - point).norm().item() <= radius for point in points])
    return found


def naive(real: torch.Tensor, generated: torch.Tensor, k: int, density_k: int) -> tuple[list[bool], list[bool], list[float], list[bool]]:
    """The equations of both papers, as they are written, before the mean is taken."""
    in_real, in_generated, in_dense = balls(real, generated, k), balls(generated, real, k), balls(real, generated, density_k)
    precise = [any(ball[j] for ball in in_real) for j in range(len(generated))]
    recalled = [any(ball[i] for ball in in_generated) for i in range(len(real))]
    density = [sum(ball[j] for ball in in_dense) / density_k for j in range(len(generated))]
    return precise, recalled, density, [any(ball) for ball in in_dense]


@given(
    st.integers(5, 25),
    st.integers(5, 25),
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(0, 2),
    st.integers(0, 999),
    st.sampled_from([8, 64, 1 << 24]),
)
def test_all_four_are_the_naive_loops_in_blocks_of_any_size(reals, generateds, k, density_k, shift, seed, entries):
    real, generated = normal(reals, 3, seed) + 100, normal(generateds, 3, seed + 1) + 100 + shift
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_ENTRIES", entries)
        counted: list[int] = []
        found = compute_prdc(real, generated, k, density_k, counted.append)
    rows = found.precise_M, found.recalled_N, found.density_M, found.covered_N
    expected = naive(real, generated, k, density_k)
    assert tuple(row.tolist() for row in rows) == expected
    shares = found.precision, found.recall, found.density, found.coverage
    assert shares == pytest.approx(tuple(sum(row) / len(row) for row in expected))
    assert sum(counted) == prdc_rows(real, generated)


def test_equal_sets_have_everything():
    """Also where features lie far from the origin, and where pictures occur twice, so that balls are points."""
    for features in (normal(60, 4), normal(60, 4) * 1e-3 + 1e4, normal(20, 4).repeat(3, 1) + 50):
        for k in (1, 2):
            found = compute_prdc(features, features.clone(), k, k)
            assert (found.precision, found.recall, found.coverage) == (1.0, 1.0, 1.0)


def test_disjoint_sets_have_nothing():
    found = compute_prdc(normal(50, 4), normal(50, 4, 1) + 100)
    assert (found.precision, found.recall, found.density, found.coverage) == (0.0, 0.0, 0.0, 0.0)


def test_a_dropped_mode_costs_recall_and_an_invented_one_precision():
    """Two clusters far from each other, of 300 and 100; the other set knows the large one only."""
    large, small, again = normal(300, 3), normal(100, 3, 1) + 100, normal(300, 3, 2)
    both = torch.cat([large, small])
    dropped, invented = compute_prdc(both, again), compute_prdc(again, both)
    assert dropped.precision > 0.85
    assert 0.85 * 0.75 < dropped.recall <= 0.75
    assert (invented.precision, invented.recall) == (dropped.recall, dropped.precision)
    assert 0.85 * 0.75 < dropped.coverage <= 0.75
    assert invented.density == pytest.approx(0.75 * compute_prdc(again, large).density)


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_of_equal_distributions_match_the_paper(k):
    """Expectations: density 1, coverage 1 - (N - 1)...(N - k) / ((2N - 1)...(2N - k)), whatever the distribution."""
    size, runs = 100, 60
    found = [compute_prdc(normal(size, 4, 2 * s), normal(size, 4, 2 * s + 1), density_k=k) for s in range(runs)]
    missed = 1.0
    for i in range(1, k + 1):
        missed *= (size - i) / (2 * size - i)
    assert sum(one.coverage for one in found) / runs == pytest.approx(1 - missed, abs=0.02)
    assert sum(one.density for one in found) / runs == pytest.approx(1, abs=0.06)


def test_one_outlier_spoils_precision_but_not_density():
    """A real picture far off has a ball that holds everything: noise beside the real ones counts as real, but not k times."""
    real, noise = normal(200, 4), normal(200, 4, 1) + 12
    spoilt = torch.cat([real, torch.full((1, 4), 40.0, dtype=torch.float64)])
    assert compute_prdc(real, noise).precision == 0
    found = compute_prdc(spoilt, noise)
    assert found.precision == 1
    assert found.density == pytest.approx(1 / 5)


def test_what_does_not_fit_is_refused():
    for ks in ((3, 1), (1, 3)):
        with pytest.raises(UserError, match="There is no neighbour number 3 among 3 images"):
            compute_prdc(normal(9, 2), normal(3, 2), *ks)
        with pytest.raises(UserError, match="There is no neighbour number 0"):
            compute_prdc(normal(9, 2), normal(9, 2), *(k % 3 for k in ks))
    with pytest.raises(UserError, match="Features of 2 and 3 dimensions"):
        compute_prdc(normal(9, 2), normal(9, 3))
    with pytest.raises(UserError, match="not finite"):
        compute_prdc(torch.full((9, 2), torch.inf), normal(9, 2))
