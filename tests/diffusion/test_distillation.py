"""Distillation to few steps, compared with the sampler that the student replaces."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from microdit.diffusion.distillation import distilled_estimate
from microdit.diffusion.edm import EDM
from microdit.diffusion.flow import Flow
from microdit.diffusion.samplers import heun, solve

OBJECTIVES = [EDM(0.5), Flow(), Flow("image", shift=3.0, noise_scale=2.0), Flow("noise")]
FEW = [(2, 4), (4, 12), (3, 6)]


def gaussian(objective, spread: float):
    """The exact denoiser of normal data of mean 1 and standard deviation `spread`: the mean of the data, given the noisy latents."""

    def denoise(noisy_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        sigma = sigma_B.double().view(-1, 1, 1, 1)
        signal = torch.ones_like(sigma) if isinstance(objective, EDM) else 1 - sigma
        noise = sigma * objective.noise_scale
        gain = signal * spread**2 / (signal**2 * spread**2 + noise**2)
        return (1 + gain * (noisy_BCHW.double() - signal)).float()

    return denoise


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("few", "many"), FEW)
def test_a_perfect_student_lands_where_its_teacher_does(objective, few, many):
    """Drawing with the estimates that a student is to make, by its own solver, is drawing with the teacher, by Heun's method."""
    student, teacher = replace(objective, student_steps=few, teacher_steps=many), gaussian(objective, 0.4)
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    seen: list[float] = []

    def estimate(noisy_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        seen.append(sigma_B[0].item())
        return distilled_estimate(student, teacher, noisy_BCHW, sigma_B)

    drawn = solve("euler", estimate, noise, student, few)
    levels = objective.noise_schedule(many)
    expected = heun(teacher, noise * objective.noise_scale, levels, floor=objective.slope_floor)
    assert torch.allclose(drawn, expected, atol=2e-5)
    assert seen == pytest.approx(levels[: -1 : many // few].tolist(), rel=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_sample_of_a_batch_has_a_level_of_its_own(objective):
    student, teacher = replace(objective, student_steps=4, teacher_steps=12), gaussian(objective, 0.4)
    levels = student.noise_schedule(12)
    for first, sigma in enumerate(levels[:-1:3].tolist()):
        x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(first)) * max(1.0, sigma)
        sigma_B = levels[:-1:3].float()[torch.tensor([0, first, 3, first, 1])]
        found = distilled_estimate(student, teacher, x, sigma_B)[1::2]
        part = levels[3 * first : 3 * first + 4]
        landed = heun(teacher, x[1::2] / part[0].item(), part, floor=objective.slope_floor)
        euler = x[1::2] + (part[3] - part[0]) * (x[1::2] - found) / max(sigma, objective.slope_floor)
        assert torch.allclose(euler.float(), landed, atol=1e-4 * max(1.0, sigma))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_student_is_trained_at_its_own_levels_equally_often(objective):
    student = replace(objective, student_steps=4, teacher_steps=12)
    normal_B = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400).float()
    sigma_B = student.training_sigma(normal_B)
    assert (sigma_B.diff() >= 0).all()  # in the order of the numbers
    levels, counts = sigma_B.unique(return_counts=True)
    assert counts.tolist() == [100] * 4
    assert levels.tolist() == pytest.approx(objective.noise_schedule(12)[:-1:3].flip(0).tolist(), rel=1e-6)
    ends = student.training_sigma(torch.tensor([-40.0, 40.0]))  # numbers that round to a share of 0 and of 1
    assert ends.tolist() == [levels[0], levels[-1]]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_other_numbers_of_steps_have_the_usual_levels(objective):
    student = replace(objective, student_steps=4, teacher_steps=12)
    for steps in (2, 3, 12, 18):
        assert student.noise_schedule(steps).equal(objective.noise_schedule(steps))
    assert all(a > b for a, b in pairwise(student.noise_schedule(4).tolist()))
