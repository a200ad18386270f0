"""Flow matching on straight paths between noise and data (2209.03003, 2403.03206), the network predicting velocity, image or noise.

Papers of this family count a time t, here 1 at the data and 0 at the noise: x_t = t x + (1 - t) s n, with standard normal n and the noise
scale s. The noise level is sigma = 1 - t, as in the flow schedulers of diffusers.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from microdit.diffusion.objective import Objective
from microdit.errors import UserError

FlowPrediction = Literal["velocity", "image", "noise"]

TIME_SCALE = 1000.0  # the network's time input is 1000 sigma, the timestep of the schedulers of diffusers


@dataclass(frozen=True)
class Flow(Objective):
    """Flow matching: the loss is the mean square of velocity differences, whatever the network predicts.

    An image prediction D becomes the velocity (D - x) / max(sigma, floor): in training, of target and prediction alike, with
    `training_floor`, in sampling with `sampling_floor`; both are MiniT2I's. A noise prediction N becomes (x - s N) / max(1 - sigma,
    training_floor). A velocity needs no bound.

    >>> Flow(shift=3.0).noise_schedule(4)
    tensor([1.0000, 0.9000, 0.7500, 0.5000, 0.0000], dtype=torch.float64)
    """

    prediction: FlowPrediction = "velocity"
    t_mean: float = 0.0  # mean of logit(t) in training, before the shift (2403.03206, section 3.1)
    t_std: float = 1.0  # its standard deviation
    shift: float = 1.0  # of noise levels in training and sampling, for resolution (2403.03206, eq. 23, where it is sqrt(m / n))
    noise_scale: float = 1.0
    training_floor: float = 0.01
    sampling_floor: float = 0.05
    sigma_min: float = 0.0  # the sampler's last noise level before 0; by default its steps are equal (before the shift) all the way to 0
    sigma_max: float = 1.0  # its first
    student_steps: int = 0
    teacher_steps: int = 0

    @property
    def slope_floor(self) -> float:
        """The least noise level that a slope is divided by in sampling, 0 unless the network predicts images."""
        return self.sampling_floor if self.prediction == "image" else 0.0

    def preconditioning(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return c_skip, c_out, c_in and c_noise, each in the shape of `sigma`, by D = x + sigma v. The network sees x as it is."""
        one, time = torch.ones_like(sigma), TIME_SCALE * sigma
        if self.prediction == "image":
            return torch.zeros_like(sigma), one, one, time
        if self.prediction == "noise":
            ratio = sigma / (1 - sigma).clamp(min=self.training_floor)
            return 1 + ratio, -self.noise_scale * ratio, one, time
        return one, sigma, one, time

    def loss_weight(self, sigma_B: Tensor) -> Tensor:
        """Return what turns the squared error of D into that of the velocity, (B,)."""
        return sigma_B.clamp(min=self.training_floor if self.prediction == "image" else 0.0) ** -2

    def add_noise(self, latents_BCHW: Tensor, sigma_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Return (1 - sigma) latents + sigma s noise."""
        sigma_B111 = sigma_B.view(-1, 1, 1, 1)
        return (1 - sigma_B111) * latents_BCHW + sigma_B111 * (self.noise_scale * noise_BCHW)

    def _training_sigma(self, normal_B: Tensor) -> Tensor:
        """Return 1 - t for logit-normal t, shifted: shifting adds log(shift) to the logit of a noise level."""
        return torch.sigmoid(normal_B * self.t_std + self._logit_mean)

    def quantile(self, sigma_B: Tensor) -> Tensor:
        """Return the share of training noise levels below each of `sigma_B`."""
        return torch.special.ndtr((torch.logit(sigma_B) - self._logit_mean) / self.t_std)

    def _noise_schedule(self, num_steps: int) -> Tensor:
        """Return num_steps noise levels from sigma_max down, equally spaced before the shift, and 0."""
        first, last = (sigma / (self.shift - (self.shift - 1) * sigma) for sigma in (self.sigma_max, self.sigma_min))
        ramp = torch.linspace(first, last, num_steps + (last == 0), dtype=torch.float64)[:num_steps]
        shifted = (self.shift * ramp / (1 + (self.shift - 1) * ramp)).clamp(max=1)
        return torch.cat([shifted, torch.zeros(1, dtype=torch.float64)])

    def with_noise_range(self, low: float, high: float) -> Self:
        """Return the objective with `low` and `high` as the sampler's last and first noise level. Raises UserError if `high` exceeds 1."""
        if high > 1:
            raise UserError(
                f"noise_range is {low:g} {high:g}, and the noise levels of a model of flow matching end at 1, where there is noise alone: "
                f"take a range such as 0.02 1, or leave it out."
            )
        return replace(self, sigma_min=low, sigma_max=high)

    @property
    def _logit_mean(self) -> float:
        """Mean of logit(sigma) in training."""
        return math.log(self.shift) - self.t_mean
