"""A study: arms that differ in a few lines of a recipe, each trained for several seeds on equal budgets.

An arm with one phase and a constant learning rate is measured during a single training at every budget. An arm with several phases (whose
steps are shares of the training here), a mask schedule, a decaying rate or an alignment that ends early is trained separately for each
budget, since only its end counts.
"""

import re
from collections.abc import Collection
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

# Keys that arms may not set, so that budgets stay equal and results comparable.
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
# Exceptions: arms may use other encoders of the same images (checked when the study is run), although losses then do not compare.
FREE = ("data.path", "data.held_out")
HIGHER_IS_BETTER = ("recognised", "recognised_pixels", "recognised_classifier")

ENCODED = "encoded"  # as a source: the rows of the encoded set itself, decoded

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Budget = Literal["flops", "seconds", "images"]
Judge = Literal["pixels", "classifier"]
Measure = Literal[
    "held_out_loss",
    "frechet_distance",
    "kid",
    "recognised",
    "recognised_pixels",
    "frechet_distance_classifier",
    "recognised_classifier",
]
MEASURES: tuple[Measure, ...] = ("held_out_loss", "frechet_distance", "kid", "recognised")  # of every result, by EfficientNet-Lite0
JUDGED: dict[Judge, tuple[Measure, ...]] = {
    "pixels": ("recognised_pixels",),
    "classifier": ("frechet_distance_classifier", "recognised_classifier"),
}
BUDGETS: tuple[Budget, ...] = get_args(Budget)
Sentences = Annotated[str, Range(0, 10_000)]
Figure = Annotated[float, Range(0, 10**6, above=True)]
Override = Annotated[str, Range(0, 10_000)]


@dataclass(frozen=True)
class ReferenceArm:
    """The arm that defines the budgets: the FLOPs, seconds and images that it takes for `steps` steps."""

    arm: Name
    steps: Every


@dataclass(frozen=True)
class Claim:
    """A claim from the literature: arm `better` beats arm `worse` by `measure` at equal `budget`.

    `published` holds the figures of both in the literature, by a measure of theirs: their ratio is the size of the difference to look for.
    """

    says: Sentences
    better: Name
    worse: Name
    measure: Measure = "frechet_distance"
    budget: Budget = "flops"
    published: tuple[Figure, Figure] | None = None


@dataclass(frozen=True)
class ReducedForm:
    """The form of a study for a CPU, where the whole one would take days: fewer steps, seeds and arms, and overrides of the base.

    `arms` maps each arm that is run to overrides after its own. `pictures`, `num_inference_steps`, `readings` and `notes` replace the
    study's.
    """

    steps: Every
    seeds: Annotated[list[Seed], Range(1, 1000)]
    arms: Annotated[dict[str, Annotated[list[Override], Range(0, 1000)]], Range(1, 1000)]
    overrides: Annotated[list[Override], Range(0, 1000)] = field(default_factory=list)
    pictures: Annotated[int, Range(2, 10**6)] | None = None
    num_inference_steps: Annotated[int, Range(2, 1000)] | None = None
    readings: Annotated[list[Share], Range(1, 1000)] | None = None
    notes: Sentences = ""


@dataclass(frozen=True)
class Study:
    """The settings of a study. `arms` holds overrides of the recipe `base`, whose path is relative to the study's file, by name."""

    name: Name
    question: Sentences
    base: FilePath = "base.yaml"
    reference: ReferenceArm = field(kw_only=True)
    arms: Annotated[dict[str, Annotated[list[Override], Range(0, 1000)]], Range(1, 1000)] = field(kw_only=True)
    seeds: Annotated[list[Seed], Range(1, 1000)] = field(default_factory=lambda: [0, 1, 2])
    budgets: list[Budget] = field(default_factory=lambda: list(BUDGETS))  # a scheduled arm is trained once for each
    claims: Annotated[list[Claim], Range(0, 1000)] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=lambda: list(MEASURES))  # shown in the report
    # Judges beside EfficientNet-Lite0, for arms that it teaches: raw pixels, and a classifier trained on the reference set's real images.
    judges: list[Judge] = field(default_factory=list)
    readings: Annotated[list[Share], Range(1, 1000)] = field(
        default_factory=lambda: [0.25, 0.5, 1.0]
    )  # shares of each budget at which quality is measured
    # The reference set: the source of the encoded data, or `encoded` for the encoded data itself (microdit/lab/quality.py).
    source: FilePath = "emoji"
    pictures: Annotated[int, Range(2, 10**6)] = 256  # generated for each measurement
    num_inference_steps: Annotated[int, Range(2, 1000)] = 10
    guidance_scale: Annotated[float, Range(-100, 100)] = 2.0
    prompts: Prompts = field(
        default_factory=lambda: ["red heart", "cat face", "green apple", "pizza", "owl", "fire engine"]
    )  # of the sample strips
    on_cpu: ReducedForm | None = None
    notes: Sentences = ""  # remarks for the report


