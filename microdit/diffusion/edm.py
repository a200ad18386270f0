"""EDM: preconditioning, training noise levels and loss (Karras et al. 2022, 2206.00364), over the patches that the routing returns.

Shape legend: B batch, C channels, H W height and width, T tokens, K kept tokens, P values in a patch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from microdit.models.caption import Caption
from microdit.models.microdit import MicroDiT
from microdit.models.patches import patchify, unpatchify
from microdit.models.routing import METHODS, take_tokens

RECONSTRUCTION = 0.1  # weight of the dropped patches' reconstruction (2306.09305; mae_loss_coef in the authors' code)


@dataclass(frozen=True)
class EDM:
    """Settings of the diffusion process. The defaults are those of 2407.15811 at 256 px; at 512 px it uses P_mean 0 and P_std 0.6.

    >>> EDM(P_mean=0.0, P_std=0.6).sigma_data
    0.9
    """

    sigma_data: float = 0.9
    P_mean: float = -0.6  # mean of log sigma in training
    P_std: float = 1.2  # its standard deviation
    sigma_min: float = 0.002  # sigma_min, sigma_max and rho define the sampler's noise schedule
    sigma_max: float = 80.0
    rho: float = 7.0


def preconditioning(edm: EDM, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return c_skip, c_out, c_in and c_noise of 2206.00364, table 1, each in the shape of `sigma`."""
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
    """Compute D(x; sigma) of 2206.00364, eq. 7, as the patches that `MicroDiT.forward` returns: (B, T, P) or (B, K, P)."""
    c_skip, c_out, c_in, c_noise = (c.view(-1, 1, 1) for c in preconditioning(edm, sigma_B))
    F_BTP = model(c_in.unsqueeze(-1) * noisy_BCHW, c_noise.flatten(), caption, keep_ids_BK, path_keep_mask_B)
    noisy_BTP = patchify(noisy_BCHW, model.config.patch_size)
    if keep_ids_BK is not None and METHODS[model.config.routing].restore == "nothing":
        noisy_BTP = take_tokens(noisy_BTP, keep_ids_BK)
    return c_skip * noisy_BTP + c_out * F_BTP.float()  # in float32, since at high noise c_skip and c_out differ by orders of magnitude


def denoise(model: MicroDiT, edm: EDM, noisy_BCHW: Tensor, sigma_B: Tensor, caption: Caption, drop_path: bool = False) -> Tensor:
    """Compute D(x; sigma) as latents (B, C, H, W), without dropping tokens. `drop_path` (sprint only) skips the sparse blocks."""
    keep_ids_BK = torch.empty(len(noisy_BCHW), 0, dtype=torch.long, device=noisy_BCHW.device) if drop_path else None
    patches_BTP = denoise_patches(model, edm, noisy_BCHW, sigma_B, caption, keep_ids_BK)
    return unpatchify(patches_BTP, model.config.patch_size, *noisy_BCHW.shape[-2:])


def draw_sigma(edm: EDM, batch: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Draw log-normal training noise levels, (B,)."""
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
    """Compute the weighted squared error of each sample, (B,) (2206.00364, eq. 8).

    The routing decides over which patches: the kept ones (2407.15811, section 2) or all. MaskDiT adds 0.1 times the error with which the
    dropped patches are reconstructed. `noise_BCHW` is standard normal; the function itself draws no random numbers.

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
    """Compute the denoising loss of 2206.00364, eq. 8, with the weighting of table 1, (B,)."""
    weight_B = (sigma_B**2 + edm.sigma_data**2) / (sigma_B * edm.sigma_data) ** 2
    return weight_B * (denoised_BTP - target_BTP).square().mean(dim=(1, 2))


def _reconstruction(denoised_BTP: Tensor, noisy_BTP: Tensor, keep_ids_BK: Tensor) -> Tensor:
    """Compute MaskDiT's reconstruction loss (2306.09305): the mean squared error over the dropped patches, (B,).

    As in the authors' code, the target is the noisy input, with each patch normalised.
    """
    mean_BT1, variance_BT1 = noisy_BTP.mean(dim=2, keepdim=True), noisy_BTP.var(dim=2, keepdim=True)
    error_BT = (denoised_BTP - (noisy_BTP - mean_BT1) / (variance_BT1 + 1e-6).sqrt()).square().mean(dim=2)
    dropped_BT = torch.ones_like(error_BT).scatter(1, keep_ids_BK, 0.0)
    return (error_BT * dropped_BT).sum(dim=1) / dropped_BT.sum(dim=1).clamp(min=1)
