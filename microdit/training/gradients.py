"""Gradients of a step, accumulated over its micro-batches into the weights' `grad`.

Where the model is sharded, FSDP casts the weights to the dtype of matrix products and reduces the gradients. Where each process holds it
whole, `WholeModelGradients` does, and lets a GPU replay the thousands of kernels of a micro-batch as one CUDA graph: launching them one by
one takes the CPU longer than the GPU needs to compute them (docs/gpu).
"""

from abc import ABC, abstractmethod
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from microdit.config.schema import EngineRecipe
from microdit.distributed import World
from microdit.planning.memory import Sharding
from microdit.training.noise import TrainingBatch
from microdit.training.parallel import DenoisingLoss, SampleLosses, spare

WARM_UP = 3  # micro-batches of a shape before it is recorded: kernels are chosen and compiled by then
MOST_GRAPHS = 8  # each keeps its memory; a mask that falls step by step has more shapes than that, and stays eager


class Gradients(ABC):
    """A way to compute gradients. `held` has one for each weight, in any dtype, where they are not in `grad`."""

    held: list[Tensor] | None = None

    @abstractmethod
    def begin(self) -> None:
        """Call before a step's first micro-batch."""

    @abstractmethod
    def add(self, batch: TrainingBatch, samples: int, last: bool) -> SampleLosses:
        """Add the gradients of the batch's summed losses over `samples`; if it is the `last` of the step, over all processes.

        Returns the losses, which stay until the next call.
        """

    @abstractmethod
    def current_loss(self) -> nn.Module:
        """Return the loss module with the current weights."""


def gradients_of(loss: DenoisingLoss, sharding: Sharding, dtype: torch.dtype, engine: EngineRecipe, world: World) -> Gradients:
    """Choose the implementation for the sharding, the dtype of matrix products, and the device."""
    replay = engine.cuda_graphs and world.device.type == "cuda" and torch.version.hip is None
    if sharding == "ddp" or (sharding == "none" and (replay or dtype != torch.float32)):
        return WholeModelGradients(loss, dtype, replay, world, engine.release_gradients)
    return AutogradGradients(loss)


class AutogradGradients(Gradients):
    """Gradients as autograd or FSDP compute them.

    FSDP reduces over processes once a step, unless there is no room for unreduced gradients until then: in that case those of a machine
    reduce at each micro-batch, and machines at the last one.
    """

    def __init__(self, loss: nn.Module):
        self._loss = loss
        self._bytes = sum(weight.numel() for weight in loss.parameters()) * torch.float32.itemsize

    def begin(self) -> None:
        pass  # gradients are added to those that are there, and there are none

    def add(self, batch: TrainingBatch, samples: int, last: bool) -> SampleLosses:
        if isinstance(self._loss, FSDPModule):
            self._loss.set_requires_gradient_sync(last or not spare(self._bytes, batch.sigma_B.device))
            self._loss.set_requires_all_reduce(last)  # which only hybrid sharding has
        losses: SampleLosses = self._loss(batch)
        (losses.total_B.sum() / samples).backward()
        return losses.detach()

    def current_loss(self) -> nn.Module:
        return self._loss


@dataclass(frozen=True)
class Recorded:
    """A CUDA graph of one micro-batch, with its input and output tensors."""

    graph: torch.cuda.CUDAGraph
    batch: TrainingBatch
    losses: SampleLosses
    gradients: list[Tensor]


