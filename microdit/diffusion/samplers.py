"""Samplers: from noise to latents, by solvers of the objective's differential equation that are functions over a denoiser.

`heun` (2206.00364, algorithms 1 and 2), `euler` and `flow_dpm` are our own. With EDM, the solvers euler and dpm are the EDM schedulers of
diffusers, driven step by step by `edm_euler` and `edm_dpm`; only a distilled model's few steps take `euler`. Those schedulers expect the
raw network F (2206.00364, eq. 7) and precondition it themselves, while guidance works on D, so D is converted for each of them. All follow
the noise levels of the objective's `noise_schedule`, the schedulers in float32.

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
from microdit.diffusion.objective import Objective

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents (B, C, H, W), sigma (B,)) -> denoised latents (B, C, H, W)."""

Solver = Literal["heun", "dpm", "euler"]

CALLS_A_STEP: dict[Solver, int] = {"heun": 2, "dpm": 1, "euler": 1}
"""Calls of the denoiser per step; Heun's last step has only one."""


@dataclass(frozen=True)
class Step:
    """A finished step: its index from 0, its noise level sigma, the denoised estimate D(x; sigma) in float32, and the latents after it.

    Both tensors are (B, C, H, W); the latents are in the sampler's dtype.
    """

    index: int
    sigma: float
    denoised_BCHW: Tensor
    latents_BCHW: Tensor


OnStep = Callable[[Step], Tensor | None]
"""Called after each step. A tensor that it returns replaces the latents; an exception that it raises ends the sampling."""


@dataclass(frozen=True)
class Churn:
    """Settings of stochastic sampling (2206.00364, algorithm 2 and table 5). S_churn 0 adds no noise: the sampler is deterministic."""

    S_churn: float = 0.0
    S_tmin: float = 0.0
    S_tmax: float = math.inf
    S_noise: float = 1.0

    def gamma(self, sigma: float, num_steps: int) -> float:
        """Return the relative increase of the noise level before a step."""
        return min(self.S_churn / num_steps, math.sqrt(2) - 1) if self.S_tmin <= sigma <= self.S_tmax else 0.0


DETERMINISTIC = Churn()


