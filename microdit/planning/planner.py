"""Plan what a sum of money buys: encoded images, a model size that suits the compute and fits in memory, and a family's phases as recipes.

The recipes are written as YAML files for people to read and edit, so they contain only values that differ from the defaults.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from microdit.config.schema import EngineRecipe, Recipe, short_yaml
from microdit.errors import UserError
from microdit.io.files import write_aside
from microdit.models.config import Size
from microdit.planning.estimate import EncodingCost, encoding_cost
from microdit.planning.hardware import Machine
from microdit.planning.memory import MemoryPlan, PhaseMemory
from microdit.planning.phases import (
    FITTED,
    LAB,
    LARGE,
    WIDTHS,
    Family,
    SizeTarget,
    Stage,
    equivalent_size,
    file_stem,
    paper_flops,
    stage_flops,
    stage_recipe,
    target_size,
)
from microdit.planning.workload import KnownShapes, Shapes, shapes_of
from microdit.reports.formats import money

UNCERTAINTY = 2  # a factor on the size: our judgement, because the rules were fitted to other models
LEAST_IMAGES = 5_000_000  # images seen in total, below which we promise no model at 256 px
MOST_FLOPS = 1e24  # of training; hundreds of times the largest run that the rules were tested on (docs/budget.md)
LEAST_AT_512 = 10_000_000  # masked images seen at 512 px, a tenth of the paper's: with fewer, all training is at 256 px
STEPS_WANTED = 100_000  # in total; the batch is the largest power of two, up to the paper's, that leaves this many steps
BATCHES = (2048, 1024, 512, 256, 128, 64)


@dataclass(frozen=True)
class Plan:
    """A plan for `dollars`: `encoding` is paid first, and the rest buys `gpu_hours` and `flops` of training.

    `width` is the size nearest to the middle of the two recommendations in `wanted`; `widths` are those nearest to half and to twice that.
    `equivalent` is its equivalent size (see phases.py). `smaller_for_memory` is true if a wider model was recommended but does not fit.
    """

    dollars: float
    encoding: EncodingCost
    flops: float
    gpu_hours: float
    wanted: SizeTarget
    width: int
    widths: tuple[int, int]
    equivalent: float
    smaller_for_memory: bool
    machine: Machine
    family: Family
    recipes: dict[str, Recipe]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "machine": self.machine.chip.name, "family": self.family.name}

    def describe(self) -> list[str]:
        """Return the plan and its reasons as sentences."""
        size = self.family.size_of_width(self.width)
        low, high = self.widths
        paid = self.encoding.dollars or 0.0
        pictures = f"{self.encoding.images:,} images ({'assumed; ' if self.encoding.assumed else ''}--images says how many)"
        lines = [
            f"{money(self.dollars)}: "
            + (f"{money(paid)} encode {pictures}, " if paid else "the images are encoded already, ")
            + f"{money(self.dollars - paid)} buy {self.gpu_hours:,.4g} GPU-hours of {self.machine.chip.name} to train, "
            f"{self.flops:.3g} FLOPs at {self.machine.utilisation:.0%} of its peak.",
            f"Two rules say how large a model they suit, in parameters of a dense one of the same cost: {self.wanted.by_fit / 1e6:,.0f} M "
            f"(fit of 2410.08184) and {self.wanted.by_paper / 1e6:,.0f} M (the run of 2407.15811, sizes growing as the root of compute).",
            f"Neither was fitted to masked training or to experts: half to twice that may do: width {low} to {high} of our sizes.",
            f"Chosen: width {self.width}, depth {size.depth}, as costly as {self.equivalent / 1e6:,.0f} M.",
        ]
        if not FITTED[0] <= self.flops <= FITTED[1]:
            lines.append(f"The fit is of runs from {FITTED[0]:.0e} to {FITTED[1]:.0e} FLOPs, so here it is extrapolated.")
        if self.smaller_for_memory:
            lines.append(f"A wider one was wanted, and does not fit {self.machine.count} x {self.machine.chip.memory_gb:g} GB.")
        if self.width == max(WIDTHS):
            lines.append("It is the largest size that we plan with.")
        if len(self.recipes) == self.family.at_256:
            lines.append(
                f"All is spent at 256 px: fewer than {LEAST_AT_512 / 1e6:.0f} M images would be left for masked training at 512 px."
            )
        return [*lines, f"Family '{self.family.name}':", *(f"- {reason}" for reason in self.family.reasons)]


@dataclass(frozen=True)
class _Funds:
    """The compute left for training in `stages` of `family` after encoding; negative if the sum does not even pay for encoding."""

    family: Family
    stages: Sequence[Stage]
    encoding: EncodingCost
    flops: float


def plan_for_dollars(
    dollars: float,
    machine: Machine,
    given: KnownShapes,
    data: str,
    images: int | None = None,
    check: Callable[[], None] = lambda: None,
    family: Family = LAB,
) -> Plan:
    """Return the plan for a sum. `images` is how many to encode, by default a million, or none if the set `data` is encoded already.

    `check` is called before each slow computation and may raise to cancel it.
    Raises UserError if the sum is too small for any model or beyond what is planned for, or if no model fits the machine.
    """
    if not dollars > 0 or dollars == float("inf"):
        raise UserError(f"--dollars is {dollars}, and must be a sum above 0.")
    if machine.price.dollars == 0:
        raise UserError("--dollars needs a --price above 0: for nothing, any number of GPU-hours can be had.")
    shapes = _shapes(given, data, family)
    full, low = (_funds(dollars, family, count, shapes, machine, images) for count in (len(family.stages), family.at_256))
    _check_enough(dollars, low, shapes, machine)
    _check_not_too_much(dollars, full, machine)
    funds = full if _reaches_512(full, shapes) else low
    wanted = _wanted(funds.flops)
    best = _nearest(family, wanted.middle)
    for width in reversed(WIDTHS[: WIDTHS.index(best) + 1]):
        recipes = _recipes(family.size_of_width(width), funds, shapes, machine, data, check)
        if recipes is not None:
            widths = _nearest(family, wanted.middle / UNCERTAINTY), _nearest(family, wanted.middle * UNCERTAINTY)
            return Plan(
                dollars=dollars,
                encoding=funds.encoding,
                flops=funds.flops,
                gpu_hours=funds.flops / _flops_per_dollar(machine) / machine.price.dollars,
                wanted=wanted,
                width=width,
                widths=widths,
                equivalent=equivalent_size(family.size_of_width(width)),
                smaller_for_memory=width < best,
                machine=machine,
                family=family,
                recipes=recipes,
            )
    raise UserError(f"Not even the smallest of our sizes fits {machine.count} x {machine.chip.name} of {machine.chip.memory_gb:g} GB.")


def _shapes(given: KnownShapes, data: str, family: Family) -> dict[str, Shapes]:
    """Return the shapes by the stage's name, read from the set `data` if it exists."""
    try:
        return {stage.name: shapes_of(stage_recipe(stage, family.size_of_width(WIDTHS[0]), 1, 1, data), given) for stage in family.stages}
    except UserError as error:
        raise UserError(f"{error} The plan's phases need 256 and 512 px: encode {data} at both, or name another --data.") from error


