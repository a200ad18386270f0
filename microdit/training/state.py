"""What training changes: weights, their averages, the optimizers' moments. Spread over processes as the recipe says.

`learn` is a whole step. It gives the device its work and waits for none of it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from microdit.checkpoint import Checkpoint
from microdit.diffusion.edm import EDM
from microdit.distributed import World
from microdit.model.microdit import MicroDiT, ModelConfig
from microdit.pipeline import model_of
from microdit.recipe import Recipe
from microdit.training.draws import MicroBatch
from microdit.training.ema import EMA, names_of
from microdit.training.gradients import gradients_of
from microdit.training.guard import Guard, Verdict
from microdit.training.optim import Optimizers
from microdit.training.parallel import compute_dtype, mesh_of, prepare_blocks, shard_the_rest, sharding_of
from microdit.training.saving import Tensors, load_into, whole
from microdit.training.shards import total_norm
from microdit.training.step import DenoisingLoss
from microdit.training.tally import SUMS, Reading, StepSums, Tally


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
        return model_of(self.model.config, {name: whole(tensor) for name, tensor in source.items()})

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
