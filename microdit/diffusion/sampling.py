"""From noise to latents: EDM's deterministic Heun sampler and classifier-free guidance, as small functions over a denoiser."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from microdit.diffusion.edm import EDM, denoise
from microdit.errors import UserError
from microdit.model.microdit import MicroDiT
from microdit.model.routing import METHODS

Guidance = Literal["classifier-free", "path-drop"]

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents (B, C, H, W), sigma (B,)) -> denoised latents (B, C, H, W)."""


def noise_schedule(edm: EDM, num_steps: int) -> Tensor:
    """num_steps + 1 noise levels from sigma_max down to sigma_min, then 0 (2206.00364, eq. 5), in float64."""
    if num_steps < 2:
        raise ValueError(f"the sampler needs at least 2 steps, got {num_steps}")
    ramp = torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1)
    low, high = edm.sigma_min ** (1 / edm.rho), edm.sigma_max ** (1 / edm.rho)
    return torch.cat([(high + ramp * (low - high)) ** edm.rho, torch.zeros(1, dtype=torch.float64)])


def guided_denoiser(
    model: MicroDiT,
    edm: EDM,
    text_BLE: Tensor,
    text_mask_BL: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance: Guidance = "classifier-free",
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, 2207.12598) towards the captions, away from the empty (zero) caption.

    At `guidance_scale` 1 the empty caption is not computed. Captions are embedded once, not at every step. Path-drop guidance (SPRINT,
    2510.21986) leaves out the sparse blocks with the empty caption: a cheaper and weaker model to move away from. Raises UserError
    where the model was not trained to do without them.
    """
    if guidance == "path-drop" and METHODS[model.config.routing].restore != "fused":
        raise UserError(
            f"Path-drop guidance leaves out the sparse blocks, which a model with routing {model.config.routing} cannot do without: "
            "use a model trained with model.routing sprint, or classifier-free guidance."
        )
    if guidance_scale == 1:
        caption = model.embed_caption(text_BLE, text_mask_BL)
        return lambda noisy, sigma: denoise(model, edm, noisy, sigma, caption)
    if guidance == "path-drop":
        caption, empty = model.embed_caption(text_BLE, text_mask_BL), model.embed_caption(torch.zeros_like(text_BLE), text_mask_BL)

        def path_drop_denoiser(noisy_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
            conditional = denoise(model, edm, noisy_BCHW, sigma_B, caption)
            unconditional = denoise(model, edm, noisy_BCHW, sigma_B, empty, drop_path=True)
            return unconditional + guidance_scale * (conditional - unconditional)

        return path_drop_denoiser
    text = torch.cat([text_BLE, torch.zeros_like(text_BLE)])
    # Zero tokens are all alike, so it makes no difference how many of them the mask lets through.
    mask = None if text_mask_BL is None else torch.cat([text_mask_BL, text_mask_BL])
    both = model.embed_caption(text, mask)

    def denoiser(noisy_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        doubled = denoise(model, edm, torch.cat([noisy_BCHW] * 2), torch.cat([sigma_B] * 2), both)
        conditional, unconditional = doubled.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return denoiser


@torch.no_grad()
def heun(denoiser: Denoiser, noise_BCHW: Tensor, sigmas: Tensor, on_step: Callable[[int], None] | None = None) -> Tensor:
    """Heun's second-order method down `sigmas` (2206.00364, algorithm 1). `noise_BCHW` is standard normal.

    The state is kept in float64, the denoiser computes in float32. `on_step(B)` is called after each step, with the size of the batch.
    """
    sigmas = sigmas.to(noise_BCHW.device)
    x = noise_BCHW.double() * sigmas[0]
    for index in range(len(sigmas) - 1):
        sigma, next_sigma = sigmas[index], sigmas[index + 1]
        slope = (x - _call(denoiser, x, sigma)) / sigma
        x_next = x + (next_sigma - sigma) * slope
        if next_sigma > 0:  # the last step, down to 0, stays first order
            next_slope = (x_next - _call(denoiser, x_next, next_sigma)) / next_sigma
            x_next = x + (next_sigma - sigma) * (slope + next_slope) / 2
        x = x_next
        if on_step:
            on_step(len(x))
    return x.float()


def _call(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
    return denoiser(x.float(), sigma.float().expand(len(x))).double()