def _funds(dollars: float, family: Family, count: int, shapes: dict[str, Shapes], machine: Machine, images: int | None) -> _Funds:
    """Return what is left for the first `count` phases."""
    stages = family.stages[:count]
    paid = encoding_cost([shapes[stage.name] for stage in stages], machine, images)
    return _Funds(family, stages, paid, (dollars - (paid.dollars or 0.0)) * _flops_per_dollar(machine))


def _flops_per_dollar(machine: Machine) -> float:
    return 3600 * machine.flops_per_second / machine.count / machine.price.dollars


def _check_enough(dollars: float, funds: _Funds, shapes: dict[str, Shapes], machine: Machine) -> None:
    """Raise UserError if the funds for 256 px do not pay for any model."""
    of_an_image = _mean_flops(funds.stages, funds.family.size_of_width(WIDTHS[0]), shapes)
    images = funds.flops / of_an_image
    if images >= LEAST_IMAGES:
        return
    paid = funds.encoding.dollars or 0.0
    enough = money(paid + LEAST_IMAGES * of_an_image / _flops_per_dollar(machine) + 0.005)  # to the next cent
    too_little = f"{money(dollars)} are too little: on {machine.chip.name}"
    encoded = f"encoding {funds.encoding.images:,} images"
    if images <= 0:
        raise UserError(
            f"{too_little}, {encoded} alone takes {money(paid)}: say how many there are with --images. "
            f"With so many, the least that buys a model is {enough}."
        )
    after = f"after {money(paid)} for {encoded} (--images) " if paid else ""
    raise UserError(
        f"{too_little}, {after}they pay for {images / 1e6:.2g} M images seen by our smallest size, "
        f"and with fewer than {LEAST_IMAGES / 1e6:.0f} M we promise no model at 256 px; the least that buys one is {enough}."
    )


