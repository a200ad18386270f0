from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from microdit.errors import UserError
from microdit.evaluation.metrics.bootstrap import half_sample_interval
from microdit.evaluation.metrics.frechet import (
    Gaussian,
    few_samples_warning,
    fit_gaussian,
    frechet_distance,
    frechet_infinity,
    frechet_interval,
    sample_distance,
)


def normal(count: int, dimensions: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(dimensions: int, seed: int) -> torch.Tensor:
    mix = normal(dimensions, dimensions, seed)
    return mix @ mix.T


@given(st.lists(st.floats(0, 9), min_size=1, max_size=6), st.integers(0, 1000))
def test_the_closed_form_for_commuting_covariances(deviations, seed):
    """Closed form: |m_a - m_b|^2 + sum (s_a - s_b)^2 in the common eigenbasis, singular covariances among them."""
    dimensions = len(deviations)
    basis = torch.linalg.qr(normal(dimensions, dimensions, seed)).Q
    mean_a, mean_b = normal(2, dimensions, seed + 1)
    s_a = torch.tensor(deviations, dtype=torch.float64)
    s_b = s_a.flip(0) + 1
    a, b = (Gaussian(mean, basis @ torch.diag(s**2) @ basis.T, 100) for mean, s in ((mean_a, s_a), (mean_b, s_b)))
    expected = float((mean_a - mean_b).square().sum() + (s_a - s_b).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_it_is_what_scipys_matrix_square_root_gives():
    for seed in range(5):
        a = Gaussian(normal(1, 20, seed)[0], correlated(20, seed + 10), 100)
        b = Gaussian(normal(1, 20, seed + 20)[0], correlated(20, seed + 30), 100)
        root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
        expected = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()) - 2 * np.trace(root)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_it_is_what_torchmetrics_gives():
    """Its network is one that hands on the features, folded into the shape of small pictures."""
    fid = pytest.importorskip("torchmetrics.image.fid")
    features_a, features_b = normal(200, 12, 1), 1.5 * normal(300, 12, 2) + 0.3
    peer = fid.FrechetInceptionDistance(feature=torch.nn.Flatten(), input_img_size=(3, 2, 2))
    peer.set_dtype(torch.float64)
    peer.update(features_a.view(-1, 3, 2, 2), real=True)
    peer.update(features_b.view(-1, 3, 2, 2), real=False)
    assert frechet_distance(fit_gaussian(features_a), fit_gaussian(features_b)) == pytest.approx(float(peer.compute()), rel=1e-5)


@pytest.mark.parametrize("count", [3, 20, 50, 51, 200])
def test_a_set_is_at_distance_0_from_itself_and_a_shift_gives_its_square(count):
    """With up to 50 samples of 50 features the covariance is singular."""
    features = normal(count, 50) * torch.logspace(-3, 3, 50, dtype=torch.float64)
    gaussian = fit_gaussian(features)
    scale = float(gaussian.covariance.trace())
    assert frechet_distance(gaussian, gaussian) == pytest.approx(0, abs=1e-12 * scale)
    shift = torch.linspace(-2, 2, 50, dtype=torch.float64)
    moved = frechet_distance(gaussian, fit_gaussian(features + shift))
    assert moved == pytest.approx(float(shift.square().sum()), abs=1e-9 * scale)


def test_singular_covariances_of_different_planes_are_right():
    """On orthogonal axes C_a C_b is 0, and on one shared axis its root is the product of the deviations."""
    a, b = (
        Gaussian(torch.zeros(3, dtype=torch.float64), torch.diag(torch.tensor(d, dtype=torch.float64)), 9) for d in ([4, 9, 0], [0, 1, 25])
    )
    assert frechet_distance(a, b) == pytest.approx(13 + 26 - 2 * 3)


def test_far_from_the_origin_no_digits_are_lost():
    """Integers around 10^9: in float64 the squares' sum has lost the variance, which is that of 0, 1 and 2 exactly."""
    features = torch.tensor([[1e9], [1e9 + 1], [1e9 + 2]], dtype=torch.float64)
    assert fit_gaussian(features).covariance.item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("count", [5, 12, 13, 40])
def test_the_interval_surrounds_the_distance_with_few_or_many_samples(count):
    """Of fewer samples than dimensions another root is taken, which must make no difference."""
    reference, samples = fit_gaussian(normal(50, 12, 1)), normal(count, 12, 2)
    counted: list[int] = []
    interval = frechet_interval(samples, reference, resamples=20, on_distance=counted.append)
    assert interval.value == pytest.approx(frechet_distance(fit_gaussian(samples), reference), rel=1e-9)
    assert interval.low < interval.value < interval.high
    assert sum(counted) == 41


@given(
    st.integers(2, 40),
    st.integers(2, 40),
    st.integers(1, 20),
    st.floats(0, 4),
    st.sampled_from([0.0, 1e-3, 3.0, 1e6]),
    st.booleans(),
    st.integers(0, 999),
)
def test_of_samples_it_is_what_their_gaussian_gives(count, references, dimensions, decay, shift, copies, seed):
    """By singular values of the Gaussians' roots, as it was computed before: of features from equal to hardly there, of sets of copies."""
    spread = torch.arange(1, dimensions + 1, dtype=torch.float64) ** -decay
    samples, others = normal(count, dimensions, seed) * spread + shift, normal(references, dimensions, seed + 1) * spread
    if copies:
        samples, others = samples[:1].expand(count, -1), torch.cat([others, others])
    a, b = fit_gaussian(samples), fit_gaussian(others)
    roots = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum()
    scale = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace())
    expected = max(0.0, scale - 2 * roots)
    for found in (sample_distance(samples, b), frechet_distance(a, b), frechet_distance(b, a)):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-7 * scale if decay > 2 else 1e-11 * scale)


