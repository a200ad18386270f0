"""EDM: preconditioning, noise levels and the weight of the loss (Karras et al. 2022, 2206.00364)."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from microdit.diffusion.objective import Objective, denoising_loss

edm_loss = denoising_loss  # its name for those who want the EDM loss alone, with an `EDM` as the objective


@dataclass(frozen=True)
class EDM(Objective):
    """EDM. The defaults are those of 2407.15811 at 256 px; at 512 px it uses P_mean 0 and P_std 0.6.

    >>> EDM(P_mean=0.0, P_std=0.6).sigma_data
    0.9
    """

    sigma_data: float = 0.9
    P_mean: float = -0.6  # mean of log sigma in training
    P_std: float = 1.2  # its standard deviation
    sigma_min: float = 0.002  # sigma_min, sigma_max and rho define the sampler's noise schedule
    sigma_max: float = 80.0
    rho: float = 7.0
    student_steps: int = 0
    teacher_steps: int = 0

    def preconditioning(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return c_skip, c_out, c_in and c_noise of 2206.00364, table 1, each in the shape of `sigma`."""
        variance = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / variance, sigma * self.sigma_data * variance.rsqrt(), variance.rsqrt(), sigma.log() / 4

    def loss_weight(self, sigma_B: Tensor) -> Tensor:
        """Return lambda(sigma) of 2206.00364, table 1, (B,)."""
        return (sigma_B**2 + self.sigma_data**2) / (sigma_B * self.sigma_data) ** 2

    def add_noise(self, latents_BCHW: Tensor, sigma_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Return latents + sigma noise."""
        return latents_BCHW + sigma_B.view(-1, 1, 1, 1) * noise_BCHW

    def _training_sigma(self, normal_B: Tensor) -> Tensor:
        """Return log-normal noise levels."""
        return (normal_B * self.P_std + self.P_mean).exp()

    def quantile(self, sigma_B: Tensor) -> Tensor:
        """Return the share of training noise levels below each of `sigma_B`."""
        return torch.special.ndtr((sigma_B.log() - self.P_mean) / self.P_std)

    def _noise_schedule(self, num_steps: int) -> Tensor:
        """Return num_steps noise levels from sigma_max down to sigma_min, and 0 (2206.00364, eq. 5)."""
        ramp = torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.cat([(high + ramp * (low - high)) ** self.rho, torch.zeros(1, dtype=torch.float64)])

    def with_noise_range(self, low: float, high: float) -> Self:
        """Return the objective with `low` and `high` as the sampler's last and first noise level."""
        return replace(self, sigma_min=low, sigma_max=high)
