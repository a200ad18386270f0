"""The one place where a pipeline of diffusers meets our sampler.

Shape legend: B batch, C channels, H W height and width, L caption tokens, E caption channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from microdit.diffusion.edm import EDM
from microdit.diffusion.guidance import Text, guided_denoiser
from microdit.diffusion.solvers import heun, noise_schedule
from microdit.diffusion.steps import Step, state_dtype
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
        """With zeros to `length` tokens, which do not count."""
        more = length - self.text_BLE.shape[1]
        mask_BL = self.text_BLE.new_ones(self.text_BLE.shape[:2], dtype=torch.bool) if self.mask_BL is None else self.mask_BL
        return Prompt(F.pad(self.text_BLE, (0, 0, 0, more)), F.pad(mask_BL, (0, more)))


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
    away: Text | None = None
    if negative is not None and guidance_scale != 1:
        if prompt.text_BLE.shape[1] != negative.text_BLE.shape[1] or (prompt.mask_BL is None) != (negative.mask_BL is None):
            length = max(prompt.text_BLE.shape[1], negative.text_BLE.shape[1])
            prompt, negative = prompt.padded(length), negative.padded(length)
        away = Text(negative.text_BLE, negative.mask_BL)
    denoiser = guided_denoiser(model, edm, prompt.text_BLE, prompt.mask_BL, guidance_scale, negative=away)

    def count(step: Step) -> None:
        on_step(len(step.denoised_BCHW))

    sigmas = noise_schedule(edm, num_inference_steps)
    if after_step is None:
        return heun(denoiser, noise_BCHW, sigmas, count)
    dtype = state_dtype(noise_BCHW.device)
    latents_BCHW = (noise_BCHW.to(dtype) * sigmas[0].item()).float()
    for index in range(num_inference_steps):
        standard_BCHW = latents_BCHW.to(dtype) / sigmas[index].item()  # heun multiplies by the first of its sigmas
        latents_BCHW = heun(denoiser, standard_BCHW, sigmas[index : index + 2], count)
        changed_BCHW = after_step(index, sigmas[index], latents_BCHW)
        if changed_BCHW is None:
            break
        latents_BCHW = changed_BCHW
    return latents_BCHW
