"""A folder of recipes, trained in the order of their names: each a run of its own, beside the others."""

from dataclasses import dataclass
from pathlib import Path

from microdit.checkpoint import Checkpoint
from microdit.config.load import load_recipe
from microdit.config.schema import Recipe
from microdit.distributed import World
from microdit.errors import UserError
from microdit.io.console import PlainConsole, styled
from microdit.io.locks import sole_writer
from microdit.training.setup import finished_checkpoint
from microdit.training.trainer import Trainer


@dataclass(frozen=True)
class Settings:
    """What is asked for beside the recipes."""

    resume: bool = False
    accept_changes: bool = False
    price_per_hour: float | None = None


def load_chain(folder: Path, overrides: list[str] | None) -> dict[str, Recipe]:
    """The recipes of a folder by their file's stem, which is also their run's name. Overrides apply to all. Raises UserError."""
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise UserError(f"There is no recipe (*.yaml) in {folder}.")
    recipes = {path.stem: load_recipe(path, overrides) for path in paths}
    for index, (name, recipe) in enumerate(recipes.items()):
        if recipe.init_from in recipes and recipe.init_from not in list(recipes)[:index]:
            raise UserError(f"{folder}/{name}.yaml begins from {recipe.init_from}, which is trained after it: rename the files.")
    return recipes


def train_chain(recipes: dict[str, Recipe], out: Path, settings: Settings, console: PlainConsole, world: World) -> None:
    """Train each into `out`/NAME. With `resume`, those that are finished are passed over. Raises what `Trainer` raises."""
    if not settings.resume and world.look(lambda: any((out / name).exists() for name in recipes)):
        raise UserError(f"{out} holds runs of these recipes already: go on with --resume, or choose another --out.")
    finished: dict[str, Checkpoint] = {}
    for number, (name, recipe) in enumerate(recipes.items(), start=1):
        console.print(styled(f"{number} of {len(recipes)}: {name}"))
        origin = finished.get(recipe.init_from or "")
        if found := train_one(recipe, out / name, settings, console, world, origin):
            finished[name] = found


def train_one(
    recipe: Recipe, run: Path, settings: Settings, console: PlainConsole, world: World, origin: Checkpoint | None = None
) -> Checkpoint | None:
    """Nothing is done for a run that is finished, whose last checkpoint is returned: every byte of it was compared.

    `origin`: such a checkpoint of the run that `init_from` names, which is then not read again. Raises what `Trainer` raises, and UserError
    if another program is training it.
    """
    if settings.resume and (found := finished_checkpoint(run, recipe, world)):
        console.print(f"{run} is finished.")
        return found
    with sole_writer(run, world):
        Trainer(recipe, run, console, world, settings.resume, settings.accept_changes, settings.price_per_hour, origin).train()
    return None
