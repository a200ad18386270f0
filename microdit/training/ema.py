"""Exponential moving averages of the weights: what pictures are made with. Several lengths at once, sharded as the model is."""

import torch
from torch import Tensor, nn

from microdit.recipe import EMARecipe
from microdit.training.shards import local


class EMA:
    """One average; `averages` by the names of the model's parameters.

    From step 0 it starts short and grows to `decay`, so that random weights are forgotten. From a later `start` on it starts as a copy
    of the weights, with its whole length.
    """

    def __init__(self, model: nn.Module, recipe: EMARecipe):
        self.decay, self.start = recipe.decay, recipe.start
        self._weights: list[Tensor] = list(model.parameters())
        self.averages: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int, taken: Tensor) -> None:
        """After step number `step` (from 0): average += (1 - decay) * (weights - average).

        `taken`: 1.0, or 0.0 if the step was not taken, which leaves the average as it was; a scalar on the weights' device.
        """
        averages, weights = [local(tensor) for tensor in self.averages.values()], [local(weight) for weight in self._weights]
        if step < self.start:
            torch._foreach_copy_(averages, weights)
            return
        decay = self.decay if self.start else min(self.decay, (1 + step) / (10 + step))
        share = taken * (1 - decay)
        torch._foreach_lerp_(averages, weights, [share.expand_as(weight) for weight in weights])


def names_of(emas: list[EMARecipe]) -> list[str]:
    """Of the files that hold the averages: ema for the first, ema-DECAY for the others."""
    return ["ema" if index == 0 else f"ema-{ema.decay}" for index, ema in enumerate(emas)]