def load_study(path: Path | str, on_cpu: bool = False) -> tuple[Study, dict[str, Recipe]]:
    """Load a study, from a file or by the name of a bundled one, and the recipe of each arm. Raises UserError naming file, arm and fix.

    `on_cpu` asks for the reduced form, if the study has one.
    """
    path = find_recipe(path, "lab")
    study = cast(Study, read_as(Study, read_yaml(path), str(path)))
    problems = _problems(study) + _reduced_problems(study)
    form, reduced = study.on_cpu, study
    if form and not problems:
        reduced = _reduced(study, form)
        problems = [f"on_cpu: {problem}" for problem in _problems(reduced)]
    if problems:
        raise UserError(f"{path} is not a valid study:\n  - " + "\n  - ".join(problems))
    overrides: list[str] = []
    if form and on_cpu:
        study, overrides = reduced, form.overrides
    recipes = {arm: _recipe_of(path, study, arm, overrides) for arm in study.arms}
    sets = {arm: recipe.data.path for arm, recipe in recipes.items()}
    if study.source == ENCODED and (None in sets.values() or len(set(sets.values())) > 1):
        raise UserError(f"{path}: source: {ENCODED} needs one data.path for all arms, and these have {sets}.")
    return study, recipes


def default_folder(study: Study, on_cpu: bool) -> Path:
    """Return where results go by default: lab/NAME, and lab/NAME-cpu for a reduced form."""
    return Path("lab") / (f"{study.name}-cpu" if on_cpu and study.on_cpu else study.name)


def only_arms(study: Study, arms: Collection[str]) -> Study:
    """Restrict a study to some of its arms, and to the claims about them. Raises UserError for an unknown arm, or without the reference."""
    unknown = [arm for arm in arms if arm not in study.arms]
    if unknown:
        raise UserError(f"The study {study.name} has no arm {', '.join(unknown)}. Its arms: {', '.join(study.arms)}.")
    if study.reference.arm not in arms:
        raise UserError(f"The arm {study.reference.arm} defines the budgets of the study {study.name}, and must be among those run.")
    claims = [claim for claim in study.claims if claim.better in arms and claim.worse in arms]
    return replace(study, arms={arm: overrides for arm, overrides in study.arms.items() if arm in arms}, claims=claims)


def measurement(study: Study) -> dict[str, Any]:
    """Return the settings of quality measurement. Results are comparable only if all of them agree."""
    keys = ("source", "pictures", "num_inference_steps", "guidance_scale", "prompts")
    return {key: getattr(study, key) for key in keys} | ({"judges": study.judges} if study.judges else {})


def is_scheduled(recipe: Recipe) -> bool:
    """Return whether training depends on its length: then intermediate quality misleads, and each budget needs its own training."""
    first, ends_early = recipe.phases[0], 0 < recipe.aligned_steps < recipe.total_steps
    return len(recipe.phases) > 1 or first.mask_schedule is not None or first.final_learning_rate != 1 or ends_early


def stretched(recipe: Recipe, steps: int) -> Recipe:
    """Scale the phases to `steps` in total. Each keeps its share and at least one step; `steps` is at least the number of phases."""
    phases, before, start = [], 0, 0
    for left, phase in zip(range(len(recipe.phases) - 1, -1, -1), recipe.phases, strict=True):
        before += phase.steps
        end = min(max(start + 1, round(before / recipe.total_steps * steps)), steps - left)
        phases.append(replace(phase, steps=end - start))
        start = end
    return replace(recipe, phases=phases)


def _reduced(study: Study, form: ReducedForm) -> Study:
    """Return the study in its form for a CPU. The form has no problems."""
    few = only_arms(study, form.arms)
    given = {key: getattr(form, key) for key in ("pictures", "num_inference_steps", "readings") if getattr(form, key) is not None}
    return replace(
        few,
        arms={arm: [*overrides, *form.arms[arm]] for arm, overrides in few.arms.items()},
        seeds=form.seeds,
        reference=replace(study.reference, steps=form.steps),
        notes=form.notes,
        **given,
    )