def solve(
    solver: Solver,
    denoiser: Denoiser,
    noise_BCHW: Tensor,
    objective: Objective,
    num_steps: int,
    on_step: OnStep | None = None,
    churn: Churn = DETERMINISTIC,
    draw_noise: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Return latents (B, C, H, W) from standard normal noise.

    Only heun takes `churn`, and only with EDM, whose noise it adds; `draw_noise` returns noise like `noise_BCHW`.
    """
    assert churn == DETERMINISTIC or (solver == "heun" and isinstance(objective, EDM)), "only heun takes churn, with EDM"
    own_levels = solver == "euler" and num_steps == objective.student_steps  # which diffusers' schedulers do not have
    if isinstance(objective, EDM) and solver != "heun" and not own_levels:
        return (edm_dpm if solver == "dpm" else edm_euler)(denoiser, noise_BCHW, objective, num_steps, on_step)
    noise_BCHW, sigmas, floor = noise_BCHW * objective.noise_scale, objective.noise_schedule(num_steps), objective.slope_floor
    if solver == "heun":
        return heun(denoiser, noise_BCHW, sigmas, on_step, churn, draw_noise, floor)
    if solver == "euler":
        return euler(denoiser, noise_BCHW, sigmas, on_step, floor)
    return flow_dpm(denoiser, noise_BCHW, sigmas, on_step)


@torch.no_grad()
def heun(
    denoiser: Denoiser,
    noise_BCHW: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None = None,
    churn: Churn = DETERMINISTIC,
    draw_noise: Callable[[], Tensor] | None = None,
    floor: float = 0.0,
) -> Tensor:
    """Sample with Heun's second-order method along `sigmas` (2206.00364, algorithm 1, or 2 with churn).

    `noise_BCHW` is normal, and `draw_noise`, needed only with churn, returns more of it. Slopes are divided by noise levels no lower than
    `floor`. The state is float64 (see `state_dtype`),
    while the denoiser computes in float32. Noise levels are Python numbers, so no step synchronises with a GPU.
    """
    levels = sigmas.tolist()
    x = noise_BCHW.to(state_dtype(noise_BCHW.device)) * levels[0]
    for index, (sigma, next_sigma) in enumerate(pairwise(levels)):
        if churn.S_churn and (gamma := churn.gamma(sigma, len(levels) - 1)):
            assert draw_noise is not None, "churn needs draw_noise"
            x = x + sigma * math.sqrt((1 + gamma) ** 2 - 1) * churn.S_noise * draw_noise().to(x)
            sigma = sigma * (1 + gamma)
        denoised = _denoised_at(denoiser, x, sigma)
        slope = (x - denoised) / max(sigma, floor)
        x_next = x + (next_sigma - sigma) * slope
        if next_sigma > 0:  # the last step, to 0, is of first order
            next_slope = (x_next - _denoised_at(denoiser, x_next, next_sigma)) / max(next_sigma, floor)
            x_next = x + (next_sigma - sigma) * (slope + next_slope) / 2
        x = _after_step(on_step, Step(index, sigma, denoised.float(), x_next))
    return x.float()


@torch.no_grad()
def euler(denoiser: Denoiser, noise_BCHW: Tensor, sigmas: Tensor, on_step: OnStep | None = None, floor: float = 0.0) -> Tensor:
    """Sample with Euler's first-order method, as FlowMatchEulerDiscreteScheduler of diffusers does, but with a float64 state.

    See `heun` for the arguments.
    """
    levels = sigmas.tolist()
    x = noise_BCHW.to(state_dtype(noise_BCHW.device)) * levels[0]
    for index, (sigma, next_sigma) in enumerate(pairwise(levels)):
        denoised = _denoised_at(denoiser, x, sigma)
        x_next = x + (next_sigma - sigma) * (x - denoised) / max(sigma, floor)
        x = _after_step(on_step, Step(index, sigma, denoised.float(), x_next))
    return x.float()


@torch.no_grad()
def flow_dpm(denoiser: Denoiser, noise_BCHW: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Sample with DPM-Solver++(2M) (2211.01095, algorithm 2) on straight paths, where alpha is 1 - sigma.

    It is of second order, with one call of the denoiser per step; the last step, to 0, is of first order. The solver extrapolates D rather
    than dividing by noise levels, and so needs no floor.
    """
    levels = sigmas.tolist()
    x = noise_BCHW.to(state_dtype(noise_BCHW.device)) * levels[0]
    previous, step_before = x, math.inf  # the denoised estimate and the step in log(alpha / sigma) before this one
    for index, (sigma, next_sigma) in enumerate(pairwise(levels)):
        denoised = _denoised_at(denoiser, x, sigma)
        estimate = denoised
        if next_sigma > 0:
            step = _log_signal_to_noise(next_sigma) - _log_signal_to_noise(sigma)
            if index and math.isfinite(step_before):  # from sigma = 1 the step is infinite, and of first order
                estimate = denoised + step / (2 * step_before) * (denoised - previous)
            step_before = step
        x_next = next_sigma / sigma * x + (1 - next_sigma / sigma) * estimate
        previous = denoised
        x = _after_step(on_step, Step(index, sigma, denoised.float(), x_next))
    return x.float()


def _log_signal_to_noise(sigma: float) -> float:
    """Return log(alpha / sigma) on straight paths."""
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


@torch.no_grad()
def edm_euler(denoiser: Denoiser, noise_BCHW: Tensor, edm: EDM, num_steps: int, on_step: OnStep | None = None) -> Tensor:
    """Sample with EDMEulerScheduler of diffusers: first order, one call of the denoiser per step, with a float32 state."""
    from diffusers import EDMEulerScheduler  # slow to import

    scheduler = _scheduler(EDMEulerScheduler, edm, num_steps)
    x = noise_BCHW.float() * scheduler.sigmas[0].item()
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[index].item()
        denoised = _denoised_at(denoiser, x, sigma)
        scheduler.scale_model_input(x, timestep)  # the result is not needed, but the scheduler warns without this call
        x = scheduler.step(denoised, timestep, x, pred_original_sample=denoised).prev_sample
        x = _after_step(on_step, Step(index, sigma, denoised, x))
    return x


@torch.no_grad()
def edm_dpm(denoiser: Denoiser, noise_BCHW: Tensor, edm: EDM, num_steps: int, on_step: OnStep | None = None) -> Tensor:
    """Sample with EDMDPMSolverMultistepScheduler of diffusers: DPM-Solver++(2M) (2211.01095).

    It is of second order, with one call of the denoiser per step. The state is float64 (see `state_dtype`).
    """
    from diffusers import EDMDPMSolverMultistepScheduler  # slow to import

    scheduler = _scheduler(EDMDPMSolverMultistepScheduler, edm, num_steps)
    x = noise_BCHW.to(state_dtype(noise_BCHW.device)) * scheduler.sigmas[0].item()
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[index]
        denoised = _denoised_at(denoiser, x, sigma.item())
        # `step` computes c_skip x + c_out F. F is made from D with the same coefficients, so `step` recovers D to float64 precision.
        c_skip, c_out = (scheduler.precondition_outputs(*pair, sigma.double()).item() for pair in ((one, zero), (zero, one)))
        x = scheduler.step((denoised - c_skip * x) / c_out, timestep, x).prev_sample
        x = _after_step(on_step, Step(index, sigma.item(), denoised.float(), x))
    return x.float()


def _scheduler(scheduler_class: Any, edm: EDM, num_steps: int) -> Any:
    scheduler = scheduler_class(sigma_min=edm.sigma_min, sigma_max=edm.sigma_max, sigma_data=edm.sigma_data, rho=edm.rho)
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)  # otherwise it searches the first timestep by equality of floats
    return scheduler


def _after_step(on_step: OnStep | None, step: Step) -> Tensor:
    """Call `on_step` and return the latents to continue with."""
    changed_BCHW = on_step(step) if on_step else None
    return step.latents_BCHW if changed_BCHW is None else changed_BCHW.to(step.latents_BCHW)


def _denoised_at(denoiser: Denoiser, x_BCHW: Tensor, sigma: float) -> Tensor:
    """Call the denoiser in float32 and return D(x; sigma) in the dtype of `x_BCHW`."""
    sigma_B = x_BCHW.new_full((), sigma, dtype=torch.float32).expand(len(x_BCHW))
    return denoiser(x_BCHW.float(), sigma_B).to(x_BCHW.dtype)


def state_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the sampler's state: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
