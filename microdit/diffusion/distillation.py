"""Distillation to few steps: one Euler step of the student lands where several steps of its teacher do, guidance included.

This is progressive distillation (2202.00512) in a single round, with the guidance of 2210.03142. A student has the network, the objective
and the solver of any other model, so checkpoints, exports and pipelines need nothing new; only its noise levels are fixed.

Shape legend: B batch, C channels, H W height and width.
"""

import torch
from torch import Tensor

from microdit.diffusion.objective import Objective
from microdit.diffusion.samplers import Denoiser, state_dtype


@torch.no_grad()
def distilled_estimate(objective: Objective, teacher: Denoiser, noisy_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Return the denoised estimate that the student has to make of `noisy_BCHW`, (B, C, H, W), float32.

    `objective` is the student's, and each of `sigma_B` one of its noise levels. From there the teacher takes its steps to the student's
    next level by Heun's method, as `samplers.heun` does; the estimate is the one with which Euler's method gets there in one step
    (2202.00512, appendix G, in terms of sigma).
    """
    every = objective.teacher_steps // objective.student_steps
    levels = objective.noise_schedule(objective.teacher_steps).to(noisy_BCHW.device, state_dtype(noisy_BCHW.device))
    first_B = (levels[:-1:every] - sigma_B[:, None]).abs().argmin(dim=1) * every
    x = start = noisy_BCHW.to(levels.dtype)
    for step in range(every):
        x = _heun_step(objective, teacher, x, levels[first_B + step], levels[first_B + step + 1])
    sigma_B111, next_B111 = levels[first_B].view(-1, 1, 1, 1), levels[first_B + every].view(-1, 1, 1, 1)
    slope = (x - start) / (next_B111 - sigma_B111)
    return (start - sigma_B111.clamp(min=objective.slope_floor) * slope).float()


def _heun_step(objective: Objective, denoiser: Denoiser, x_BCHW: Tensor, sigma_B: Tensor, next_B: Tensor) -> Tensor:
    """Take one step from a noise level of each sample to its next one. A step to 0 is of first order."""

    def slope(x_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        denoised_BCHW = denoiser(x_BCHW.float(), sigma_B.float()).to(x_BCHW.dtype)
        return (x_BCHW - denoised_BCHW) / sigma_B.clamp(min=objective.slope_floor).view(-1, 1, 1, 1)

    length_B111 = (next_B - sigma_B).view(-1, 1, 1, 1)
    first_BCHW = slope(x_BCHW, sigma_B)
    euler_BCHW = x_BCHW + length_B111 * first_BCHW
    ends_B = next_B == 0
    second_BCHW = slope(euler_BCHW, torch.where(ends_B, sigma_B, next_B))  # of samples that end, unused
    return torch.where(ends_B.view(-1, 1, 1, 1), euler_BCHW, x_BCHW + length_B111 * (first_BCHW + second_BCHW) / 2)