def _check_not_too_much(dollars: float, funds: _Funds, machine: Machine) -> None:
    if funds.flops > MOST_FLOPS:
        most = (funds.encoding.dollars or 0.0) + MOST_FLOPS / _flops_per_dollar(machine)
        raise UserError(
            f"--dollars is {dollars:g}, and more than we plan with: on {machine.chip.name} that ends at {money(most)}, "
            f"{MOST_FLOPS:.0e} FLOPs of training."
        )


def _reaches_512(funds: _Funds, shapes: dict[str, Shapes]) -> bool:
    """Return whether the recommended size can see enough masked images at 512 px."""
    if funds.flops <= 0:
        return False
    family = funds.family
    size = family.size_of_width(_nearest(family, _wanted(funds.flops).middle))
    return funds.flops / _mean_flops(funds.stages, size, shapes) * _shares(funds.stages)[family.at_256] >= LEAST_AT_512


def _recipes(
    size: Size, funds: _Funds, shapes: dict[str, Shapes], machine: Machine, data: str, check: Callable[[], None]
) -> dict[str, Recipe] | None:
    """Return the phases that spend the funds, with engine settings that fit; None if there are none."""
    stages = funds.stages
    batch = _batch(funds.flops / _mean_flops(stages, size, shapes), machine.count)
    found = [_memory_plan(funds, stage, size, batch, shapes[stage.name], machine, check) for stage in stages]
    ways = [way for way in found if way is not None]
    if len(ways) < len(found):
        return None
    images = funds.flops / _mean_flops(stages, size, shapes, [way.time for way in ways])
    recipes = {}
    for stage, share, way in zip(stages, _shares(stages), ways, strict=True):
        engine, optimizer = way.engine(EngineRecipe(compile=True)), way.optimizer(funds.family.optimizer)
        steps = max(1, int(images * share / batch))
        recipes[file_stem(stage)] = stage_recipe(stage, size, steps, batch, data, engine, stage is stages[-1], optimizer)
    return recipes


def _batch(images: float, gpus: int) -> int:
    batch = next((size for size in BATCHES if images / size >= STEPS_WANTED), BATCHES[-1])
    return -(-batch // gpus) * gpus


def _memory_plan(
    funds: _Funds, stage: Stage, size: Size, batch: int, shapes: Shapes, machine: Machine, check: Callable[[], None]
) -> MemoryPlan | None:
    recipe = stage_recipe(stage, size, 1, batch, last=stage is funds.stages[-1], optimizer=funds.family.optimizer)
    return PhaseMemory(recipe, recipe.phases[0], shapes, machine.count, check).best_plan(machine.chip.memory_gb)


def _mean_flops(stages: Sequence[Stage], size: Size, shapes: dict[str, Shapes], factors: Sequence[float] | None = None) -> float:
    """Return the mean FLOPs of an image over all phases, each phase's weighted by `factors`."""
    return sum(
        share * factor * stage_flops(stage, size, shapes[stage.name])
        for share, factor, stage in zip(_shares(stages), factors or [1.0] * len(stages), stages, strict=True)
    )


def _shares(stages: Sequence[Stage]) -> list[float]:
    """Return each phase's share of the images, as in the paper."""
    total = sum(stage.steps for stage in stages)
    return [stage.steps / total for stage in stages]


def _wanted(flops: float) -> SizeTarget:
    return target_size(flops, paper_flops(LARGE), equivalent_size(LARGE))


def _nearest(family: Family, equivalent: float) -> int:
    """Return the width of the size whose equivalent size is nearest."""
    return min(WIDTHS, key=lambda width: abs(math.log(equivalent_size(family.size_of_width(width)) / equivalent)))


def write_recipes(plan: Plan, folder: Path) -> None:
    """Write one file per phase, for `microdit train FOLDER`. Raises UserError if the folder is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already: choose another --out.")
    for name, text in recipe_files(plan).items():
        write_aside(folder / name, text.encode())


def recipe_files(plan: Plan) -> dict[str, str]:
    """Return the text of each recipe by its file name."""
    machine = f"{plan.machine.count} x {plan.machine.chip.name}"
    bought = f"what {money(plan.dollars)} buy on {machine} (microdit budget --dollars, family {plan.family.name})"
    return {
        f"{stem}.yaml": f"# Phase {number} of {len(plan.recipes)} of {bought}.\n{short_yaml(recipe)}"
        for number, (stem, recipe) in enumerate(plan.recipes.items(), start=1)
    }
