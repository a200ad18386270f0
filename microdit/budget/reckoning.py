"""A whole recipe, or a folder of them, reckoned through: each phase's bill and memory, the data, the totals."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from microdit.budget.bill import PhaseBill, bill
from microdit.budget.encoding import Encoding, encoding
from microdit.budget.fit import Load, Way, usable
from microdit.budget.machine import Machine
from microdit.budget.shapes import Given, Shapes, shapes_of
from microdit.recipe import Recipe
from microdit.recipe_file import load_recipe
from microdit.training.chain import load_chain
from microdit.training.footprint import Footprint

SMALL_CARD_GB = 24  # what a good card for games has


@dataclass(frozen=True)
class PhaseBudget:
    """A phase of the recipe `recipe`.

    `asked`: memory as its engine settings say, in `parts`. `divides`: whether its micro-batch divides a GPU's share of the batch, without
    which `microdit train` refuses. `advice`: the way that suits the chip; `small`, that suits as many cards of 24 GB, and
    `small_alone`, one of them. None: it does not fit.
    """

    recipe: str
    bill: PhaseBill
    asked: Way
    parts: Footprint
    fits: bool
    divides: bool
    advice: Way
    small: Way | None
    small_alone: Way | None


@dataclass(frozen=True)
class Budget:
    machine: Machine
    parameters: int
    phases: list[PhaseBudget]
    encoding: Encoding
    assumed: tuple[str, ...]
    flops: float
    images: int
    hours: float
    dollars: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def load_recipes(path: Path, overrides: list[str] | None) -> dict[str, Recipe]:
    """By name: those of a folder, or the one of a file. Raises UserError."""
    return load_chain(path, overrides) if path.is_dir() else {path.stem: load_recipe(path, overrides)}


def reckon(
    recipes: dict[str, Recipe],
    machine: Machine,
    given: Given = Given(),  # noqa: B008 (frozen)
    images: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> Budget:
    """`images`: how many to encode. `check` is called before each piece of work that takes a while, and may raise.

    Raises UserError for what cannot be trained on that machine.
    """
    shapes = {name: shapes_of(recipe, given) for name, recipe in recipes.items()}
    phases = [phase for name, recipe in recipes.items() for phase in _phases(name, recipe, shapes[name], machine, check)]
    bills = [phase.bill for phase in phases]
    last = list(recipes)[-1]
    return Budget(
        machine,
        Load(recipes[last], recipes[last].phases[-1], shapes[last], machine.count, check).parameters,
        phases,
        encoding(list(shapes.values()), machine, images),
        tuple(dict.fromkeys(sentence for item in shapes.values() for sentence in item.assumed)),
        sum(item.flops for item in bills),
        sum(item.images for item in bills),
        sum(item.hours for item in bills),
        sum(item.dollars for item in bills),
    )


def _phases(name: str, recipe: Recipe, shapes: Shapes, machine: Machine, check: Callable[[], None]) -> list[PhaseBudget]:
    found = []
    for phase, its_bill in zip(recipe.phases, bill(recipe, shapes, machine), strict=True):
        load, alone = Load(recipe, phase, shapes, machine.count, check), Load(recipe, phase, shapes, 1, check)
        advice = load.best_way(machine.chip.memory_gb)
        if advice is None:
            raise load.refuse(machine.chip.memory_gb, machine.chip.name)
        asked, parts = load.as_asked(recipe, machine.chip.memory_gb)
        fits = parts.total <= usable(machine.chip.memory_gb)
        divides = load.share % (recipe.engine.micro_batch or load.share) == 0
        small = load.best_way(SMALL_CARD_GB), alone.best_way(SMALL_CARD_GB)
        found.append(PhaseBudget(name, its_bill, asked, parts, fits, divides, advice, *small))
    return found
