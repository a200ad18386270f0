"""What a sum buys: a model by the rules of scaling.py that fits the card, and the paper's phases as far as the money goes."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from microdit.budget.bill import time_factor
from microdit.budget.fit import Load, Way
from microdit.budget.machine import Machine
from microdit.budget.scaling import FITTED, LARGE, WIDTHS, Wanted, size_of_width, wanted_size
from microdit.budget.shapes import Given, shapes_of
from microdit.budget.stages import AT_256, STAGES, Stage, equivalent_size, file_stem, paper_flops, stage_flops, stage_recipe
from microdit.errors import UserError
from microdit.formats import money
from microdit.model.sizes import Size
from microdit.recipe import EngineRecipe, Recipe

UNCERTAINTY = 2  # a factor, on the size: our judgement of rules that were found on other models
LEAST_IMAGES = 5_000_000  # seen in all, below which we promise no model at 256 px
LEAST_AT_512 = 10_000_000  # seen masked at 512 px, a tenth of the paper's: with fewer, all is spent at 256 px
STEPS_WANTED = 100_000  # in all; the batch is the largest power of two up to the paper's that leaves as many
BATCHES = (2048, 1024, 512, 256, 128, 64)


@dataclass(frozen=True)
class Plan:
    """`width` is nearest to what the two rules want, in the middle, and `widths` to half and to twice that.

    `equivalent`: its equivalent size (scaling.py). `smaller_for_memory`: a wider one was wanted, and does not fit.
    """

    dollars: float
    flops: float
    gpu_hours: float
    wanted: Wanted
    width: int
    widths: tuple[int, int]
    equivalent: float
    smaller_for_memory: bool
    machine: Machine
    recipes: dict[str, Recipe]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "machine": self.machine.chip.name}

    def in_words(self) -> list[str]:
        size = size_of_width(self.width)
        low, high = self.widths
        lines = [
            f"[bold]{money(self.dollars)}[/] buy {self.gpu_hours:,.4g} GPU-hours of {self.machine.chip.name}, "
            f"{self.flops:.3g} FLOPs at {self.machine.utilisation:.0%} of its peak.",
            f"Two rules say how large a model they suit, in parameters of a dense one of the same cost: {self.wanted.by_fit / 1e6:,.0f} M "
            f"(fit of 2410.08184) and {self.wanted.by_paper / 1e6:,.0f} M (the run of 2407.15811, sizes growing as the root of compute).",
            f"Neither was fitted to masked training or to experts: half to twice that may do: [bold]width {low} to {high}[/] of our sizes.",
            f"Chosen: [bold]width {self.width}, depth {size.depth}[/], as costly as {self.equivalent / 1e6:,.0f} M.",
        ]
        if not FITTED[0] <= self.flops <= FITTED[1]:
            lines.append(f"The fit is of runs from {FITTED[0]:.0e} to {FITTED[1]:.0e} FLOPs, so here it is extrapolated.")
        if self.smaller_for_memory:
            lines.append(f"A wider one was wanted, and does not fit {self.machine.count} x {self.machine.chip.memory_gb:g} GB.")
        if self.width == max(WIDTHS):
            lines.append("It is the largest size that we plan with.")
        if len(self.recipes) == len(AT_256):
            lines.append(
                f"All is spent at 256 px: fewer than {LEAST_AT_512 / 1e6:.0f} M images would be left for masked training at 512 px."
            )
        return lines


def buy(dollars: float, machine: Machine, given: Given, data: str) -> Plan:
    """Raises UserError if that is too little for any model, or if none fits the machine."""
    if not dollars > 0 or dollars == float("inf"):
        raise UserError(f"--dollars is {dollars}, and must be a sum above 0.")
    if machine.price.dollars == 0:
        raise UserError("--dollars needs a --price above 0: for nothing, any number of GPU-hours can be had.")
    gpu_hours = dollars / machine.price.dollars
    flops = gpu_hours / machine.count * 3600 * machine.flops_per_second
    _refuse_too_little(dollars, flops, machine, given)
    wanted = wanted_size(flops, paper_flops(LARGE), equivalent_size(LARGE))
    best = _nearest(wanted.middle)
    for width in reversed(WIDTHS[: WIDTHS.index(best) + 1]):
        recipes = _recipes(size_of_width(width), flops, machine, given, data)
        if recipes is not None:
            widths = _nearest(wanted.middle / UNCERTAINTY), _nearest(wanted.middle * UNCERTAINTY)
            equivalent = equivalent_size(size_of_width(width))
            return Plan(dollars, flops, gpu_hours, wanted, width, widths, equivalent, width < best, machine, recipes)
    raise UserError(f"Not even the smallest of our sizes fits {machine.count} x {machine.chip.name} of {machine.chip.memory_gb:g} GB.")


def _refuse_too_little(dollars: float, flops: float, machine: Machine, given: Given) -> None:
    smallest = size_of_width(WIDTHS[0])
    images = flops / _mean_flops(AT_256, smallest, given)
    if images < LEAST_IMAGES:
        raise UserError(
            f"{money(dollars)} are too little: on {machine.chip.name} they pay for {images / 1e6:.2g} M images on our smallest size, "
            f"and with fewer than {LEAST_IMAGES / 1e6:.0f} M we promise no model at 256 px; "
            f"these take {money(math.ceil(100 * dollars * LEAST_IMAGES / images) / 100)}."
        )


def _recipes(size: Size, flops: float, machine: Machine, given: Given, data: str) -> dict[str, Recipe] | None:
    """The phases that use up `flops`, with engine settings that fit. None if there are none."""
    stages = STAGES if flops / _mean_flops(STAGES, size, given) * _shares(STAGES)[2] >= LEAST_AT_512 else AT_256
    batch = _batch(flops / _mean_flops(stages, size, given), machine.count)
    ways = [_way(stage, size, batch, machine, given, stage is stages[-1]) for stage in stages]
    engines = [_engine(way) for way in ways if way is not None]
    if len(engines) < len(ways):
        return None
    images = flops / _mean_flops(stages, size, given, tuple(time_factor(engine) for engine in engines))
    return {
        file_stem(stage): stage_recipe(stage, size, max(1, int(images * share / batch)), batch, data, engine, stage is stages[-1])
        for stage, share, engine in zip(stages, _shares(stages), engines, strict=True)
    }


def _batch(images: float, gpus: int) -> int:
    batch = next((size for size in BATCHES if images / size >= STEPS_WANTED), BATCHES[-1])
    return -(-batch // gpus) * gpus


def _way(stage: Stage, size: Size, batch: int, machine: Machine, given: Given, last: bool) -> Way | None:
    recipe = stage_recipe(stage, size, steps=1, batch_size=batch, last=last)
    return Load(recipe, recipe.phases[0], shapes_of(recipe, given), machine.count).best_way(machine.chip.memory_gb)


def _engine(way: Way) -> EngineRecipe:
    sharding = "fsdp" if way.sharding == "fsdp" else "ddp"
    return EngineRecipe(sharding=sharding, micro_batch=way.micro_batch, compile=True, activation_checkpointing=way.checkpointing)  # type: ignore[arg-type]


def _mean_flops(stages: Sequence[Stage], size: Size, given: Given, factors: Sequence[float] = (1.0,) * len(STAGES)) -> float:
    """Of an image, over all phases; each phase's counted `factors` times."""
    return sum(
        share * factor * stage_flops(stage, size, given) for share, factor, stage in zip(_shares(stages), factors, stages, strict=False)
    )


def _shares(stages: Sequence[Stage]) -> list[float]:
    """Each phase's part of the images: the paper's."""
    total = sum(stage.steps for stage in stages)
    return [stage.steps / total for stage in stages]


def _nearest(equivalent: float) -> int:
    """The width of the size that costs most nearly that."""
    return min(WIDTHS, key=lambda width: abs(math.log(equivalent_size(size_of_width(width)) / equivalent)))
