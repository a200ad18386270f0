"""The state that training changes: weights, their averages (EMA), and the optimizers' moments, spread over processes as the recipe says.

`TrainingState.train_step` is the one training step, which the trainer, `microdit bench` and the lab's timing share. It queues its work on
the device and waits for none of it.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from microdit.checkpoint import Checkpoint
from microdit.config.schema import EMARecipe, Recipe, projector_of
from microdit.distributed import World
from microdit.models.alignment import Alignment
from microdit.models.microdit import MicroDiT, ModelConfig
from microdit.pipelines.sampling import frozen_model
from microdit.training.checkpointing import Tensors, load_into, whole
from microdit.training.distillation import Teacher
from microdit.training.gradients import gradients_of
from microdit.training.meters import SUMS, LossStats, PendingStep, StepResult
from microdit.training.noise import MicroBatch
from microdit.training.optim import Optimizers
from microdit.training.parallel import (
    DenoisingLoss,
    compute_dtype,
    local,
    mesh_of,
    prepare_blocks,
    shard_the_rest,
    sharding_of,
    shards_of,
    total_norm,
)
from microdit.training.stability import SpikeDecision, SpikeGuard


class EMA:
    """One exponential moving average of the weights, sharded like the model.

    With `start` 0, its length grows from short to `decay`, so that the initial weights are forgotten. With a later `start` it begins there
    as a copy of the weights, at full length. With `on_cpu`, averages live in the machine's memory: a CUDA stream of their own brings one
    weight's average at a time to the GPU, updates it and takes it back, while the next step computes.
    """

    def __init__(self, model: nn.Module, recipe: EMARecipe, on_cpu: bool = False):
        self.decay, self.start = recipe.decay, recipe.start
        self._weights: list[Tensor] = list(model.parameters())
        self._averages = {name: (_on_cpu if on_cpu else Tensor.clone)(weight.detach()) for name, weight in model.named_parameters()}
        self._stream = torch.cuda.Stream() if on_cpu and self._weights[0].device.type == "cuda" else None

    @property
    def averages(self) -> dict[str, Tensor]:
        """The averages by the names of the model's parameters. Waits for an update that is running."""
        if self._stream:
            self._stream.synchronize()
        return self._averages

    @torch.no_grad()
    def update(self, step: int, taken: Tensor) -> None:
        """Update after step number `step` (from 0): average += (1 - decay) * (weights - average).

        `taken` is a scalar on the weights' device: 1.0, or 0.0 for a skipped step, which leaves the average unchanged.
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
        """Make the device wait for a running update, which reads the weights. Call it before the optimizer step."""
        if self._stream:
            torch.cuda.current_stream().wait_stream(self._stream)


def _on_cpu(weight: Tensor) -> Tensor:
    """Return a pinned copy in the machine's memory, of this process's part if the weight is sharded."""
    part = local(weight)
    copy = torch.empty_like(part, device="cpu", pin_memory=part.device.type == "cuda").copy_(part)
    # DTensor.from_local would take it back to the mesh's device; this is what FSDP does with weights that it keeps on the CPU.
    return DTensor(copy, weight._spec, requires_grad=False) if isinstance(weight, DTensor) else copy


def names_of(emas: list[EMARecipe]) -> list[str]:
    """Return the names of the files that hold the averages: ema for the first, ema-DECAY for the others."""
    return ["ema" if index == 0 else f"ema-{ema.decay}" for index, ema in enumerate(emas)]


class TrainingState:
    """The model, the loss that calls it, gradients, optimizers and averages.

    With a recipe that has an `alignment`, its projector is trained beside the model: part of the checkpoint, but not of the averages.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: ModelConfig,
        world: World,
        fill: Callable[[MicroDiT], None] | None,
        fresh: bool,
        feature_channels: int | None = None,
        teacher: Teacher | None = None,
    ):
        """Build and shard the model. `fill` loads initial weights into it afterwards; without it they are random (by the recipe's seed) if
        `fresh`, and otherwise undefined until `load` is called. `feature_channels` are those that a recipe's alignment needs.
        With a `teacher`, losses are the distances from its targets.
        """
        self.objective = recipe.objective
        self.model = _build(config, recipe, fresh and fill is None, world.device)
        parameters = sum(weight.numel() for weight in self.model.parameters())
        self.sharding = world.share(sharding_of(recipe.engine, world, parameters))
        self.parameters = parameters
        self.mesh = mesh_of(self.sharding, world)
        dtype = compute_dtype(recipe.engine, world.device)
        drawn = _random_alignment(recipe, config, feature_channels)
        self.alignment = None if drawn is None else deepcopy(drawn).to(self.model.patch_embed.weight.device)  # which may be the meta device
        loss = DenoisingLoss(self.model, self.objective, recipe.model.mask_padding, self.alignment)
        prepare_blocks(self.model, recipe.engine, self.mesh, world.device)
        if self.mesh is not None:
            shard_the_rest(loss, recipe.engine, self.mesh, world.device)
        if fill is not None or not fresh:  # memory only now: shards may be all that fits
            loss.to_empty(device=world.device)
        if fill is not None:
            fill(self.model)
        if drawn is not None and self.alignment is not None and fresh:
            _copy(drawn, self.alignment)
        self.loss = loss
        self._world, self._teacher = world, teacher
        self._weights = list(loss.parameters())
        self.gradients = gradients_of(loss, self.sharding, dtype, recipe.engine, world)
        self.optimizers = Optimizers(self.model, recipe.optimizer, recipe.engine.compile, self.alignment)
        on_cpu = recipe.engine.averages_on_cpu
        self.averages = dict(zip(names_of(recipe.ema), (EMA(self.model, ema, on_cpu) for ema in recipe.ema), strict=True))

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        step: int,
        learning_rate: float,
        grad_clip: float,
        guard: SpikeGuard,
        stops: tuple[bool, bool] = (False, False),
    ) -> PendingStep:
        """Queue training step number `step` (from 0) on the device, without waiting for it.

        Computes the gradients of the mean loss over the global batch, clips their norm to `grad_clip`, lets `guard` decide on the device
        whether to apply them, and updates weights and averages.

        `micro_batches` are this process's part of the global batch; `stops` are the stop requests that it received (by the machine, by
        the user), which travel to all processes along with the losses. Pass the returned numbers to `read_step` once they are needed.
        All processes must call this.
        """
        device, samples = self._world.device, sum(len(part) for part in micro_batches)
        stats = LossStats(device)
        self.optimizers.set_rate(learning_rate)
        self.gradients.begin()
        for number, part in enumerate(micro_batches, start=1):
            batch = part.to(device) if self._teacher is None else self._teacher.with_target(part.to(device))
            losses = self.gradients.add(batch, samples, last=number == len(micro_batches))
            stats.add(losses.denoising_B, batch.sigma_B, self.objective, losses.alignment_B)
        stats.add_stops(*stops)
        self._world.sum(stats.sums)
        loss, grad_norm = stats.loss, self.clip(grad_clip)
        taken, usual = guard.judge(loss, grad_norm)
        self.apply_gradients(step, taken)
        self.optimizers.zero_grad()
        decision = torch.stack([loss, grad_norm.to(loss.dtype), taken.to(loss.dtype), usual.to(loss.dtype)])
        return PendingStep(torch.cat([stats.sums, decision]))

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradients to `max_norm`. Returns their norm before clipping, over all processes, as a scalar on the device."""
        gradients = self.optimizers.take_gradients(self.gradients.held)
        norm = total_norm(gradients, self.mesh)
        self.optimizers.clip(max_norm, norm)
        return norm

    def apply_gradients(self, step: int, taken: Tensor) -> None:
        """Update weights and averages from the clipped gradients. If `taken`, a scalar on the device, is 0, nothing changes."""
        for average in self.averages.values():
            average.let_weights_change()
        self.optimizers.step(taken)
        for average in self.averages.values():
            average.update(step, taken)

    def is_finite(self) -> bool:
        """Return whether all weights are finite. All processes must call this."""
        norm = torch.nn.utils.get_total_norm([weight.detach() for weight in self._weights], foreach=True)
        return bool(whole(norm).isfinite())

    def tensors(self) -> Tensors:
        """Return all tensors, named PART/NAME. They are the live ones: writing to them changes the state."""
        parts: dict[str, dict[str, Tensor]] = {
            "model": {name: weight.detach() for name, weight in self.model.named_parameters()},
            **{name: ema.averages for name, ema in self.averages.items()},
            "optimizer": self.optimizers.tensors(),
        }
        if self.alignment is not None:
            parts["alignment"] = {name: weight.detach() for name, weight in self.alignment.named_parameters()}
        return {f"{part}/{name}": tensor for part, content in parts.items() for name, tensor in content.items()}

    def ema_model(self) -> MicroDiT:
        """Return a full model with the first average (the weights if there is none). All processes must call this."""
        averages = next(iter(self.averages.values()), None)
        source = averages.averages if averages else {name: weight.detach() for name, weight in self.model.named_parameters()}
        return frozen_model(self.model.config, {name: whole(tensor) for name, tensor in source.items()})

    def load(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint. Raises UserError if it holds other tensors. All processes must call this."""
        load_into(checkpoint, self.tensors(), self._world)


