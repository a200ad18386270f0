"""What one step adds up, over micro-batches and processes: losses, also by noise level, and requests to stop."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from microdit.diffusion.edm import EDM

BINS = 8
SUMS = 2 * BINS + 2  # losses, their numbers, requests to stop


def noise_bins(sigma_B: Tensor, edm: EDM) -> Tensor:
    """Number 0 to 7 of each noise level, from little to much. A bin holds an eighth of the levels drawn in training."""
    quantile_B = torch.special.ndtr((sigma_B.log() - edm.P_mean) / edm.P_std)
    return (quantile_B * BINS).long().clamp(0, BINS - 1)


class Tally:
    """Sums of the losses and their number, by noise level. One tensor, so that one message adds up all processes; nothing here waits for
    the device."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(SUMS, dtype=exact_dtype(device), device=device)

    def add(self, loss_B: Tensor, sigma_B: Tensor, edm: EDM) -> None:
        bins_B = noise_bins(sigma_B, edm)
        self.sums.index_add_(0, bins_B, loss_B.detach().to(self.sums.dtype))
        self.sums.index_add_(0, bins_B + BINS, torch.ones_like(loss_B, dtype=self.sums.dtype))

    def add_stops(self, by_machine: bool, by_user: bool) -> None:
        self.sums[-2] += by_machine
        self.sums[-1] += by_user

    @property
    def loss(self) -> Tensor:
        """The mean over all samples, a scalar on the device."""
        return self.sums[:BINS].sum() / self.sums[BINS : 2 * BINS].sum().clamp(min=1)


@dataclass(frozen=True)
class StepSums:
    """Sums of losses and numbers of samples in each noise bin; whether any process was asked to stop, and by whom."""

    losses: list[float]
    counts: list[float]
    stop_by_machine: bool = False
    stop_by_user: bool = False

    @classmethod
    def of(cls, values: list[float]) -> "StepSums":
        """From a `Tally`'s sums, read from the device."""
        return cls(values[:BINS], values[BINS : 2 * BINS], values[2 * BINS] > 0, values[2 * BINS + 1] > 0)

    @property
    def stop(self) -> bool:
        return self.stop_by_machine or self.stop_by_user

    @property
    def loss(self) -> float:
        """The mean over all samples."""
        return sum(self.losses) / max(1.0, sum(self.counts))


class Reading:
    """Numbers on their way from the device to the program. Creating one does not wait for them; `values` does."""

    def __init__(self, numbers_N: Tensor):
        self._event: torch.cuda.Event | None = None
        if numbers_N.device.type == "cuda":
            self._numbers_N = torch.empty(numbers_N.shape, dtype=numbers_N.dtype, pin_memory=True)
            self._numbers_N.copy_(numbers_N, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._numbers_N = numbers_N

    def values(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._numbers_N.tolist()


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, which Apple's GPUs do not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def by_noise(losses: list[float], counts: list[float]) -> list[float | None]:
    """The mean in each bin; None where there was no sample, or where it is not a number."""
    means = [loss / count if count else None for loss, count in zip(losses, counts, strict=True)]
    return [mean if mean is not None and math.isfinite(mean) else None for mean in means]