def _problems(study: Study) -> list[str]:
    problems = _measuring_problems(study)
    odd = [name for name in (study.name, *study.arms) if not FILE_NAME.fullmatch(name)]
    problems += [f"{name!r} names a folder: use letters, digits, dots, - and _, beginning with a letter or digit." for name in odd]
    if study.reference.arm not in study.arms:
        problems.append(f"reference.arm {study.reference.arm} is not one of the arms: {', '.join(study.arms)}.")
    for claim in study.claims:
        problems += [
            f"the claim '{claim.says}' names {arm}, which is not an arm." for arm in (claim.better, claim.worse) if arm not in study.arms
        ]
        if claim.better == claim.worse:
            problems.append(f"the claim '{claim.says}' compares {claim.better} with itself.")
    if not study.budgets or len(set(study.budgets)) < len(study.budgets):
        problems.append(f"budgets {study.budgets} must be distinct, and at least one of {', '.join(BUDGETS)}.")
    problems += [
        f"the claim '{claim.says}' is about equal {claim.budget}, which is not one of the study's budgets: {', '.join(study.budgets)}."
        for claim in study.claims
        if claim.budget not in study.budgets
    ]
    if len(set(study.seeds)) < len(study.seeds):
        problems.append(f"seeds {study.seeds} must be distinct.")
    rising = all(low < high for low, high in pairwise([0.0, *study.readings]))
    if not rising or study.readings[-1] != 1:
        problems.append(f"readings {study.readings} must increase from above 0 to 1.0, the whole budget.")
    for arm, overrides in study.arms.items():
        for override in overrides:
            key = override.partition("=")[0]
            if key not in FREE and any(key == ours or key.startswith(f"{ours}.") for ours in OURS):
                problems.append(
                    f"the arm {arm} sets {key}, which would make budgets unequal or results incomparable: set it in the base recipe."
                )
    return problems


def _measuring_problems(study: Study) -> list[str]:
    checks = [
        (bool(study.prompts), "prompts is empty: the sample strips need at least one."),
        (
            len(set(study.measures)) == len(study.measures) > 0,
            f"measures must be distinct, and at least one of {', '.join(get_args(Measure))}.",
        ),
        (len(set(study.judges)) == len(study.judges), f"judges {study.judges} must be distinct."),
    ]
    named = dict.fromkeys([*study.measures, *(claim.measure for claim in study.claims)])
    for judge, measures in JUDGED.items():
        missing = [measure for measure in named if measure in measures and judge not in study.judges]
        checks.append((not missing, f"{', '.join(missing)} of measures or claims is given by the judge {judge}: add it to judges."))
    return [sentence for fine, sentence in checks if not fine]


def _reduced_problems(study: Study) -> list[str]:
    if study.on_cpu is None:
        return []
    form, problems = study.on_cpu, []
    unknown = [arm for arm in form.arms if arm not in study.arms]
    if unknown:
        problems.append(f"on_cpu.arms names {', '.join(unknown)}, which is not an arm.")
    if study.reference.arm not in form.arms:
        problems.append(f"on_cpu.arms must name the reference arm, {study.reference.arm}.")
    if len(set(form.seeds)) < len(form.seeds):
        problems.append(f"on_cpu.seeds {form.seeds} must be distinct.")
    return problems


def _recipe_of(path: Path, study: Study, arm: str, overrides: list[str]) -> Recipe:
    """Load an arm's recipe, with as many steps as the reference arm takes. `overrides` of the base come before the arm's own."""
    base = load_recipe(path.parent / study.base, overrides)
    try:
        recipe = load_recipe(path.parent / study.base, [*overrides, *study.arms[arm], f"name={study.name}-{arm}"])
    except UserError as error:
        raise UserError(f"{path}: the arm {arm}: {error}") from error
    if "images" in study.budgets and any(phase.batch_size != base.phases[0].batch_size for phase in recipe.phases):
        raise UserError(
            f"{path}: phases of the arm {arm} have another batch_size than {study.base}, so image budgets would not be equal: use "
            "`budgets: [flops, seconds]`."
        )
    if recipe.data.held_out is None:
        raise UserError(f"{path.parent / study.base} needs data.held_out, an encoded set that is not trained on.")
    if not recipe.ema:
        raise UserError(f"{path.parent / study.base} needs an ema: without one, a constant learning rate leaves noise in the weights.")
    if study.reference.steps < len(recipe.phases):
        raise UserError(f"{path}: reference.steps is {study.reference.steps}, and the arm {arm} has {len(recipe.phases)} phases.")
    return stretched(recipe, study.reference.steps)
