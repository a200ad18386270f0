"""The optimizers' parameter groups, their state by name, and the learning rate at a step."""

import math

import torch
from torch import Tensor, nn

from microdit.model.microdit import MicroDiT
from microdit.model.moe import ExpertChoice
from microdit.recipe import OptimizerRecipe, PhaseRecipe
from microdit.training.muon import Muon
from microdit.training.shards import Shard, foreach_works, shards_of


class Optimizers:
    """AdamW; with `method` muon, the matrices of the caption embedder and of all blocks learn by Muon instead. Not those of adaLN, which
    are tall, so dear, and learn no better by it, nor the first and the last layer.

    Groups carry `rate`, their share of the phase's learning rate: 1, or the experts' own (2407.15811, appendix).
    Weight decay is on matrices only: norms and biases have none.
    """

    def __init__(self, model: MicroDiT, recipe: OptimizerRecipe):
        """The model's parameters as they will be trained, so after sharding."""
        self.shards = shards_of(model)
        experts = {id(weight) for module in model.modules() if isinstance(module, ExpertChoice) for weight in (module.w_in, module.w_out)}
        muon: set[int] = set()
        if recipe.method == "muon":
            adaln = {id(block.modulation.weight) for block in model.all_blocks}
            inner = [weight for part in (model.caption, *model.all_blocks) for weight in part.parameters() if weight.dim() == 2]
            muon = {id(weight) for weight in inner} - adaln
        rest = [shard for shard in self.shards if id(shard.weight) not in muon]

        def group(shards: list[Shard], rate: float, decay: float) -> dict[str, object]:
            return {"params": [shard.leaf for shard in shards], "rate": rate, "weight_decay": decay}

        groups = [
            group([s for s in rest if s.weight.dim() >= 2 and id(s.weight) not in experts], 1.0, recipe.weight_decay),
            group([s for s in rest if id(s.weight) in experts], recipe.expert_learning_rate, recipe.weight_decay),
            group([s for s in rest if s.weight.dim() < 2], 1.0, 0.0),
        ]
        # The learning rate here is a placeholder: `set_rate` sets the real one before every step.
        self._fused = foreach_works(rest[0].leaf.device)
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=0.0, betas=recipe.betas, eps=recipe.eps, fused=self._fused, foreach=False
        )
        self.muon = Muon([s for s in self.shards if id(s.weight) in muon], recipe.weight_decay) if muon else None

    @property
    def all(self) -> list[torch.optim.Optimizer]:
        return [self.adamw, *([self.muon] if self.muon else [])]

    def set_rate(self, learning_rate: float) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["rate"]

    def take_gradients(self) -> list[nn.Parameter]:
        """This process's part of each weight that has a gradient, with its part of that. Call it once the gradients are there."""
        for shard in self.shards:
            shard.take_gradient()
        return [shard.leaf for shard in self.shards if shard.leaf.grad is not None]

    def step(self, taken: Tensor | None = None) -> None:
        """`taken`: 0.0 leaves everything as it is, without the program having to know; a scalar on the weights' device."""
        if self._fused:  # what PyTorch's loss scaling uses to the same end
            self.adamw.found_inf = None if taken is None else 1 - taken  # type: ignore[attr-defined]
        self.adamw.step()
        if self.muon:
            self.muon.step(taken=taken)

    def zero_grad(self) -> None:
        for shard in self.shards:
            shard.drop_gradient()

    def tensors(self) -> dict[str, Tensor]:
        """The state as {parameter's name}/{key} -> tensor, sharded as the weights, made of zeros where no step was taken yet."""
        if any(not optimizer.state for optimizer in self.all):
            self._make_state()
        of = {id(shard.leaf): shard for shard in self.shards}
        return {
            f"{of[id(leaf)].name}/{key}": of[id(leaf)].sharded(value)
            for optimizer in self.all
            for leaf, state in optimizer.state.items()
            for key, value in state.items()
        }

    def _make_state(self) -> None:
        """Take a step that changes nothing: no gradient, no rate."""
        for shard in self.shards:
            shard.leaf.grad = torch.zeros_like(shard.leaf)
        self.set_rate(0.0)
        self.step()
        self.zero_grad()
        for optimizer in self.all:
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()


def learning_rate(phase: PhaseRecipe, step: int) -> float:
    """At step number `step` (from 0) of the phase: linear warm-up, then a cosine down to `final_learning_rate`."""
    if step < phase.warmup_steps:
        return phase.learning_rate * (step + 1) / phase.warmup_steps
    progress = (step - phase.warmup_steps) / max(1, phase.steps - phase.warmup_steps)
    low = phase.final_learning_rate
    return phase.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)
