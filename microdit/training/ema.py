"""Exponential moving averages of the weights: what pictures are made with. Several lengths at once, sharded as the model is."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from microdit.recipe import EMARecipe


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
    def update(self, step: int) -> None:
        """After step number `step` (from 0): average += (1 - decay) * (weights - average)."""
        averages, weights = [local(tensor) for tensor in self.averages.values()], [local(weight) for weight in self._weights]
        if step < self.start:
            torch._foreach_copy_(averages, weights)
            return
        decay = self.decay if self.start else min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, weights, 1 - decay)


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor; averaging needs no other."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def names_of(emas: list[EMARecipe]) -> list[str]:
    """Of the files that hold the averages: ema for the first, ema-DECAY for the others."""
    return ["ema" if index == 0 else f"ema-{ema.decay}" for index, ema in enumerate(emas)]
