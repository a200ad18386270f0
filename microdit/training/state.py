"""What training changes: weights, their averages, the optimizers' moments. Spread over processes as the recipe says."""

import torch
from torch import Tensor

from microdit.checkpoint import Checkpoint
from microdit.diffusion.edm import EDM
from microdit.distributed import World
from microdit.model.microdit import MicroDiT, ModelConfig
from microdit.pipeline import model_of
from microdit.recipe import Recipe
from microdit.training.ema import EMA, names_of
from microdit.training.optim import Optimizers
from microdit.training.parallel import compute_dtype, prepare_blocks, sharding_of, wrap
from microdit.training.saving import Tensors, load_into, whole
from microdit.training.step import DenoisingLoss


class TrainingState:
    """`model` as it was built; `loss`, the module to call, wraps it."""

    def __init__(self, recipe: Recipe, config: ModelConfig, world: World, weights: dict[str, Tensor] | None, fresh: bool):
        """`weights`: whole ones to begin with. Else, if `fresh`, drawn by the recipe's seed; if not, `load` must follow."""
        diffusion = recipe.diffusion
        self.edm = EDM(diffusion.sigma_data, diffusion.P_mean, diffusion.P_std)
        self.model = _build(config, recipe, weights, fresh, world.device)
        parameters = sum(weight.numel() for weight in self.model.parameters())
        self.sharding = sharding_of(recipe.engine, world, parameters)
        self.parameters = parameters
        dtype = compute_dtype(recipe.engine, world.device)
        autocast = dtype if self.sharding != "fsdp" and dtype != torch.float32 else None
        loss = DenoisingLoss(self.model, self.edm, recipe.model.mask_padding, autocast)
        prepare_blocks(self.model, recipe.engine, self.sharding, world)
        empty = not fresh and weights is None
        if empty and self.sharding != "fsdp":
            loss.to_empty(device=world.device)
        self.loss = wrap(loss, recipe.engine, self.sharding, world)
        if empty and self.sharding == "fsdp":  # only now: shards are all that fits
            loss.to_empty(device=world.device)
        self._weights = list(self.model.parameters())
        self.optimizers = Optimizers(self.model, recipe.optimizer)
        self.averages = dict(zip(names_of(recipe.ema), (EMA(self.model, ema) for ema in recipe.ema), strict=True))

    def clip(self, largest_norm: float) -> float:
        """Scale the gradients down to the norm `largest_norm`, if theirs is larger. Returns what it was, over all processes."""
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients, foreach=True))
        torch.nn.utils.clip_grads_with_norm_(self._weights, largest_norm, norm, foreach=True)
        return norm.item()

    def take_step(self, step: int) -> None:
        """Step number `step` (from 0), on gradients that are there."""
        self.optimizers.step()
        for average in self.averages.values():
            average.update(step)

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
        load_into(checkpoint, self.tensors())


def _build(config: ModelConfig, recipe: Recipe, weights: dict[str, Tensor] | None, fresh: bool, device: torch.device) -> MicroDiT:
    """On the device, with weights; or on the meta device, where a checkpoint will be loaded into the shards alone."""
    if weights is None and not fresh:
        with torch.device("meta"):
            return MicroDiT(config).train()
    torch.manual_seed(recipe.seed)  # of the initial weights, the same on all processes; every later draw has its own generator
    if weights is None:
        model = MicroDiT(config)
        model.scale_init(recipe.model.init_scale)
        return model.train().to(device)
    with torch.device("meta"):
        model = MicroDiT(config)
    model.load_state_dict(weights, assign=True)
    return model.train().requires_grad_(True).to(device)
