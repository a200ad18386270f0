"""What the page's budget tab asks: the bill of a recipe, or what a sum of money buys, as the terminal shows them."""

import io
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from microdit.budget.machine import Machine, find_machine
from microdit.budget.measured import measurements_file
from microdit.budget.plan import buy
from microdit.budget.reckoning import load_recipes, reckon
from microdit.budget.shapes import Given
from microdit.budget.show import show, show_plan
from microdit.budget.written import recipe_files
from microdit.errors import UserError
from microdit.formats import finite
from microdit.recipe import Recipe
from microdit.terminal import PlainConsole

DATA = "data/pictures"  # that bought recipes name: not data/mine, which may be there already, encoded for smaller pictures
NUMBERS = {
    "price": "The price must be dollars of a GPU-hour, or left empty.",
    "mfu": "The utilisation must be the share of the chip's peak that is used, such as 0.45, or left empty.",
    "dollars": "The sum must be dollars, or left empty.",
}


def bill_text(fields: dict[str, Any], recipes: Path) -> str:
    """For `recipe`, one of the folder `recipes`, for `text`, a recipe itself, or for `dollars`. Raises UserError."""
    for key, sentence in NUMBERS.items():
        if fields.get(key) is not None and finite(fields[key]) is None:
            raise UserError(sentence)
    count, images = _whole(fields.get("count", 1), "GPUs", 100_000), fields.get("images")
    images = None if images is None else _whole(images, "images", 10**12)
    machine = find_machine(str(fields.get("chip", "h100")), count, fields.get("price"), fields.get("mfu"), None, measurements_file())
    console = PlainConsole(file=io.StringIO(), width=100, no_color=True, record=True)
    if fields.get("dollars") is None:
        show(reckon(_asked(fields, recipes), machine, images=images), console)
        return console.export_text()
    if fields.get("text") is not None:
        raise UserError("Give a file, to see what it costs, or dollars, to see what they buy: one of the two.")
    return _bought(fields["dollars"], machine, images, console)


def _bought(dollars: float, machine: Machine, images: int | None, console: PlainConsole) -> str:
    """With the recipes' text."""
    plan = buy(dollars, machine, Given(), DATA, images)
    show_plan(plan, reckon(plan.recipes, machine, images=images), console)
    return console.export_text() + "".join(f"\n--- {name}\n{text}" for name, text in recipe_files(plan).items())


def _whole(number: Any, what: str, most: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= most:
        raise UserError(f"The number of {what} must be a whole number from 1 to {most:,}.")
    return number


def _asked(fields: dict[str, Any], recipes: Path) -> dict[str, Recipe]:
    if isinstance(fields.get("text"), str):
        return _of_text(fields["text"])
    chosen = recipes / str(fields.get("recipe", ""))
    if recipes.resolve() not in chosen.resolve().parents or not chosen.exists():
        raise UserError("There is no such recipe here: choose one, or give a file of your own.")
    return load_recipes(chosen, None)


def _of_text(text: str) -> dict[str, Recipe]:
    """A recipe that was given as a file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text, errors="replace")
        return load_recipes(path, None)
