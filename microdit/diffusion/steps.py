"""What every solver shares: the denoiser it asks, and what it tells after each step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents (B, C, H, W), sigma (B,)) -> denoised latents (B, C, H, W)."""


@dataclass(frozen=True)
class Step:
    """A step that is done: its number from 0, its noise level, and what the denoiser took the latents (B, C, H, W) for there."""

    index: int
    sigma: float
    denoised_BCHW: Tensor


OnStep = Callable[[Step], None]
"""Called after each step. What it raises ends the sampling, which leaves nothing behind."""


def state_dtype(device: torch.device) -> torch.dtype:
    """What the latents on their way are kept in: float64, but float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def denoised_at(denoiser: Denoiser, x_BCHW: Tensor, sigma: float) -> Tensor:
    """In the dtype of `x_BCHW`, while the denoiser is asked, and answers, in float32."""
    sigma_B = x_BCHW.new_full((), sigma, dtype=torch.float32).expand(len(x_BCHW))
    return denoiser(x_BCHW.float(), sigma_B).to(x_BCHW.dtype)
