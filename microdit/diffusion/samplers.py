"""What every solver shares: the denoiser it asks, and what it tells after each step.

Solvers that diffusers keeps: its EDM schedulers, led step by step with a denoiser of ours.

Both follow the noise levels of `noise_schedule`, in float32. They are made for the raw network F (2206.00364, eq. 7), which they
precondition themselves; guidance works on D, so D is handed over as each of them takes it.

From noise to latents: solvers of EDM's differential equation, as small functions over a denoiser.

Shape legend: B batch, C channels, H W height and width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from microdit.diffusion.edm import EDM

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents (B, C, H, W), sigma (B,)) -> denoised latents (B, C, H, W)."""


@dataclass(frozen=True)
class Step:
    """A finished step: its number from 0, its noise level, the denoised estimate D(x; sigma) at that level, (B, C, H, W) in float32, and
    the latents x after the step, (B, C, H, W) in the sampler's dtype.
    """

    index: int
    sigma: float
    denoised_BCHW: Tensor
    latents_BCHW: Tensor


OnStep = Callable[[Step], Tensor | None]
"""Called after each step. A tensor that it returns takes the place of the latents; an exception that it raises ends the sampling."""


def _after_step(on_step: OnStep | None, step: Step) -> Tensor:
    """The latents to go on with."""
    changed_BCHW = on_step(step) if on_step else None
    return step.latents_BCHW if changed_BCHW is None else changed_BCHW.to(step.latents_BCHW)


def state_dtype(device: torch.device) -> torch.dtype:
    """What the latents on their way are kept in: float64, but float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def denoised_at(denoiser: Denoiser, x_BCHW: Tensor, sigma: float) -> Tensor:
    """In the dtype of `x_BCHW`, while the denoiser is asked, and answers, in float32."""
    sigma_B = x_BCHW.new_full((), sigma, dtype=torch.float32).expand(len(x_BCHW))
    return denoiser(x_BCHW.float(), sigma_B).to(x_BCHW.dtype)


@torch.no_grad()
def euler(denoiser: Denoiser, noise_BCHW: Tensor, edm: EDM, num_steps: int, on_step: OnStep | None = None) -> Tensor:
    """EDMEulerScheduler: first order, one call of the denoiser a step. The state is kept in float32."""
    from diffusers import EDMEulerScheduler  # slow to import

    scheduler = _ready(EDMEulerScheduler, edm, num_steps)
    x = noise_BCHW.float() * scheduler.sigmas[0].item()
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[index].item()
        denoised = denoised_at(denoiser, x, sigma)
        scheduler.scale_model_input(x, timestep)  # its result is the network's input, which ours makes itself; the scheduler warns without
        x = scheduler.step(denoised, timestep, x, pred_original_sample=denoised).prev_sample
        x = _after_step(on_step, Step(index, sigma, denoised, x))
    return x


@torch.no_grad()
def dpm(denoiser: Denoiser, noise_BCHW: Tensor, edm: EDM, num_steps: int, on_step: OnStep | None = None) -> Tensor:
    """EDMDPMSolverMultistepScheduler: DPM-Solver++(2M) (2211.01095), second order, one call of the denoiser a step.

    The state is kept in float64 (see `state_dtype`).
    """
    from diffusers import EDMDPMSolverMultistepScheduler  # slow to import

    scheduler = _ready(EDMDPMSolverMultistepScheduler, edm, num_steps)
    x = noise_BCHW.to(state_dtype(noise_BCHW.device)) * scheduler.sigmas[0].item()
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[index]
        denoised = denoised_at(denoiser, x, sigma.item())
        # `step` will compute c_skip x + c_out F: F is made from D with the very same numbers, so that D comes back to float64's precision.
        c_skip, c_out = (scheduler.precondition_outputs(*pair, sigma.double()).item() for pair in ((one, zero), (zero, one)))
        x = scheduler.step((denoised - c_skip * x) / c_out, timestep, x).prev_sample
        x = _after_step(on_step, Step(index, sigma.item(), denoised.float(), x))
    return x.float()


def _ready(scheduler_class: Any, edm: EDM, num_steps: int) -> Any:
    scheduler = scheduler_class(sigma_min=edm.sigma_min, sigma_max=edm.sigma_max, sigma_data=edm.sigma_data, rho=edm.rho)
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)  # else it looks the first timestep up, by equality of floats
    return scheduler


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
        x = _after_step(on_step, Step(index, sigma, denoised.float(), x_next))
    return x.float()
