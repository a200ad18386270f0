"""The command for the bundled recipes: microdit recipes."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from microdit.cli.terminal import console
from microdit.config.recipes import find_recipe, list_recipes
from microdit.errors import UserError
from microdit.io.console import joined, styled
from microdit.io.strict_yaml import read_yaml


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe, such as emoji-fast or lab/masking.")] = None,
    copy: Annotated[Path | None, typer.Option(help="Copy it to this path, to edit it there.")] = None,
) -> None:
    """List the recipes that come with microdit, print one, or copy one to edit it.

    Example: microdit recipes emoji-fast --copy my.yaml
    """
    if name is None:
        if copy is not None:
            raise UserError("--copy needs the name of a recipe: `microdit recipes` lists them.")
        _show("microdit train NAME", "", list_recipes())
        _show("microdit lab run NAME", "lab/", list_recipes("lab"))
        return
    found = find_recipe(name)
    if copy is not None:
        _copy(found, copy)
        return
    for path in sorted(found.glob("*.yaml")) if found.is_dir() else [found]:
        for line in path.read_text().splitlines():
            console.print(line, soft_wrap=True)


def _show(command: str, prefix: str, summaries: dict[str, str]) -> None:
    console.print(styled(command, "bold"))
    for name, summary in summaries.items():
        console.print(joined("  ", styled(f"{prefix}{name:<18}", "cyan"), summary), soft_wrap=True)


def _copy(found: Path, to: Path) -> None:
    """Copy a recipe, a folder of them, or a study together with the recipe that it starts from."""
    copies = {found: to}
    if found.is_file() and "question" in (study := read_yaml(found)):
        base = "".join(study.get("base", "base.yaml"))  # a plain str: paths take no subclass
        copies[found.with_name(base)] = to.with_name(base)
    for target in copies.values():
        if target.exists():
            raise UserError(f"{target} exists already: choose another name.")
    for source, target in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    command = "lab run" if len(copies) > 1 else "train"
    console.print(f"Written: {', '.join(map(str, copies.values()))}. Use it with: microdit {command} {to}", soft_wrap=True)
