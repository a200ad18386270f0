"""The optimizers' parameter groups, their state by name, and the learning rate at a step."""

import math

import torch
from torch import Tensor, nn

from microdit.model.microdit import MicroDiT
from microdit.model.moe import ExpertChoice
from microdit.recipe import OptimizerRecipe, PhaseRecipe
from microdit.training.muon import CPUMuon


class Optimizers:
    """AdamW; with `method` muon, the matrices of the caption embedder and of all blocks learn by Muon instead (torch.optim.Muon; on a CPU
    `muon.py`). Not those of adaLN, which are tall, so dear, and learn no better by it, nor the first and the last layer.

    Groups carry `rate`, their share of the phase's learning rate: 1, or the experts' own (2407.15811, appendix).
    Weight decay is on matrices only: norms and biases have none.
    """

    def __init__(self, model: MicroDiT, recipe: OptimizerRecipe):
        """The model's parameters as they will be trained, so after sharding."""
        self._names = {id(weight): name for name, weight in model.named_parameters()}
        experts = {id(weight) for module in model.modules() if isinstance(module, ExpertChoice) for weight in (module.w_in, module.w_out)}
        muon: set[int] = set()
        if recipe.method == "muon":
            adaln = {id(block.modulation.weight) for block in model.all_blocks}
            inner = [weight for part in (model.caption, *model.all_blocks) for weight in part.parameters() if weight.dim() == 2]
            muon = {id(weight) for weight in inner} - adaln
        rest = [weight for weight in model.parameters() if id(weight) not in muon]

        def group(weights: list[nn.Parameter], rate: float, decay: float) -> dict[str, object]:
            return {"params": weights, "rate": rate, "weight_decay": decay}

        groups = [
            group([w for w in rest if w.dim() >= 2 and id(w) not in experts], 1.0, recipe.weight_decay),
            group([w for w in rest if id(w) in experts], recipe.expert_learning_rate, recipe.weight_decay),
            group([w for w in rest if w.dim() < 2], 1.0, 0.0),
        ]
        # The learning rate here is a placeholder: `set_rate` sets the real one before every step.
        adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=recipe.betas, eps=recipe.eps, fused=True)
        self.all: list[torch.optim.Optimizer] = [adamw]
        if muon:
            matrices = group([w for w in model.parameters() if id(w) in muon], 1.0, recipe.weight_decay)
            # Updates as large as AdamW's (2502.16982), so that one learning rate serves both.
            on_cpu = all(weight.device.type == "cpu" for weight in rest)
            from microdit.training import muon as muon_module

            muon_module.SPLIT.clear()
            if recipe.split:
                muon_module.SPLIT.update({id(w): 3 if ".qkv." in n else 2 for n, w in model.named_parameters() if ".qkv." in n or ".kv." in n})
            self.all.append((CPUMuon if on_cpu else torch.optim.Muon)([matrices], lr=0.0, adjust_lr_fn="match_rms_adamw"))

    def set_rate(self, learning_rate: float) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["rate"]

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """The state as {parameter's name}/{key} -> tensor, made of zeros where no step was taken yet."""
        if any(not optimizer.state for optimizer in self.all):
            self._make_state()
        return {
            f"{self._names[id(weight)]}/{key}": value
            for optimizer in self.all
            for weight, state in optimizer.state.items()
            for key, value in state.items()
        }

    def _make_state(self) -> None:
        """Take a step that changes nothing: no gradient, no rate."""
        weights = [weight for optimizer in self.all for group in optimizer.param_groups for weight in group["params"]]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
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
