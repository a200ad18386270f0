import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from microdit.data.dataset import Batch
from microdit.diffusion.edm import EDM
from microdit.training.meters import StepSums, Tally, noise_bins
from microdit.training.noise import _keys, _words, add_draws, uniforms


def drawn(numbers: range, seed=0, step=0, mask_ratio=0.75, caption_dropout=0.1, path_drop=0.0, pattern="random"):
    n = len(numbers)
    batch = Batch(torch.zeros(n, 4, 16, 16), torch.ones(n, 3, 5), torch.ones(n, 3, dtype=torch.bool))
    return add_draws(batch, EDM(), seed, step, numbers, (8, 8), mask_ratio, caption_dropout, path_drop, pattern)


@given(world=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99), step=st.integers(0, 10**6))
def test_a_samples_draws_do_not_depend_on_how_the_batch_is_cut(world, micro, seed, step):
    whole = drawn(range(16), seed, step, path_drop=0.5)
    for rank in range(world):
        parts = drawn(range(rank, 16, world), seed, step, path_drop=0.5).split(micro)
        assert sum(len(part) for part in parts) == 16 // world
        for name in ("sigma_B", "noise_BCHW", "caption_kept_B", "keep_ids_BK", "path_keep_mask_B"):
            assert torch.cat([getattr(part, name) for part in parts]).equal(getattr(whole, name)[rank::world])


def test_seeds_steps_and_samples_differ():
    rows = torch.cat([drawn(range(4), seed, step).noise_BCHW.flatten(1) for seed in range(3) for step in range(3)])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 6 / math.sqrt(rows.shape[1])


def test_the_draws_have_the_distributions_asked_for():
    draws = drawn(range(4000), caption_dropout=0.1)
    log_sigma = draws.sigma_B.log()
    assert log_sigma.mean().item() == pytest.approx(-0.6, abs=0.08)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.06)
    assert draws.caption_kept_B.mean().item() == pytest.approx(0.9, abs=0.02)
    assert draws.noise_BCHW.std().item() == pytest.approx(1, abs=0.01)
    assert draws.keep_ids_BK.shape == (4000, 16)
    assert all(len(set(row)) == 16 for row in draws.keep_ids_BK.tolist())
    assert torch.bincount(draws.keep_ids_BK.flatten(), minlength=64).float().std() < 60  # of 1,000 each
    assert torch.bincount(noise_bins(draws.sigma_B, EDM()), minlength=8).float().sub(500).abs().max() < 100


def test_paths_are_dropped_as_often_as_asked_and_no_other_draw_knows_of_it():
    plain, dropping = drawn(range(4000)), drawn(range(4000), path_drop=0.1)
    assert plain.path_keep_mask_B is None
    assert dropping.path_keep_mask_B.mean().item() == pytest.approx(0.9, abs=0.02)
    both_dropped = ((1 - dropping.path_keep_mask_B) * (1 - dropping.caption_kept_B)).mean().item()
    assert both_dropped == pytest.approx(0.01, abs=0.006)  # caption and path, each on its own
    for name in ("sigma_B", "noise_BCHW", "caption_kept_B", "keep_ids_BK"):
        assert getattr(plain, name).equal(getattr(dropping, name))


def splitmix(key: int, count: int) -> list[int]:
    """The generator as published (Steele et al. 2014), in plain integers."""
    words = []
    for number in range(1, count + 1):
        word = (key + number * 0x9E3779B97F4A7C15) % 2**64
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        words.append(word ^ word >> 31)
    return words


@given(seed=st.integers(0, 2**40), step=st.integers(0, 10**9), number=st.integers(0, 10**5))
def test_the_draws_are_those_of_the_published_generator(seed, step, number):
    """So a run that goes on meets the same numbers on every machine and with every version."""
    draws = drawn(range(number, number + 1), seed, step, path_drop=0.5)
    start = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + number + 1 - 0x9E3779B97F4A7C15) % 2**64
    (key,) = splitmix(start, 1)
    size = 4 * 16 * 16
    words = splitmix(key, 3 + size // 2 + 64)
    chances, normal, scores = words[:2], words[2 : 3 + size // 2], words[3 + size // 2 :]
    radii = [math.sqrt(-2 * math.log(((word >> 32) + 1) / 2**32)) for word in normal]
    angles = [2 * math.pi * (word % 2**32) / 2**32 for word in normal]
    numbers = [r * math.cos(a) for r, a in zip(radii, angles, strict=True)] + [r * math.sin(a) for r, a in zip(radii, angles, strict=True)]
    assert draws.noise_BCHW.flatten().tolist() == pytest.approx(numbers[:size], rel=1e-6, abs=1e-7)
    assert draws.sigma_B.item() == pytest.approx(math.exp(-0.6 + 1.2 * numbers[size]), rel=1e-5)
    assert draws.caption_kept_B.item() == (chances[0] / 2**64 >= 0.1)
    assert draws.path_keep_mask_B.item() == (chances[1] / 2**64 >= 0.5)
    signed = [score - 2**64 if score >= 2**63 else score for score in scores]
    assert draws.keep_ids_BK[0].tolist() == sorted(range(64), key=signed.__getitem__)[:16]


def test_normals_are_normal_and_uniforms_uniform():
    """By Kolmogorov and Smirnov, and numbers that lie side by side do not know of each other."""
    noise = drawn(range(500)).noise_BCHW.flatten().numpy()
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert stats.kstest(noise[1:] * noise[:-1], (noise[2:] * noise[:-2])).pvalue > 1e-3
    words = torch.cat([_words(_keys(0, step, range(500), torch.device("cpu")), 0, 200) for step in range(3)])
    assert stats.kstest(uniforms(words).flatten().numpy(), "uniform").pvalue > 1e-3
    halves = [uniforms(words)[:, at::2].flatten() for at in (0, 1)]
    assert abs(stats.spearmanr(*halves).statistic) < 4 / math.sqrt(len(halves[0]))


def test_a_grid_draws_one_of_each_2_x_2():
    ids = drawn(range(50), pattern="grid").keep_ids_BK
    cell = ids // 16 * 4 + ids % 8 // 2  # rows of 8: two of them hold four cells
    assert torch.equal(cell.sort(dim=1).values, torch.arange(16).expand(50, 16))


def test_without_a_mask_nothing_is_dropped():
    assert drawn(range(4), mask_ratio=0.0).keep_ids_BK is None


def test_a_tally_adds_up_by_noise_level():
    edm, tally = EDM(), Tally(torch.device("cpu"))
    loss, sigma = torch.rand(50), drawn(range(50)).sigma_B
    tally.add(loss[:20], sigma[:20], edm)
    tally.add(loss[20:], sigma[20:], edm)
    tally.add_stops(by_machine=True, by_user=False)
    sums = StepSums.of(tally.sums.tolist())
    assert tally.loss.item() == pytest.approx(sums.loss)
    assert sums.loss == pytest.approx(loss.mean().item(), rel=1e-6)
    assert (sums.stop_by_machine, sums.stop_by_user) == (True, False)
    levels = torch.tensor([torch.special.ndtr((s.log() + 0.6) / 1.2).item() for s in sigma])
    for index in range(8):
        inside = (levels >= index / 8) & (levels < (index + 1) / 8)
        assert sums.counts[index] == inside.sum().item()
        assert sums.losses[index] == pytest.approx(loss[inside].sum().item(), abs=1e-5)
