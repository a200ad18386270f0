"""A study: arms that differ by a few lines of a recipe, each trained for several seeds on equal budgets.

An arm with one phase and a constant learning rate is read on its way, at every budget. One with several phases (their steps are shares
here), a mask schedule or a falling rate is trained anew for each budget, since only its end counts.
"""

import re
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from microdit.config.load import load_recipe
from microdit.config.recipes import find_recipe
from microdit.config.schema import Every, FilePath, Name, Prompts, Recipe, Seed, Share
from microdit.errors import UserError
from microdit.io.strict_yaml import read_as, read_yaml
from microdit.ranges import Range

# What the study decides itself, so that budgets are equal and results can be compared.
OURS = (
    "seed",
    "name",
    "data",
    "init_from",
    "ema",
    "engine",
    "record",
    "phases.0.steps",
    "phases.0.final_learning_rate",
)
# But the same pictures may be encoded by other encoders (checked when the study is run); the loss on them is then another loss.
FREE = ("data.path", "data.held_out")
HIGHER_IS_BETTER = ("recognised",)

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Budget = Literal["flops", "seconds", "images"]
Measure = Literal["held_out_loss", "frechet_distance", "kid", "recognised"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
BUDGETS: tuple[Budget, ...] = get_args(Budget)
Sentences = Annotated[str, Range(0, 10_000)]
Override = Annotated[str, Range(0, 10_000)]


@dataclass(frozen=True)
class ReferenceArm:
    """Budgets are what this arm takes for so many steps: its FLOPs, its seconds, its images."""

    arm: Name
    steps: Every


@dataclass(frozen=True)
class Claim:
    """What others report: that arm `better` is better than arm `worse` by `measure`, at equal `budget`."""

    says: Sentences
    better: Name
    worse: Name
    measure: Measure = "frechet_distance"
    budget: Budget = "flops"


@dataclass(frozen=True)
class Study:
    """`arms`: overrides of the base recipe by name. `base` lies beside the study's file."""

    name: Name
    question: Sentences
    base: FilePath = "base.yaml"
    reference: ReferenceArm = field(kw_only=True)
    arms: Annotated[dict[str, Annotated[list[Override], Range(0, 1000)]], Range(1, 1000)] = field(kw_only=True)
    seeds: Annotated[list[Seed], Range(1, 1000)] = field(default_factory=lambda: [0, 1, 2])
    budgets: list[Budget] = field(default_factory=lambda: list(BUDGETS))  # a scheduled arm is trained once for each
    claims: Annotated[list[Claim], Range(0, 1000)] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=lambda: list(MEASURES))  # that the report shows
    readings: Annotated[list[Share], Range(1, 1000)] = field(
        default_factory=lambda: [0.25, 0.5, 1.0]
    )  # shares of each budget at which quality is measured
    source: FilePath = "emoji"  # what the data was encoded from: its pictures are what drawn ones are compared with
    pictures: Annotated[int, Range(2, 10**6)] = 256  # that are drawn for each reading
    num_inference_steps: Annotated[int, Range(2, 1000)] = 10
    guidance_scale: Annotated[float, Range(-100, 100)] = 2.0
    prompts: Prompts = field(
        default_factory=lambda: ["red heart", "cat face", "green apple", "pizza", "owl", "fire engine"]
    )  # of the strips
    notes: Sentences = ""  # what a reader should know, in the report


def load_study(path: Path | str) -> tuple[Study, dict[str, Recipe]]:
    """Load a study, from a file or by the name of a bundled one, and the recipe of each arm. Raises UserError naming file, arm and fix."""
    path = find_recipe(path, "lab")
    study = cast(Study, read_as(Study, read_yaml(path), str(path)))
    problems = _problems(study)
    if problems:
        raise UserError(f"{path} asks for what cannot be:\n  - " + "\n  - ".join(problems))
    return study, {arm: _recipe_of(path, study, arm) for arm in study.arms}


def measurement(study: Study) -> dict[str, Any]:
    """How quality is measured: readings compare only where all of it is the same."""
    keys = ("source", "pictures", "num_inference_steps", "guidance_scale", "prompts")
    return {key: getattr(study, key) for key in keys}


