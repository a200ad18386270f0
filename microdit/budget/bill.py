"""What the phases of a recipe cost: FLOPs by the project's own formula, then hours and dollars on a machine."""

from dataclasses import dataclass, replace

from microdit.budget.machine import Machine
from microdit.budget.shapes import Shapes
from microdit.model.flops import recomputed_flops, training_flops
from microdit.model.microdit import ModelConfig
from microdit.model.routing import kept_tokens
from microdit.recipe import PhaseRecipe, Recipe
from microdit.training.start import architecture
from microdit.training.work import Work


@dataclass(frozen=True)
class PhaseBill:
    """`flops_per_sample`: forward and backward, the mean over the phase. Of them come `flops`; recomputed blocks only take time."""

    name: str
    resolution: int
    mask_ratios: tuple[float, float]  # first and last step's
    steps: int
    batch_size: int
    images: int
    flops_per_sample: float
    flops: float
    hours: float
    dollars: float


def bill(recipe: Recipe, shapes: Shapes, machine: Machine) -> list[PhaseBill]:
    """One for each phase of the recipe."""
    return [_phase_bill(recipe, phase, shapes, machine) for phase in recipe.phases]


def phase_flops(recipe: Recipe, phase: PhaseRecipe, shapes: Shapes) -> float:
    """Of all steps of the phase."""
    work = Work(replace(recipe, phases=[phase]), config_of(recipe, shapes))
    p = recipe.model.patch_size
    return sum(share * work.after(0, (height // p) * (width // p), shapes.caption_tokens) for share, height, width in shapes.sides)


def config_of(recipe: Recipe, shapes: Shapes) -> ModelConfig:
    return architecture(recipe.model, shapes.latent_channels, shapes.caption_channels)


def time_factor(recipe: Recipe, phase: PhaseRecipe, shapes: Shapes) -> float:
    """How much longer a step takes than its FLOPs say: blocks that are recomputed compute forward twice."""
    config, p, kinds = config_of(recipe, shapes), recipe.model.patch_size, []
    for share, height, width in shapes.sides:
        tokens = (height // p) * (width // p)
        kinds.append((share, (config, tokens, kept_tokens(tokens, phase.mask_ratio_at(0)), shapes.caption_tokens)))
    again = sum(share * recomputed_flops(*kind, float(recipe.engine.activation_checkpointing)) for share, kind in kinds)
    return 1 + again / sum(share * training_flops(*kind) for share, kind in kinds)


def _phase_bill(recipe: Recipe, phase: PhaseRecipe, shapes: Shapes, machine: Machine) -> PhaseBill:
    flops = phase_flops(recipe, phase, shapes)
    images = phase.steps * phase.batch_size
    hours = machine.hours(flops * time_factor(recipe, phase, shapes))
    ratios = phase.mask_ratio_at(0), phase.mask_ratio_at(phase.steps - 1)
    return PhaseBill(
        phase.name,
        shapes.resolution,
        ratios,
        phase.steps,
        phase.batch_size,
        images,
        flops / images,
        flops,
        hours,
        machine.dollars(hours),
    )
