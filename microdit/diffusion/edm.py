"""EDM: preconditioning, noise levels and loss (Karras et al. 2022, 2206.00364), with the loss on the kept patches only.

Shape legend: B batch, C channels, H W height and width, T tokens, K kept tokens, P values in a patch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from microdit.model.microdit import Caption, MicroDiT
from microdit.model.patches import patchify, unpatchify
from microdit.model.routing import take_tokens


@dataclass(frozen=True)
class EDM:
    """Settings of the diffusion process; the defaults are the paper's at 256 px (0 and 0.6 for the noise at 512 px)."""

    sigma_data: float = 0.9
    P_mean: float = -0.6  # of log sigma in training
    P_std: float = 1.2
    sigma_min: float = 0.002  # of the sampler
    sigma_max: float = 80.0
    rho: float = 7.0


def preconditioning(edm: EDM, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in, c_noise of 2206.00364, table 1, in the shape of `sigma`."""
    variance = sigma**2 + edm.sigma_data**2
    return edm.sigma_data**2 / variance, sigma * edm.sigma_data * variance.rsqrt(), variance.rsqrt(), sigma.log() / 4


def denoise_patches(
    model: MicroDiT,
    edm: EDM,
    noisy_BCHW: Tensor,
    sigma_B: Tensor,
    caption: Caption,
    keep_ids_BK: Tensor | None = None,
    routing: str = "deferred",
) -> Tensor:
    """D of 2206.00364, eq. 7, as patches: all of them (B, T, P), or the kept ones (B, K, P)."""
    c_skip, c_out, c_in, c_noise = (c.view(-1, 1, 1) for c in preconditioning(edm, sigma_B))
    F_BTP = model(c_in.unsqueeze(-1) * noisy_BCHW, c_noise.flatten(), caption, keep_ids_BK, routing)
    noisy_BTP = patchify(noisy_BCHW, model.config.patch_size)
    if keep_ids_BK is not None:
        noisy_BTP = take_tokens(noisy_BTP, keep_ids_BK)
    return c_skip * noisy_BTP + c_out * F_BTP.float()  # float32: at high noise c_skip and c_out differ by orders of magnitude


def denoise(model: MicroDiT, edm: EDM, noisy_BCHW: Tensor, sigma_B: Tensor, caption: Caption) -> Tensor:
    """D of 2206.00364, eq. 7, as whole latents (B, C, H, W); nothing is dropped."""
    patches_BTP = denoise_patches(model, edm, noisy_BCHW, sigma_B, caption, routing="none")
    return unpatchify(patches_BTP, model.config.patch_size, *noisy_BCHW.shape[-2:])


def draw_sigma(edm: EDM, batch: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Log-normal training noise levels, (B,)."""
    return (torch.randn(batch, generator=generator, device=device) * edm.P_std + edm.P_mean).exp()


def edm_loss(
    model: MicroDiT,
    edm: EDM,
    latents_BCHW: Tensor,
    caption: Caption,
    sigma_B: Tensor,
    noise_BCHW: Tensor,
    keep_ids_BK: Tensor | None = None,
    routing: str = "deferred",
) -> Tensor:
    """Weighted squared error of each sample, (B,), over the kept patches (2206.00364 eq. 8; 2407.15811 section 2).

    `noise_BCHW` is standard normal. All draws are arguments, so that whoever calls decides what is random.
    """
    noisy_BCHW = latents_BCHW + sigma_B.view(-1, 1, 1, 1) * noise_BCHW
    denoised_BKP = denoise_patches(model, edm, noisy_BCHW, sigma_B, caption, keep_ids_BK, routing)
    target_BKP = patchify(latents_BCHW, model.config.patch_size)
    if keep_ids_BK is not None:
        target_BKP = take_tokens(target_BKP, keep_ids_BK)
    weight_B = (sigma_B**2 + edm.sigma_data**2) / (sigma_B * edm.sigma_data) ** 2
    return weight_B * (denoised_BKP - target_BKP).square().mean(dim=(1, 2))
