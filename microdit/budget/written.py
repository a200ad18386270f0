"""A plan's recipes as YAML files that people read and change: only what differs from the defaults."""

from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from microdit.budget.plan import Plan
from microdit.errors import UserError
from microdit.files import write_aside
from microdit.formats import money
from microdit.recipe import Recipe


def write_recipes(plan: Plan, folder: Path) -> None:
    """One file a phase, for `microdit train FOLDER`. Raises UserError if the folder holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already: choose another --out.")
    for name, text in recipe_files(plan).items():
        write_aside(folder / name, text.encode())


def recipe_files(plan: Plan) -> dict[str, str]:
    """Their text by the file's name."""
    bought = f"what {money(plan.dollars)} buy on {plan.machine.count} x {plan.machine.chip.name} (microdit budget --dollars)"
    return {
        f"{stem}.yaml": f"# Phase {number} of {len(plan.recipes)} of {bought}.\n{recipe_text(recipe)}"
        for number, (stem, recipe) in enumerate(plan.recipes.items(), start=1)
    }


def recipe_text(recipe: Recipe) -> str:
    return yaml.safe_dump(_sparse(recipe), sort_keys=False, width=140)


def _sparse(item: Any) -> dict[str, Any]:
    """What a dataclass says beyond its defaults."""
    found: dict[str, Any] = {}
    for field in fields(item):
        value = getattr(item, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value == default:
            continue
        found[field.name] = _sparse(value) if is_dataclass(value) else [_plain(part) for part in value] if _is_list(value) else value
    return found


def _plain(part: Any) -> Any:
    return _sparse(part) if is_dataclass(part) else part


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
