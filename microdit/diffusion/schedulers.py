"""Solvers that diffusers keeps: its EDM schedulers, led step by step with a denoiser of ours.

Both follow the noise levels of `noise_schedule`, in float32. They are made for the raw network F (2206.00364, eq. 7), which they
precondition themselves; guidance works on D, so D is handed over as each of them takes it.
"""

from typing import Any

import torch
from torch import Tensor

from microdit.diffusion.edm import EDM
from microdit.diffusion.steps import Denoiser, OnStep, Step, denoised_at, state_dtype


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
        if on_step:
            on_step(Step(index, sigma, denoised))
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
        if on_step:
            on_step(Step(index, sigma.item(), denoised.float()))
    return x.float()


def _ready(scheduler_class: Any, edm: EDM, num_steps: int) -> Any:
    scheduler = scheduler_class(sigma_min=edm.sigma_min, sigma_max=edm.sigma_max, sigma_data=edm.sigma_data, rho=edm.rho)
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)  # else it looks the first timestep up, by equality of floats
    return scheduler
