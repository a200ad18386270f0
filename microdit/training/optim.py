"""AdamW's parameter groups and the learning rate at a step."""

import math

import torch
from torch import nn

from microdit.model.microdit import MicroDiT
from microdit.model.moe import ExpertChoice
from microdit.recipe import OptimizerRecipe, PhaseRecipe


def make_adamw(model: MicroDiT, recipe: OptimizerRecipe) -> torch.optim.AdamW:
    """Groups carry `rate`, their share of the phase's learning rate: 1, or the experts' own (2407.15811, appendix).

    Weight decay is on matrices only: norms and biases have none.
    """
    expert_weights = {
        id(weight) for module in model.modules() if isinstance(module, ExpertChoice) for weight in (module.w_in, module.w_out)
    }

    def group(weights: list[nn.Parameter], rate: float, decay: float) -> dict[str, object]:
        return {"params": weights, "rate": rate, "weight_decay": decay}

    matrices = [w for w in model.parameters() if w.dim() >= 2 and id(w) not in expert_weights]
    experts = [w for w in model.parameters() if id(w) in expert_weights]
    vectors = [w for w in model.parameters() if w.dim() < 2]
    groups = [
        group(matrices, 1.0, recipe.weight_decay),
        group(experts, recipe.expert_learning_rate, recipe.weight_decay),
        group(vectors, 1.0, 0.0),
    ]
    # The learning rate here is a placeholder: `set_learning_rate` sets the real one before every step.
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=recipe.betas, eps=recipe.eps, fused=True)


def learning_rate(phase: PhaseRecipe, step: int) -> float:
    """At step number `step` (from 0) of the phase: linear warm-up, then a cosine down to `final_learning_rate`."""
    if step < phase.warmup_steps:
        return phase.learning_rate * (step + 1) / phase.warmup_steps
    progress = (step - phase.warmup_steps) / max(1, phase.steps - phase.warmup_steps)
    low = phase.final_learning_rate
    return phase.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]