@pytest.mark.parametrize(("count", "dimensions"), [(14, 40), (60, 12)])
def test_intervals_and_extrapolations_are_those_of_each_subset_on_its_own(count, dimensions):
    """The naive way: a Gaussian fitted to each half and to each subset, drawn by the same seed."""
    samples, reference = normal(count, dimensions, 1) + 0.2, fit_gaussian(normal(90, dimensions, 2))

    def naive(rows_SD: torch.Tensor) -> float:
        return frechet_distance(fit_gaussian(rows_SD), reference)

    found, expected = frechet_interval(samples, reference, 9, seed=3), half_sample_interval(naive, samples, 9, seed=3)
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high), rel=1e-9)
    line, counted = frechet_infinity(samples, reference, 5, 4, seed=3), []
    generator = torch.Generator().manual_seed(3)
    distances = [naive(samples[torch.randperm(count, generator=generator)[:size]]) for size in line.counts]
    assert line.distances == pytest.approx(distances, rel=1e-9)
    assert line.distance == pytest.approx(np.polyfit(1 / np.array(line.counts), distances, 1)[1], rel=1e-9)
    assert frechet_infinity(samples, reference, 5, 4, 3, counted.append) == line
    assert sum(counted) == 5


@pytest.mark.parametrize("count", [2, 7, 39, 40, 60])
def test_a_root_that_is_kept_is_one_of_the_covariance(count):
    """Up to 40 samples of 40 features their deviations are kept; the covariance alone gives the same distances."""
    kept, other = fit_gaussian(normal(count, 40, 1)), fit_gaussian(normal(90, 40, 2))
    assert (kept.deviations is None) == (count >= 40)
    root = torch.from_numpy(kept.root)
    assert torch.allclose(root @ root.T, kept.covariance, rtol=0, atol=1e-12)
    computed = replace(kept, deviations=None)
    assert frechet_distance(kept, other) == pytest.approx(frechet_distance(computed, other), rel=1e-7)
    assert sample_distance(normal(50, 40, 3), kept) == pytest.approx(sample_distance(normal(50, 40, 3), computed), rel=1e-7)


CASES = [
    (64, 48, 0.0, 1.0),
    (64, 48, 0.5, 1.3),
    (64, 64, 0.5, 1.0),
    (32, 40, 0.0, 1.0),
    (16, 60, 0.5, 1.0),
    (16, 60, 0.0, 1.0),
    (8, 400, 0.0, 1.0),
]


