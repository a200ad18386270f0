"""Exponential moving averages of the weights: what pictures are made with. Several lengths at once, sharded as the model is.

They may lie in the machine's memory while the weights are on a GPU. A stream of its own then brings one weight's average at a time to the
GPU, updates it there and takes it back, while the next step computes.

What training changes: weights, their averages, the optimizers' moments. Spread over processes as the recipe says.

`learn` is a whole step. It gives the device its work and waits for none of it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from microdit.checkpoint import Checkpoint
from microdit.config.schema import EMARecipe, Recipe
from microdit.diffusion.edm import EDM
from microdit.distributed import World
from microdit.models.microdit import MicroDiT, ModelConfig
from microdit.pipelines.sampling import frozen_model
from microdit.training.checkpointing import Tensors, load_into, whole
from microdit.training.gradients import gradients_of
from microdit.training.meters import SUMS, Reading, StepSums, Tally
from microdit.training.noise import MicroBatch
from microdit.training.optim import Optimizers
from microdit.training.parallel import DenoisingLoss, compute_dtype, local, mesh_of, prepare_blocks, shard_the_rest, sharding_of, total_norm
from microdit.training.stability import Guard, Verdict


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


class TrainingState:
    """`model` as it was built, and `loss`, which calls it."""

    def __init__(self, recipe: Recipe, config: ModelConfig, world: World, fill: Callable[[MicroDiT], None] | None, fresh: bool):
        """The weights to begin with are those that `fill` gives the model, which is spread by then; else, if `fresh`, drawn by the recipe's
        seed; if not, `load` must follow.
        """
        diffusion = recipe.diffusion
        self.edm = EDM(diffusion.sigma_data, diffusion.P_mean, diffusion.P_std)
        self.model = _build(config, recipe, fresh and fill is None, world.device)
        parameters = sum(weight.numel() for weight in self.model.parameters())
        self.sharding = world.share(sharding_of(recipe.engine, world, parameters))
        self.parameters = parameters
        self.mesh = mesh_of(self.sharding, world)
        dtype = compute_dtype(recipe.engine, world.device)
        loss = DenoisingLoss(self.model, self.edm, recipe.model.mask_padding)
        prepare_blocks(self.model, recipe.engine, self.mesh, world.device)
        if self.mesh is not None:
            shard_the_rest(loss, recipe.engine, self.mesh, world.device)
        if fill is not None or not fresh:  # memory only now: shards may be all that fits
            loss.to_empty(device=world.device)
        if fill is not None:
            fill(self.model)
        self.loss = loss
        self._world = world
        self._weights = list(self.model.parameters())
        self.gradients = gradients_of(loss, self.sharding, dtype, recipe.engine, world)
        self.optimizers = Optimizers(self.model, recipe.optimizer, recipe.engine.compile)
        on_cpu = recipe.engine.averages_on_cpu
        self.averages = dict(zip(names_of(recipe.ema), (EMA(self.model, ema, on_cpu) for ema in recipe.ema), strict=True))

    def learn(
        self, parts: Sequence[MicroBatch], step: int, grad_clip: float, guard: Guard, stops: tuple[bool, bool] = (False, False)
    ) -> Reading:
        """Queue step number `step` (from 0): gradients of the mean loss over the global batch, clipped; the optimizers; the averages.

        `parts` is this process's share, in micro-batches; `stops` what it was asked (`Tally.add_stops`). Nothing here waits for the device.
        `what_happened` makes sense of the numbers to come. All processes must call this.
        """
        device, samples = self._world.device, sum(len(part) for part in parts)
        tally = Tally(device)
        self.gradients.begin()
        for number, part in enumerate(parts, start=1):
            batch = part.to(device)
            loss_B = self.gradients.add(batch, samples, last=number == len(parts))
            tally.add(loss_B, batch.sigma_B, self.edm)
        tally.add_stops(*stops)
        self._world.sum(tally.sums)
        loss, grad_norm = tally.loss, self.clip(grad_clip)
        taken, usual = guard.judge(loss, grad_norm)
        self.take_step(step, taken)
        self.optimizers.zero_grad()
        return Reading(torch.cat([tally.sums, torch.stack([loss, grad_norm.to(loss.dtype), taken.to(loss.dtype), usual.to(loss.dtype)])]))

    def clip(self, largest_norm: float) -> Tensor:
        """Scale the gradients down to the norm `largest_norm`, if theirs is larger. Returns theirs, over all processes, on the device."""
        gradients = self.optimizers.take_gradients(self.gradients.held)
        norm = total_norm(gradients, self.mesh)
        self.optimizers.clip(largest_norm, norm)
        return norm

    def take_step(self, step: int, taken: Tensor) -> None:
        """Step number `step` (from 0), on gradients that `clip` has seen; nothing changes if `taken`, a scalar on the device, is 0."""
        for average in self.averages.values():
            average.let_weights_change()
        self.optimizers.step(taken)
        for average in self.averages.values():
            average.update(step, taken)

    def is_finite(self) -> bool:
        """Whether every weight is a number. All processes must call this."""
        norm = torch.nn.utils.get_total_norm([weight.detach() for weight in self._weights], foreach=True)
        return bool(whole(norm).isfinite())

    def tensors(self) -> Tensors:
        """Everything, named PART/NAME. They are the live tensors: filling them fills the state."""
        parts: dict[str, dict[str, Tensor]] = {
            "model": {name: weight.detach() for name, weight in self.model.named_parameters()},
            **{name: ema.averages for name, ema in self.averages.items()},
            "optimizer": self.optimizers.tensors(),
        }
        return {f"{part}/{name}": tensor for part, content in parts.items() for name, tensor in content.items()}

    def drawing_model(self) -> MicroDiT:
        """A model with the first average (the weights, where there is none), whole on each process. All processes must call this."""
        averages = next(iter(self.averages.values()), None)
        source = averages.averages if averages else {name: weight.detach() for name, weight in self.model.named_parameters()}
        return frozen_model(self.model.config, {name: whole(tensor) for name, tensor in source.items()})

    def load(self, checkpoint: Checkpoint) -> None:
        """Raises UserError if it holds other tensors. All processes must call this."""
        load_into(checkpoint, self.tensors(), self._world)


def _build(config: ModelConfig, recipe: Recipe, drawn: bool, device: torch.device) -> MicroDiT:
    """On the device, with weights that are drawn; or on the meta device, where others will be read into the shards alone."""
    if not drawn:
        with torch.device("meta"):
            return MicroDiT(config).train()
    torch.manual_seed(recipe.seed)  # of the initial weights, the same on all processes; every later draw has its own generator
    model = MicroDiT(config)
    model.scale_init(recipe.model.init_scale)
    return model.train().to(device)


def what_happened(values: list[float]) -> tuple[StepSums, Verdict]:
    """The numbers of a step that `TrainingState.learn` has queued, once they are read."""
    loss, grad_norm, taken, usual = values[SUMS:]
    return StepSums.of(values[:SUMS]), Verdict(loss, grad_norm, taken > 0, usual)
