"""What one step adds up, over micro-batches and processes: losses, also by noise level, and requests to stop."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from microdit.diffusion.edm import EDM

BINS = 8


def noise_bins(sigma_B: Tensor, edm: EDM) -> Tensor:
    """Number 0 to 7 of each noise level, from little to much. A bin holds an eighth of the levels drawn in training."""
    quantile_B = torch.special.ndtr((sigma_B.log() - edm.P_mean) / edm.P_std)
    return (quantile_B * BINS).long().clamp(0, BINS - 1)


class Tally:
    """Sums of the losses and their number, by noise level. One tensor, so that one message adds up all processes."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2 * BINS + 2, dtype=torch.float64, device=device)

    def add(self, loss_B: Tensor, sigma_B: Tensor, edm: EDM) -> None:
        bins_B = noise_bins(sigma_B, edm)
        self.sums.index_add_(0, bins_B, loss_B.detach().double())
        self.sums.index_add_(0, bins_B + BINS, torch.ones_like(loss_B, dtype=torch.float64))

    def add_stops(self, by_machine: bool, by_user: bool) -> None:
        self.sums[-2] += by_machine
        self.sums[-1] += by_user

    def result(self) -> "StepSums":
        values = self.sums.tolist()
        return StepSums(values[:BINS], values[BINS : 2 * BINS], values[-2] > 0, values[-1] > 0)


@dataclass(frozen=True)
class StepSums:
    """Sums of losses and numbers of samples in each noise bin; whether any process was asked to stop, and by whom."""

    losses: list[float]
    counts: list[float]
    stop_by_machine: bool = False
    stop_by_user: bool = False

    @property
    def loss(self) -> float:
        """The mean over all samples."""
        return sum(self.losses) / max(1.0, sum(self.counts))


def by_noise(losses: list[float], counts: list[float]) -> list[float | None]:
    """The mean in each bin; None where there was no sample, or where it is not a number."""
    means = [loss / count if count else None for loss, count in zip(losses, counts, strict=True)]
    return [mean if mean is not None and math.isfinite(mean) else None for mean in means]