def _build(config: ModelConfig, recipe: Recipe, random_weights: bool, device: torch.device) -> MicroDiT:
    """Build the model on `device` with random weights, or on the meta device if others are to be loaded."""
    if not random_weights:
        with torch.device("meta"):
            return MicroDiT(config).train()
    torch.manual_seed(recipe.seed)  # of the initial weights, the same on all processes; every later draw has its own generator
    model = MicroDiT(config)
    model.scale_init(recipe.model.init_scale)
    return model.train().to(device)


def _random_alignment(recipe: Recipe, config: ModelConfig, feature_channels: int | None) -> Alignment | None:
    """Return the recipe's alignment with weights drawn by its seed on the CPU, without touching other random numbers; None without one."""
    if recipe.alignment is None:
        return None
    assert feature_channels is not None, "checked when the training was set up"
    shape = projector_of(recipe.alignment, config.dim, feature_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return Alignment(shape, recipe.alignment.block, recipe.alignment.weight, recipe.alignment.spatial_norm).train()


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    """Copy the weights of a module to one that may be sharded: each process its part."""
    for weight, shard in zip(source.parameters(), shards_of(target), strict=True):
        shard.leaf.copy_(shard.own(weight))


def read_step(values: list[float]) -> tuple[StepResult, SpikeDecision]:
    """Parse the numbers of a step that `TrainingState.train_step` queued, from `PendingStep.values`."""
    loss, grad_norm, taken, usual = values[SUMS:]
    return StepResult.of(values[:SUMS]), SpikeDecision(loss, grad_norm, taken > 0, usual)