def is_scheduled(recipe: Recipe) -> bool:
    """Whether the end is told beforehand: then quality on the way would mislead, and each budget needs a training of its own."""
    first = recipe.phases[0]
    return len(recipe.phases) > 1 or first.mask_schedule is not None or first.final_learning_rate != 1


def stretched(recipe: Recipe, steps: int) -> Recipe:
    """So that all phases together take `steps`, each its share, and at least one; `steps` is at least their number."""
    phases, before, start = [], 0, 0
    for left, phase in zip(range(len(recipe.phases) - 1, -1, -1), recipe.phases, strict=True):
        before += phase.steps
        end = min(max(start + 1, round(before / recipe.total_steps * steps)), steps - left)
        phases.append(replace(phase, steps=end - start))
        start = end
    return replace(recipe, phases=phases)


def _problems(study: Study) -> list[str]:
    problems = _measuring_problems(study)
    odd = [name for name in (study.name, *study.arms) if not FILE_NAME.fullmatch(name)]
    problems += [f"{name!r} names a folder: letters, digits, dots, - and _ alone, a letter or digit first." for name in odd]
    if study.reference.arm not in study.arms:
        problems.append(f"reference.arm {study.reference.arm} is none of the arms: {', '.join(study.arms)}.")
    for claim in study.claims:
        problems += [
            f"the claim '{claim.says}' is about {arm}, which is no arm." for arm in (claim.better, claim.worse) if arm not in study.arms
        ]
        if claim.better == claim.worse:
            problems.append(f"the claim '{claim.says}' compares {claim.better} with itself.")
    if not study.budgets or len(set(study.budgets)) < len(study.budgets):
        problems.append(f"budgets {study.budgets} must be different ones, at least one of {', '.join(BUDGETS)}.")
    problems += [
        f"the claim '{claim.says}' is about equal {claim.budget}, which is none of its budgets: {', '.join(study.budgets)}."
        for claim in study.claims
        if claim.budget not in study.budgets
    ]
    if len(set(study.seeds)) < len(study.seeds):
        problems.append(f"seeds {study.seeds} must be different ones.")
    rising = all(low < high for low, high in pairwise([0.0, *study.readings]))
    if not rising or study.readings[-1] != 1:
        problems.append(f"readings {study.readings} must rise, from above 0 to 1.0, the whole budget.")
    for arm, overrides in study.arms.items():
        for override in overrides:
            key = override.partition("=")[0]
            if key not in FREE and any(key == ours or key.startswith(f"{ours}.") for ours in OURS):
                problems.append(
                    f"the arm {arm} sets {key}: the budgets would not be equal, or the results not comparable. Set it in the base."
                )
    return problems


def _measuring_problems(study: Study) -> list[str]:
    checks = [
        (bool(study.prompts), "prompts is empty: the strips need at least one."),
        (len(set(study.measures)) == len(study.measures) > 0, f"measures must be different ones of {', '.join(MEASURES)}."),
    ]
    return [sentence for fine, sentence in checks if not fine]


def _recipe_of(path: Path, study: Study, arm: str) -> Recipe:
    """For as many steps as the reference arm takes."""
    base = load_recipe(path.parent / study.base)
    try:
        recipe = load_recipe(path.parent / study.base, [*study.arms[arm], f"name={study.name}-{arm}"])
    except UserError as error:
        raise UserError(f"{path}: the arm {arm}: {error}") from error
    if "images" in study.budgets and any(phase.batch_size != base.phases[0].batch_size for phase in recipe.phases):
        raise UserError(
            f"{path}: phases of the arm {arm} have another batch_size than {study.base}: budgets of images would not be equal. Without "
            "them, `budgets: [flops, seconds]`, it may."
        )
    if recipe.data.held_out is None:
        raise UserError(f"{path.parent / study.base} needs data.held_out, an encoded set that is never learnt from.")
    if not recipe.ema:
        raise UserError(f"{path.parent / study.base} needs an ema: without, a constant learning rate leaves noise in the weights.")
    if study.reference.steps < len(recipe.phases):
        raise UserError(f"{path}: reference.steps is {study.reference.steps}, and the arm {arm} has {len(recipe.phases)} phases.")
    return stretched(recipe, study.reference.steps)
