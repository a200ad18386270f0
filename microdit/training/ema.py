"""Exponential moving averages of the weights: what pictures are made with. Several lengths at once, sharded as the model is.

They may lie in the machine's memory while the weights are on a GPU. A stream of its own then brings one weight's average at a time to the
GPU, updates it there and takes it back, while the next step computes.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from microdit.recipe import EMARecipe
from microdit.training.shards import local


class EMA:
    """One average; `averages` by the names of the model's parameters.

    From step 0 it starts short and grows to `decay`, so that random weights are forgotten. From a later `start` on it starts as a copy
    of the weights, with its whole length.
    """

    def __init__(self, model: nn.Module, recipe: EMARecipe, on_cpu: bool = False):
        self.decay, self.start = recipe.decay, recipe.start
        self._weights: list[Tensor] = list(model.parameters())
        self._averages = {name: (_on_cpu if on_cpu else Tensor.clone)(weight.detach()) for name, weight in model.named_parameters()}
        self._stream = torch.cuda.Stream() if on_cpu and self._weights[0].device.type == "cuda" else None

    @property
    def averages(self) -> dict[str, Tensor]:
        """Complete: this waits for an update that is under way."""
        if self._stream:
            self._stream.synchronize()
        return self._averages

    @torch.no_grad()
    def update(self, step: int, taken: Tensor) -> None:
        """After step number `step` (from 0): average += (1 - decay) * (weights - average).

        `taken`: 1.0, or 0.0 if the step was not taken, which leaves the average as it was; a scalar on the weights' device.
        """
        averages, weights = [local(tensor) for tensor in self._averages.values()], [local(weight) for weight in self._weights]
        decay = self.decay if self.start else min(self.decay, (1 + step) / (10 + step))
        share = taken * (1 - decay)
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for average, weight in zip(averages, weights, strict=True):
                    there = weight if step < self.start else average.to(weight.device, non_blocking=True).lerp_(weight, share)
                    average.copy_(there, non_blocking=True)
            share.record_stream(self._stream)
        elif step < self.start:
            torch._foreach_copy_(averages, weights)
        else:
            torch._foreach_lerp_(averages, weights, [share.expand_as(weight) for weight in weights])

    def let_weights_change(self) -> None:
        """Have the device wait for an update that still reads them. Call before a step of the optimizer."""
        if self._stream:
            torch.cuda.current_stream().wait_stream(self._stream)


def _on_cpu(weight: Tensor) -> Tensor:
    """A copy in the machine's memory, which a GPU can read by itself; of a sharded weight, of this process's part."""
    part = local(weight)
    copy = torch.empty_like(part, device="cpu", pin_memory=part.device.type == "cuda").copy_(part)
    # DTensor.from_local would take it back to the mesh's device; this is what FSDP does with weights that it keeps on the CPU.
    return DTensor(copy, weight._spec, requires_grad=False) if isinstance(weight, DTensor) else copy


def names_of(emas: list[EMARecipe]) -> list[str]:
    """Of the files that hold the averages: ema for the first, ema-DECAY for the others."""
    return ["ema" if index == 0 else f"ema-{ema.decay}" for index, ema in enumerate(emas)]
