"""The training objective: what a noise level is, what the network predicts, and how its error is weighted.

`edm.py` and `flow.py` implement `Objective`. Everything else works on the denoised estimate D(x; sigma), so that trainer, guidance,
samplers and reports need not know which of them it is.

Shape legend: B batch, C channels, H W height and width, T tokens, K kept tokens, P values in a patch.
"""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from microdit.models.caption import Caption
from microdit.models.microdit import MicroDiT
from microdit.models.patches import patchify, unpatchify
from microdit.models.routing import METHODS, take_tokens

RECONSTRUCTION = 0.1  # weight of the dropped patches' reconstruction (2306.09305; mae_loss_coef in the authors' code)


class Objective(ABC):
    """An objective, as the trainer and the samplers see it. Noise levels `sigma` grow with the noise and are 0 at the data.

    A distilled model (`distillation.py`) takes `student_steps` Euler steps in the place of its teacher's `teacher_steps`, a multiple of
    them; both are 0 for any other.

    In sampling, latents follow dx/dsigma = (x - D(x; sigma)) / max(sigma, slope_floor), which holds for both objectives: for EDM by
    2206.00364, eq. 1, with a floor of 0; for flow matching since the velocity of a straight path from noise to data is (D - x) / sigma.
    """

    student_steps: int
    teacher_steps: int

    @property
    def noise_scale(self) -> float:
        """The standard deviation that standard normal noise is scaled to."""
        return 1.0

    @property
    def slope_floor(self) -> float:
        """The least noise level that a slope is divided by in sampling."""
        return 0.0

    @abstractmethod
    def preconditioning(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return c_skip, c_out, c_in and c_noise, each in the shape of `sigma`: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)."""

    @abstractmethod
    def loss_weight(self, sigma_B: Tensor) -> Tensor:
        """Return the weight of the squared error of D, (B,)."""

    @abstractmethod
    def add_noise(self, latents_BCHW: Tensor, sigma_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Return noisy latents. `noise_BCHW` is standard normal."""

    def training_sigma(self, normal_B: Tensor) -> Tensor:
        """Return the training noise levels that standard normal numbers stand for, in the order of these numbers.

        A distilled model is trained at the levels of its few steps alone, all equally often.
        """
        if not self.student_steps:
            return self._training_sigma(normal_B)
        rising = self.noise_schedule(self.student_steps)[:-1].flip(0).to(normal_B)
        return rising[(torch.special.ndtr(normal_B) * self.student_steps).long().clamp(max=self.student_steps - 1)]

    @abstractmethod
    def _training_sigma(self, normal_B: Tensor) -> Tensor: ...

    @abstractmethod
    def quantile(self, sigma_B: Tensor) -> Tensor:
        """Return the share of training noise levels below each of `sigma_B`, from 0 to 1."""

    def noise_schedule(self, num_steps: int) -> Tensor:
        """Return the sampler's noise levels in float64: num_steps decreasing ones, and 0. Needs at least 2 steps.

        The few steps of a distilled model each begin where one of its teacher's does.
        """
        if num_steps == self.student_steps:
            return self._noise_schedule(self.teacher_steps)[:: self.teacher_steps // num_steps]
        if num_steps < 2:
            raise ValueError(f"the sampler needs at least 2 steps, got {num_steps}")
        return self._noise_schedule(num_steps)

    @abstractmethod
    def _noise_schedule(self, num_steps: int) -> Tensor: ...

    @abstractmethod
    def with_noise_range(self, low: float, high: float) -> Self:
        """Return the objective with a sampler that starts at `high` and jumps from `low` to 0. Raises UserError if no noise is as high."""


def denoise_patches(
    model: MicroDiT,
    objective: Objective,
    noisy_BCHW: Tensor,
    sigma_B: Tensor,
    caption: Caption,
    keep_ids_BK: Tensor | None = None,
    path_keep_mask_B: Tensor | None = None,
) -> Tensor:
    """Compute D(x; sigma) of 2206.00364, eq. 7, as the patches that `MicroDiT.forward` returns: (B, T, P) or (B, K, P)."""
    c_skip, c_out, c_in, c_noise = (c.view(-1, 1, 1) for c in objective.preconditioning(sigma_B))
    F_BTP = model(c_in.unsqueeze(-1) * noisy_BCHW, c_noise.flatten(), caption, keep_ids_BK, path_keep_mask_B)
    noisy_BTP = patchify(noisy_BCHW, model.config.patch_size)
    if keep_ids_BK is not None and METHODS[model.config.routing].restore == "nothing":
        noisy_BTP = take_tokens(noisy_BTP, keep_ids_BK)
    return c_skip * noisy_BTP + c_out * F_BTP.float()  # in float32, since at high noise c_skip and c_out differ by orders of magnitude


def denoise(
    model: MicroDiT, objective: Objective, noisy_BCHW: Tensor, sigma_B: Tensor, caption: Caption, drop_path: bool = False
) -> Tensor:
    """Compute D(x; sigma) as latents (B, C, H, W), without dropping tokens. `drop_path` (sprint only) skips the sparse blocks."""
    keep_ids_BK = torch.empty(len(noisy_BCHW), 0, dtype=torch.long, device=noisy_BCHW.device) if drop_path else None
    patches_BTP = denoise_patches(model, objective, noisy_BCHW, sigma_B, caption, keep_ids_BK)
    return unpatchify(patches_BTP, model.config.patch_size, *noisy_BCHW.shape[-2:])


def draw_sigma(objective: Objective, batch: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Draw training noise levels, (B,)."""
    return objective.training_sigma(torch.randn(batch, generator=generator, device=device))


def denoising_loss(
    model: MicroDiT,
    objective: Objective,
    latents_BCHW: Tensor,
    caption: Caption,
    sigma_B: Tensor,
    noise_BCHW: Tensor,
    keep_ids_BK: Tensor | None = None,
    path_keep_mask_B: Tensor | None = None,
) -> Tensor:
    """Compute the weighted squared error of each sample, (B,): 2206.00364, eq. 8, or the mean square of velocity differences.

    See `matching_loss`; `noise_BCHW` is standard normal.

    >>> from microdit import EDM, create_model
    >>> model = create_model("MicroDiT_Nano_2", in_channels=8, caption_channels=384)
    >>> latents_BCHW, text_BLE = torch.randn(4, 8, 8, 8), torch.randn(4, 12, 384)
    >>> sigma_B = (-0.6 + 1.2 * torch.randn(4)).exp()
    >>> loss_B = denoising_loss(model, EDM(), latents_BCHW, model.embed_caption(text_BLE), sigma_B, torch.randn_like(latents_BCHW))
    >>> loss_B.mean().backward()
    >>> loss_B.shape
    torch.Size([4])
    """
    noisy_BCHW = objective.add_noise(latents_BCHW, sigma_B, noise_BCHW)
    return matching_loss(model, objective, noisy_BCHW, latents_BCHW, caption, sigma_B, keep_ids_BK, path_keep_mask_B)


def matching_loss(
    model: MicroDiT,
    objective: Objective,
    noisy_BCHW: Tensor,
    target_BCHW: Tensor,
    caption: Caption,
    sigma_B: Tensor,
    keep_ids_BK: Tensor | None = None,
    path_keep_mask_B: Tensor | None = None,
) -> Tensor:
    """Compute the weighted squared distance of D(noisy; sigma) from the target, for each sample, (B,). Draws no random numbers.

    The routing decides over which patches: the kept ones (2407.15811, section 2) or all. MaskDiT adds 0.1 times the error with which the
    dropped patches are reconstructed.
    """
    denoised_BTP = denoise_patches(model, objective, noisy_BCHW, sigma_B, caption, keep_ids_BK, path_keep_mask_B)
    target_BTP = patchify(target_BCHW, model.config.patch_size)
    weight_B = objective.loss_weight(sigma_B)
    method = METHODS[model.config.routing]
    if keep_ids_BK is None or method.loss == "all":
        return weight_B * _mean_square(denoised_BTP - target_BTP)
    target_BKP = take_tokens(target_BTP, keep_ids_BK)
    if method.loss == "kept":
        return weight_B * _mean_square(denoised_BTP - target_BKP)
    reconstruction_B = _reconstruction(denoised_BTP, patchify(noisy_BCHW, model.config.patch_size), keep_ids_BK)
    return weight_B * _mean_square(take_tokens(denoised_BTP, keep_ids_BK) - target_BKP) + RECONSTRUCTION * reconstruction_B


def _mean_square(error_BTP: Tensor) -> Tensor:
    return error_BTP.square().mean(dim=(1, 2))


def _reconstruction(denoised_BTP: Tensor, noisy_BTP: Tensor, keep_ids_BK: Tensor) -> Tensor:
    """Compute MaskDiT's reconstruction loss (2306.09305): the mean squared error over the dropped patches, (B,).

    As in the authors' code, the target is the noisy input, with each patch normalised.
    """
    mean_BT1, variance_BT1 = noisy_BTP.mean(dim=2, keepdim=True), noisy_BTP.var(dim=2, keepdim=True)
    error_BT = (denoised_BTP - (noisy_BTP - mean_BT1) / (variance_BT1 + 1e-6).sqrt()).square().mean(dim=2)
    dropped_BT = torch.ones_like(error_BT).scatter(1, keep_ids_BK, 0.0)
    return (error_BT * dropped_BT).sum(dim=1) / dropped_BT.sum(dim=1).clamp(min=1)
