"""The one place where a pipeline of diffusers meets our sampler.

Shape legend: B batch, C channels, H W height and width, L caption tokens, E caption channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from microdit.diffusion.edm import EDM, denoise
from microdit.diffusion.sampling import Denoiser, guided_denoiser, heun, noise_schedule
from microdit.model.microdit import MicroDiT


@dataclass(frozen=True)
class Prompt:
    """Embedded captions: one vector a token, and which of them count (None: all)."""

    text_BLE: Tensor
    mask_BL: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> "Prompt":
        return Prompt(self.text_BLE.to(device, dtype), None if self.mask_BL is None else self.mask_BL.to(device))

    def repeated(self, count: int) -> "Prompt":
        """Each caption `count` times in a row."""
        mask_BL = None if self.mask_BL is None else self.mask_BL.repeat_interleave(count, dim=0)
        return Prompt(self.text_BLE.repeat_interleave(count, dim=0), mask_BL)

    def padded(self, length: int) -> "Prompt":
        """With zeros to `length` tokens."""
        more = length - self.text_BLE.shape[1]
        return Prompt(F.pad(self.text_BLE, (0, 0, 0, more)), None if self.mask_BL is None else F.pad(self.mask_BL, (0, more)))


AfterStep = Callable[[int, Tensor, Tensor], Tensor | None]
"""(number of the step, its sigma, latents) -> the latents to go on with, or None to stop here."""


@torch.no_grad()
def draw_latents(
    model: MicroDiT,
    edm: EDM,
    noise_BCHW: Tensor,
    prompt: Prompt,
    negative: Prompt | None,
    num_inference_steps: int,
    guidance_scale: float,
    on_step: Callable[[int], None],
    after_step: AfterStep | None = None,
) -> Tensor:
    """Latents (B, C, H, W) from standard normal noise. `negative`: what to move away from, in the place of the empty caption.

    With `after_step` the sampler runs step by step: its state is then rounded to float32 after each, as whoever looks at it sees it.
    """
    if negative is None or guidance_scale == 1:
        denoiser = guided_denoiser(model, edm, prompt.text_BLE, prompt.mask_BL, guidance_scale)
    else:
        denoiser = _away_from(model, edm, prompt, negative, guidance_scale)
    sigmas = noise_schedule(edm, num_inference_steps)
    if after_step is None:
        return heun(denoiser, noise_BCHW, sigmas, on_step)
    latents_BCHW = (noise_BCHW.double() * sigmas[0]).float()
    for index in range(num_inference_steps):
        standard_BCHW = latents_BCHW.double() / sigmas[index]  # heun multiplies by the first of its sigmas
        latents_BCHW = heun(denoiser, standard_BCHW, sigmas[index : index + 2], on_step)
        changed_BCHW = after_step(index, sigmas[index], latents_BCHW)
        if changed_BCHW is None:
            break
        latents_BCHW = changed_BCHW
    return latents_BCHW


def _away_from(model: MicroDiT, edm: EDM, prompt: Prompt, negative: Prompt, guidance_scale: float) -> Denoiser:
    """Classifier-free guidance (2207.12598) away from captions that are not empty."""
    length = max(prompt.text_BLE.shape[1], negative.text_BLE.shape[1])
    pair = prompt.padded(length), negative.padded(length)
    mask = None
    if pair[0].mask_BL is not None and pair[1].mask_BL is not None:
        mask = torch.cat([pair[0].mask_BL, pair[1].mask_BL])
    both = model.embed_caption(torch.cat([pair[0].text_BLE, pair[1].text_BLE]), mask)

    def denoiser(noisy_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        doubled = denoise(model, edm, torch.cat([noisy_BCHW] * 2), torch.cat([sigma_B] * 2), both)
        wanted, unwanted = doubled.chunk(2)
        return unwanted + guidance_scale * (wanted - unwanted)

    return denoiser
