"""An exponential moving average of the weights: what pictures are made with."""

import copy

import torch
from torch import Tensor

from microdit.model.microdit import MicroDiT


class EMA:
    """Holds `model`, the averaged copy. The average starts short and grows to `decay`, so that early weights are forgotten."""

    def __init__(self, model: MicroDiT, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._averages: list[Tensor] = list(self.model.parameters())
        self._weights: list[Tensor] = list(model.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step number `step` (from 0): average += (1 - decay) * (weights - average)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
