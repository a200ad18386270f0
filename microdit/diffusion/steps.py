"""What every solver shares: the denoiser it asks, and what it tells after each step."""

from collections.abc import Callable
from dataclasses import dataclass

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


def denoised_at(denoiser: Denoiser, x_BCHW: Tensor, sigma: Tensor) -> Tensor:
    """In float64, while the denoiser computes in float32; `sigma` is one number."""
    return denoiser(x_BCHW.float(), sigma.float().expand(len(x_BCHW))).double()