def repeated(dimensions: int, count: int, shift: float, scale: float, repetitions: int, resamples: int) -> tuple[float, float, float]:
    """How often the interval holds the expectation, the intervals' mean width, and that which the distances' true spread would give.

    The samples are normal and `shift`ed and `scale`d against the reference; the expectation is the mean over a thousand other sets.
    """
    reference = Gaussian(torch.zeros(dimensions, dtype=torch.float64), torch.eye(dimensions, dtype=torch.float64), 10**9)
    distances = [
        frechet_distance(fit_gaussian(normal(count, dimensions, 1000 + seed) * scale + shift), reference) for seed in range(4 * repetitions)
    ]
    expectation, spread, held, widths = np.mean(distances), np.std(distances, ddof=1), 0, []
    for seed in range(repetitions):
        interval = frechet_interval(normal(count, dimensions, seed) * scale + shift, reference, resamples)
        held += interval.low <= expectation <= interval.high
        widths.append(interval.high - interval.low)
    return held / repetitions, float(np.mean(widths)), 2 * 1.96 * float(spread)


@pytest.mark.parametrize("case", [CASES[0], CASES[4]])
def test_an_interval_holds_the_expectation_and_is_not_far_too_wide(case):
    """Of 48 samples of 64 features a bootstrap's is four times as wide as chance moves the distance."""
    held, width, right = repeated(*case, repetitions=60, resamples=12)
    assert held >= 0.88
    assert width < 1.6 * right


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_interval_holds_the_expectation_as_often_as_it_says(case):
    held, width, right = repeated(*case, repetitions=300, resamples=50)
    assert 0.90 <= held <= 0.99
    assert 0.9 * right < width < 1.6 * right


def test_extrapolation_is_nearer_to_0_for_equal_distributions():
    reference = Gaussian(torch.zeros(16, dtype=torch.float64), torch.eye(16, dtype=torch.float64), 10**9)
    for seed in range(4):
        features = normal(2000, 16, seed)
        plain = frechet_distance(fit_gaussian(features), reference)
        infinity = frechet_infinity(features, reference, seed=seed)
        assert abs(infinity.distance) < 0.5 * plain
        assert infinity.counts[0] == 200
        assert infinity.counts[-1] == 2000
        assert infinity.distances[-1] == pytest.approx(plain, rel=1e-9)
        assert infinity.distances[0] > infinity.distances[-1]


def test_infinity_finds_a_true_distance():
    reference = Gaussian(torch.full((8,), 0.5, dtype=torch.float64), torch.eye(8, dtype=torch.float64) * 4, 10**9)
    found = frechet_infinity(normal(5000, 8), reference)
    assert found.distance == pytest.approx(8 * 0.25 + 8 * 1, rel=0.02)
    assert found == frechet_infinity(normal(5000, 8), reference)


def test_infinity_refuses_subsets_that_cannot_be():
    reference = fit_gaussian(normal(10, 2))
    for settings in ({"points": 1}, {"smallest": 1}, {"smallest": 10}):
        with pytest.raises(UserError, match="FID-infinity needs at least 2 subsets of 2 to 9 of the 10 samples"):
            frechet_infinity(normal(10, 2), reference, **settings)


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="at least 2 images, and there are 1"):
        fit_gaussian(normal(1, 3))
    with pytest.raises(UserError, match="Features of 3 and 4 dimensions"):
        frechet_distance(fit_gaussian(normal(9, 3)), fit_gaussian(normal(9, 4)))
    for metric in (frechet_infinity, frechet_interval):
        with pytest.raises(UserError, match="Features of 3 and 4 dimensions"):
            metric(normal(99, 3), fit_gaussian(normal(9, 4)))
    broken = normal(5, 3)
    broken[1, 0], broken[3] = torch.nan, torch.inf
    with pytest.raises(UserError, match="features of 2 of 5 images are not finite"):
        fit_gaussian(broken)
    for shape in ((0, 3), (3,), (3, 0)):
        with pytest.raises(UserError, match="table of images by dimensions"):
            fit_gaussian(torch.zeros(shape))


def test_too_few_samples_are_said_to_be_too_few():
    assert few_samples_warning(2049, 2048) is None
    assert "2048 samples are too few for 2048 features" in (few_samples_warning(2048, 2048) or "")
