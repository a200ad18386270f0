import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torchmetrics.image.fid import FrechetInceptionDistance

from microdit.errors import UserError
from microdit.evaluation.frechet import (
    Gaussian,
    Moments,
    Origin,
    bootstrap_interval,
    few_samples_warning,
    fit_gaussian,
    frechet_distance,
    frechet_infinity,
    load_statistics,
    save_statistics,
)

ORIGIN = Origin("0123456789abcdef", "bicubic", "two hundred pictures")


def normal(count: int, dimensions: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(dimensions: int, seed: int) -> torch.Tensor:
    mix = normal(dimensions, dimensions, seed)
    return mix @ mix.T


@given(st.lists(st.floats(0, 9), min_size=1, max_size=6), st.integers(0, 1000))
def test_of_commuting_covariances_it_is_the_distance_of_means_and_of_standard_deviations(deviations, seed):
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
    features_a, features_b = normal(200, 12, 1), 1.5 * normal(300, 12, 2) + 0.3
    peer = FrechetInceptionDistance(feature=torch.nn.Flatten(), input_img_size=(3, 2, 2))
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


@given(st.lists(st.integers(1, 7), min_size=1, max_size=8), st.floats(-1e6, 1e6), st.randoms())
def test_moments_are_the_same_for_any_split_and_any_order_of_merging(sizes, offset, random):
    features = normal(sum(sizes) + 2, 4) + offset
    whole = fit_gaussian(features)
    parts = []
    for batch in features.split([*sizes, 2]):
        parts.append(Moments(4))
        parts[-1].add(batch[:1])
        if len(batch) > 1:
            parts[-1].add(batch[1:])
    parts.append(Moments(4))  # one that saw nothing
    random.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    gaussian = merged.gaussian()
    assert gaussian.count == len(features)
    torch.testing.assert_close(gaussian.mean, whole.mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gaussian.covariance, whole.covariance, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(gaussian.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-8, atol=1e-8)


def test_far_from_the_origin_no_digits_are_lost():
    """Integers around 10^9: in float64 the squares' sum has lost the variance, which is that of 0, 1 and 2 exactly."""
    moments = Moments(1)
    for value in (0.0, 1.0, 2.0):
        moments.add(torch.tensor([[1e9 + value]], dtype=torch.float64))
    assert moments.gaussian().covariance.item() == pytest.approx(1.0, rel=1e-6)


def test_infinity_is_nearer_to_0_than_the_distance_of_samples_of_the_reference_itself():
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
        with pytest.raises(UserError, match="FID-infinity needs at least 2 subsets, of 2 to 9 of the 10 samples"):
            frechet_infinity(normal(10, 2), reference, **settings)


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


def test_statistics_come_back_as_they_were(tmp_path):
    gaussian = fit_gaussian(normal(30, 5))
    save_statistics(tmp_path / "s.safetensors", gaussian, ORIGIN)
    loaded, origin = load_statistics(tmp_path / "s.safetensors", ORIGIN.encoder, ORIGIN.resize)
    assert origin == ORIGIN
    assert loaded.count == 30
    assert torch.equal(loaded.mean, gaussian.mean)
    assert torch.equal(loaded.covariance, gaussian.covariance)


def test_statistics_of_another_encoder_or_resize_are_refused(tmp_path):
    save_statistics(tmp_path / "s.safetensors", fit_gaussian(normal(30, 5)), ORIGIN)
    for encoder, resize in (("fedcba9876543210", "bicubic"), (ORIGIN.encoder, "bilinear")):
        with pytest.raises(UserError, match="statistics of the encoder 0123456789abcdef with pictures resized by bicubic"):
            load_statistics(tmp_path / "s.safetensors", encoder, resize)


@given(st.data())
def test_no_changed_bit_of_statistics_goes_unseen(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    save_statistics(path, fit_gaussian(normal(30, 3)), ORIGIN)
    content = bytearray(path.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="holds no whole feature statistics"):
        load_statistics(path, ORIGIN.encoder, ORIGIN.resize)


def test_what_is_no_statistics_file_is_refused(tmp_path):
    save_statistics(tmp_path / "s.safetensors", fit_gaussian(normal(30, 3)), ORIGIN)
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "s.safetensors").read_bytes()[:-1])
    (tmp_path / "text.safetensors").write_text("statistics")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    save_file({"mean": torch.zeros(2), "covariance": torch.eye(2)}, tmp_path / "strange.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    for name in ("short", "text", "empty", "strange", "weights", "missing"):
        with pytest.raises(UserError, match=rf"{name}\.safetensors holds no whole feature statistics"):
            load_statistics(tmp_path / f"{name}.safetensors", ORIGIN.encoder, ORIGIN.resize)


def test_features_that_do_not_fit_are_refused():
    moments = Moments(3)
    moments.add(normal(1, 3))
    with pytest.raises(UserError, match="at least 2 pictures, and there are 1"):
        moments.gaussian()
    with pytest.raises(UserError, match="Features of 4 and of 3 dimensions"):
        moments.add(normal(2, 4))
    with pytest.raises(UserError, match="Features of 2 and of 3 dimensions"):
        moments.merge(Moments(2))
    with pytest.raises(UserError, match="Features of 3 and of 4 dimensions"):
        frechet_distance(fit_gaussian(normal(9, 3)), fit_gaussian(normal(9, 4)))
    with pytest.raises(UserError, match="Features of 3 and of 4 dimensions"):
        frechet_infinity(normal(99, 3), fit_gaussian(normal(9, 4)))
    broken = normal(5, 3)
    broken[1, 0], broken[3] = torch.nan, torch.inf
    with pytest.raises(UserError, match="features of 2 of 5 pictures are not finite"):
        moments.add(broken)
    for shape in ((0, 3), (3,), (3, 0)):
        with pytest.raises(UserError, match="table of pictures by dimensions"):
            fit_gaussian(torch.zeros(shape))


def test_too_few_samples_are_said_to_be_too_few():
    assert few_samples_warning(2049, 2048) is None
    assert "2048 samples are too few for 2048 features" in (few_samples_warning(2048, 2048) or "")
