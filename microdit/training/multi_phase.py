"""Train a folder of recipes in the order of their names, each into a run folder of its own."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from microdit.checkpoint import Checkpoint
from microdit.config.schema import Recipe
from microdit.distributed import World
from microdit.errors import UserError
from microdit.io.console import Reporter, styled
from microdit.io.locks import sole_writer
from microdit.io.places import Place
from microdit.training.encode_sources import with_encoded_sources
from microdit.training.run_store import opened_store
from microdit.training.setup import finished_checkpoint, is_finished_in_store
from microdit.training.trainer import Encoded, Trainer


@dataclass(frozen=True)
class RunSettings:
    """The user's choices for one start of a run, apart from its recipe.

    `price_per_hour` is in dollars per GPU-hour. `workspace` is the local folder of a run in an object store, by default one in the cache.
    """

    resume: bool = False
    accept_changes: bool = False
    price_per_hour: float | None = None
    workspace: Path | None = None


def train_phases(recipes: dict[str, Recipe], out: Path | Place, settings: RunSettings, reporter: Reporter, world: World) -> None:
    """Train each recipe into `out`/NAME. With `settings.resume`, finished ones are passed over.

    Raises UserError if there are such runs already and `settings.resume` is not set, and whatever `train_one` raises.
    """
    if not settings.resume and world.look(lambda: any(_exists(out / name) for name in recipes)):
        raise UserError(f"{out} holds runs of these recipes already: continue with --resume, or choose another --out.")
    finished: dict[str, Checkpoint] = {}
    for number, (name, recipe) in enumerate(recipes.items(), start=1):
        reporter.say(styled(f"{number} of {len(recipes)}: {name}"))
        initial = finished.get(recipe.init_from or "")
        own = replace(settings, workspace=settings.workspace and settings.workspace / name)
        if found := train_one(recipe, out / name, own, reporter, world, initial):
            finished[name] = found


def default_run_folder(name: str) -> Path:
    """Return the folder of a run that was given none: runs/NAME, for the recipe's name. Raises UserError if that would lie elsewhere."""
    if name in (".", "..") or not name.isprintable() or "/" in name or "\\" in name:
        raise UserError(f"The recipe's name is {name!r}, which is no name of a folder in runs: choose the run's folder with --out.")
    return Path("runs") / name


def train_one(
    recipe: Recipe, run: Path | Place, settings: RunSettings, reporter: Reporter, world: World, initial: Checkpoint | None = None
) -> Checkpoint | None:
    """Train a recipe into the folder `run`, or into an object store (`run_store.py`).

    If the run is finished already in a folder, return its last checkpoint, every byte of which was compared with its checksum. `initial` is
    such a checkpoint of the run that `init_from` names, which is then not read again. Raises UserError if another program is training the
    run, and whatever `Trainer` raises.
    """
    started = time.monotonic()
    recipe, records = with_encoded_sources(recipe, world, reporter)
    encoded = Encoded(records, time.monotonic() - started)
    if isinstance(run, Place):
        _train_in_store(recipe, run, settings, encoded, reporter, world)
        return None
    if settings.resume and (found := finished_checkpoint(run, recipe, world)):
        reporter.say(f"{run} is finished.")
        return found
    with sole_writer(run, world):
        trainer = Trainer(recipe, run, reporter, world, settings.resume, settings.accept_changes, settings.price_per_hour, initial)
        trainer.book(encoded)
        trainer.train()
    return None


def _train_in_store(recipe: Recipe, place: Place, settings: RunSettings, encoded: Encoded, reporter: Reporter, world: World) -> None:
    if settings.resume and world.look(lambda: is_finished_in_store(place, recipe)):
        reporter.say(f"{place} is finished.")
        return
    with opened_store(place, settings.workspace, settings.resume, recipe, world, reporter) as store:
        choices = settings.resume, settings.accept_changes, settings.price_per_hour
        trainer = Trainer(recipe, store.workspace, reporter, world, *choices, store=store)
        trainer.book(encoded)
        trainer.train()


def _exists(run: Path | Place) -> bool:
    return run.exists() if isinstance(run, Path) else any(not name.startswith(".") for name in run.list())