class WholeModelGradients(Gradients):
    """Gradients of an unsharded model, computed by a copy in `dtype` that is refreshed from the float32 weights in each step.

    They are accumulated in float32 and reduced over processes once a step. With `release`, which is for one process, none is kept longer
    than needed: with several micro-batches each is added to its sum as soon as autograd has computed it; with one there are no sums, and
    gradients stay in `held` until the optimizer consumes them.
    """

    def __init__(self, loss: DenoisingLoss, dtype: torch.dtype, replay: bool, world: World, release: bool = False):
        self._weights: list[Tensor] = list(loss.parameters())
        self._copied = dtype != torch.float32
        self._loss = deepcopy(loss).to(dtype) if self._copied else loss
        self._leaves: list[Tensor] = list(self._loss.parameters())
        self._world, self._release, self._adds = world, release, False
        self._flat, self._sums = torch.empty(0), list[Tensor]()
        if not release:
            self._take_memory_for_sums()
        else:
            for number, leaf in enumerate(self._leaves):
                leaf.register_post_accumulate_grad_hook(partial(self._add_at_once, number))
        self._replay, self._first = replay, True
        self._recorded: dict[tuple[object, ...], Recorded] = {}
        self._seen: Counter[tuple[object, ...]] = Counter()

    def begin(self) -> None:
        self._first, self.held = True, None
        self._refresh()

    def add(self, batch: TrainingBatch, samples: int, last: bool) -> SampleLosses:
        if self._release:
            self._adds = not (self._first and last)
            if self._adds and self._first:
                if not self._sums:
                    self._take_memory_for_sums()
                self._flat.zero_()
        losses, gradients = self._replayed(batch, samples) if self._is_recorded(batch, samples) else self._computed(batch, samples)
        if self._release and not self._adds:
            self.held = gradients
            return losses
        if self._adds:
            pass  # they are in the sums
        elif self._first:
            torch._foreach_copy_(self._sums, gradients)
        else:
            torch._foreach_add_(self._sums, gradients)
        self._first = False
        if last and self._world.size > 1:
            self._world.sum(self._flat)
            self._flat /= self._world.size
        for weight, total in zip(self._weights, self._sums, strict=True):
            weight.grad = total
        return losses

    def _take_memory_for_sums(self) -> None:
        """Allocate the sums as one tensor, so that one all-reduce adds up all processes."""
        self._flat = torch.zeros(sum(weight.numel() for weight in self._weights), device=self._world.device)
        pieces = self._flat.split([weight.numel() for weight in self._weights])
        self._sums = [piece.view_as(weight) for piece, weight in zip(pieces, self._weights, strict=True)]

    def current_loss(self) -> nn.Module:
        self._refresh()
        return self._loss

    @torch.no_grad()
    def _refresh(self) -> None:
        if self._copied:
            torch._foreach_copy_(self._leaves, self._weights)

    def _computed(self, batch: TrainingBatch, samples: int) -> tuple[SampleLosses, list[Tensor]]:
        for leaf in self._leaves:
            leaf.grad = None
        losses: SampleLosses = self._loss(batch)
        (losses.total_B.sum() / samples).backward()
        gradients = [] if self._adds else [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves]
        for leaf in self._leaves:
            leaf.grad = None
        return losses.detach(), gradients

    def _add_at_once(self, number: int, leaf: Tensor) -> None:
        if self._adds and leaf.grad is not None:
            self._sums[number].add_(leaf.grad)
            leaf.grad = None

    def _is_recorded(self, batch: TrainingBatch, samples: int) -> bool:
        """Return whether the shape has a graph; record one once the shape was met often enough."""
        key = (self._adds, *_shape(batch, samples))
        if not self._replay or key in self._recorded:
            return self._replay
        self._seen[key] += 1
        if self._seen[key] <= WARM_UP or len(self._recorded) == MOST_GRAPHS:
            return False
        own = batch.map(torch.clone)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._recorded.values())).graph.pool() if self._recorded else None
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # another thread reads batches
            losses, gradients = self._computed(own, samples)
        self._recorded[key] = Recorded(graph, own, losses, gradients)
        return True

    def _replayed(self, batch: TrainingBatch, samples: int) -> tuple[SampleLosses, list[Tensor]]:
        recorded = self._recorded[self._adds, *_shape(batch, samples)]
        for field in fields(batch):
            source, target = getattr(batch, field.name), getattr(recorded.batch, field.name)
            if source is not None:
                target.copy_(source)
        recorded.graph.replay()
        return recorded.losses, recorded.gradients


def _shape(batch: TrainingBatch, samples: int) -> tuple[object, ...]:
    tensors = [getattr(batch, field.name) for field in fields(batch)]
    return samples, *(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors)
