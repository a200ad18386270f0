"""EDM: preconditioning, noise levels and loss (Karras et al. 2022, 2206.00364), on the patches that the model's routing says.

Shape legend: B batch, C channels, H W height and width, T tokens, K kept tokens, P values in a patch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from microdit.models.caption import Caption
from microdit.models.microdit import MicroDiT
from microdit.models.patches import patchify, unpatchify
from microdit.models.routing import METHODS, take_tokens

RECONSTRUCTION = 0.1  # weight of the reconstruction of dropped patches (2306.09305; the authors' mae_loss_coef)


@dataclass(frozen=True)
class EDM:
    """Settings of the diffusion process; the defaults are the paper's at 256 px (0 and 0.6 for the noise at 512 px).

    >>> EDM(P_mean=0.0, P_std=0.6).sigma_data
    0.9
    """

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
    path_keep_mask_B: Tensor | None = None,
) -> Tensor:
    """D of 2206.00364, eq. 7, as patches: those that `MicroDiT.forward` returns, all (B, T, P) or the kept ones (B, K, P)."""
    c_skip, c_out, c_in, c_noise = (c.view(-1, 1, 1) for c in preconditioning(edm, sigma_B))
    F_BTP = model(c_in.unsqueeze(-1) * noisy_BCHW, c_noise.flatten(), caption, keep_ids_BK, path_keep_mask_B)
    noisy_BTP = patchify(noisy_BCHW, model.config.patch_size)
    if keep_ids_BK is not None and METHODS[model.config.routing].restore == "nothing":
        noisy_BTP = take_tokens(noisy_BTP, keep_ids_BK)
    return c_skip * noisy_BTP + c_out * F_BTP.float()  # float32: at high noise c_skip and c_out differ by orders of magnitude


def denoise(model: MicroDiT, edm: EDM, noisy_BCHW: Tensor, sigma_B: Tensor, caption: Caption, drop_path: bool = False) -> Tensor:
    """D of 2206.00364, eq. 7, as whole latents (B, C, H, W). No token is dropped; with `drop_path`, for sprint, no sparse block is run."""
    keep_ids_BK = torch.empty(len(noisy_BCHW), 0, dtype=torch.long, device=noisy_BCHW.device) if drop_path else None
    patches_BTP = denoise_patches(model, edm, noisy_BCHW, sigma_B, caption, keep_ids_BK)
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
    path_keep_mask_B: Tensor | None = None,
) -> Tensor:
    """Weighted squared error of each sample, (B,) (2206.00364 eq. 8), over the patches that the model's routing says: the kept ones
    (2407.15811 section 2), or all. MaskDiT's adds 0.1 times the error of the dropped patches' reconstruction.

    `noise_BCHW` is standard normal. All draws are arguments, so that whoever calls decides what is random.

    >>> from microdit import create_model
    >>> model = create_model("MicroDiT_Nano_2", in_channels=8, caption_channels=384)
    >>> latents_BCHW, text_BLE = torch.randn(4, 8, 8, 8), torch.randn(4, 12, 384)
    >>> sigma_B = (-0.6 + 1.2 * torch.randn(4)).exp()
    >>> loss_B = edm_loss(model, EDM(), latents_BCHW, model.embed_caption(text_BLE), sigma_B, torch.randn_like(latents_BCHW))
    >>> loss_B.mean().backward()
    >>> loss_B.shape
    torch.Size([4])
    """
    noisy_BCHW = latents_BCHW + sigma_B.view(-1, 1, 1, 1) * noise_BCHW
    denoised_BTP = denoise_patches(model, edm, noisy_BCHW, sigma_B, caption, keep_ids_BK, path_keep_mask_B)
    target_BTP = patchify(latents_BCHW, model.config.patch_size)
    method = METHODS[model.config.routing]
    if keep_ids_BK is None or method.loss == "all":
        return _denoising(edm, denoised_BTP, target_BTP, sigma_B)
    target_BKP = take_tokens(target_BTP, keep_ids_BK)
    if method.loss == "kept":
        return _denoising(edm, denoised_BTP, target_BKP, sigma_B)
    reconstruction_B = _reconstruction(denoised_BTP, patchify(noisy_BCHW, model.config.patch_size), keep_ids_BK)
    return _denoising(edm, take_tokens(denoised_BTP, keep_ids_BK), target_BKP, sigma_B) + RECONSTRUCTION * reconstruction_B


def _denoising(edm: EDM, denoised_BTP: Tensor, target_BTP: Tensor, sigma_B: Tensor) -> Tensor:
    """2206.00364, eq. 8, with the weight of table 1: (B,)."""
    weight_B = (sigma_B**2 + edm.sigma_data**2) / (sigma_B * edm.sigma_data) ** 2
    return weight_B * (denoised_BTP - target_BTP).square().mean(dim=(1, 2))


def _reconstruction(denoised_BTP: Tensor, noisy_BTP: Tensor, keep_ids_BK: Tensor) -> Tensor:
    """Mean squared error over the dropped patches, (B,), against the noisy input (2306.09305), each patch normalised, as the authors do."""
    mean_BT1, variance_BT1 = noisy_BTP.mean(dim=2, keepdim=True), noisy_BTP.var(dim=2, keepdim=True)
    error_BT = (denoised_BTP - (noisy_BTP - mean_BT1) / (variance_BT1 + 1e-6).sqrt()).square().mean(dim=2)
    dropped_BT = torch.ones_like(error_BT).scatter(1, keep_ids_BK, 0.0)
    return (error_BT * dropped_BT).sum(dim=1) / dropped_BT.sum(dim=1).clamp(min=1)
