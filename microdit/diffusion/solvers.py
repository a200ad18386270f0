"""From noise to latents: solvers of EDM's differential equation, as small functions over a denoiser.

Shape legend: B batch, C channels, H W height and width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from microdit.diffusion.edm import EDM
from microdit.diffusion.schedulers import dpm, euler
from microdit.diffusion.steps import Denoiser, OnStep, Step, denoised_at, state_dtype

Solver = Literal["heun", "dpm", "euler"]

CALLS_A_STEP: dict[Solver, int] = {"heun": 2, "dpm": 1, "euler": 1}
"""How often each solver asks the denoiser at every step; Heun's last asks once."""


@dataclass(frozen=True)
class Churn:
    """New noise at every step of Heun's method (2206.00364, algorithm 2 and table 5); S_churn 0: none, and the solver is deterministic."""

    S_churn: float = 0.0
    S_tmin: float = 0.0
    S_tmax: float = math.inf
    S_noise: float = 1.0

    def gamma(self, sigma: float, num_steps: int) -> float:
        """By which share of itself the noise level rises before a step."""
        return min(self.S_churn / num_steps, math.sqrt(2) - 1) if self.S_tmin <= sigma <= self.S_tmax else 0.0


DETERMINISTIC = Churn()


def solve(
    solver: Solver,
    denoiser: Denoiser,
    noise_BCHW: Tensor,
    edm: EDM,
    num_steps: int,
    on_step: OnStep | None = None,
    churn: Churn = DETERMINISTIC,
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Latents from standard normal noise, by a solver's name. Churn is Heun's alone; `draw` makes its noise, as `noise_BCHW` was made."""
    if solver == "heun":
        return heun(denoiser, noise_BCHW, noise_schedule(edm, num_steps), on_step, churn, draw)
    assert churn == DETERMINISTIC, "only heun can churn"
    return (dpm if solver == "dpm" else euler)(denoiser, noise_BCHW, edm, num_steps, on_step)


def noise_schedule(edm: EDM, num_steps: int) -> Tensor:
    """num_steps + 1 noise levels from sigma_max down to sigma_min, then 0 (2206.00364, eq. 5), in float64."""
    if num_steps < 2:
        raise ValueError(f"the sampler needs at least 2 steps, got {num_steps}")
    ramp = torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1)
    low, high = edm.sigma_min ** (1 / edm.rho), edm.sigma_max ** (1 / edm.rho)
    return torch.cat([(high + ramp * (low - high)) ** edm.rho, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def heun(
    denoiser: Denoiser,
    noise_BCHW: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None = None,
    churn: Churn = DETERMINISTIC,
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Heun's second-order method down `sigmas` (2206.00364, algorithm 1; with churn algorithm 2). `noise_BCHW` is standard normal.

    The state is kept in float64 (see `state_dtype`), the denoiser computes in float32. Noise levels are numbers on the CPU: nothing waits
    for a GPU. `draw` makes more noise of the same kind, needed for churn only.
    """
    levels = sigmas.tolist()
    x = noise_BCHW.to(state_dtype(noise_BCHW.device)) * levels[0]
    for index, (sigma, next_sigma) in enumerate(pairwise(levels)):
        if churn.S_churn and (gamma := churn.gamma(sigma, len(levels) - 1)):
            assert draw is not None, "churn needs noise"
            x = x + sigma * math.sqrt((1 + gamma) ** 2 - 1) * churn.S_noise * draw().to(x)
            sigma = sigma * (1 + gamma)
        denoised = denoised_at(denoiser, x, sigma)
        slope = (x - denoised) / sigma
        x_next = x + (next_sigma - sigma) * slope
        if next_sigma > 0:  # the last step, down to 0, stays first order
            next_slope = (x_next - denoised_at(denoiser, x_next, next_sigma)) / next_sigma
            x_next = x + (next_sigma - sigma) * (slope + next_slope) / 2
        x = x_next
        if on_step:
            on_step(Step(index, sigma, denoised.float()))
    return x.float()
