"""Train a folder of recipes in the order of their names, each into a run folder of its own."""

from dataclasses import dataclass
from pathlib import Path

from microdit.checkpoint import Checkpoint
from microdit.config.schema import Recipe
from microdit.distributed import World
from microdit.errors import UserError
from microdit.io.console import Reporter, styled
from microdit.io.locks import sole_writer
from microdit.training.encode_sources import with_encoded_sources
from microdit.training.setup import finished_checkpoint
from microdit.training.trainer import Trainer


@dataclass(frozen=True)
class RunSettings:
    """The user's choices for one start of a run, apart from its recipe. `price_per_hour` is in dollars per GPU-hour."""

    resume: bool = False
    accept_changes: bool = False
    price_per_hour: float | None = None


def train_phases(recipes: dict[str, Recipe], out: Path, settings: RunSettings, reporter: Reporter, world: World) -> None:
    """Train each recipe into `out`/NAME. With `settings.resume`, finished ones are passed over.

    Raises UserError if there are such runs already and `settings.resume` is not set, and whatever `train_one` raises.
    """
    if not settings.resume and world.look(lambda: any((out / name).exists() for name in recipes)):
        raise UserError(f"{out} holds runs of these recipes already: continue with --resume, or choose another --out.")
    finished: dict[str, Checkpoint] = {}
    for number, (name, recipe) in enumerate(recipes.items(), start=1):
        reporter.say(styled(f"{number} of {len(recipes)}: {name}"))
        initial = finished.get(recipe.init_from or "")
        if found := train_one(recipe, out / name, settings, reporter, world, initial):
            finished[name] = found


def train_one(
    recipe: Recipe, run: Path, settings: RunSettings, reporter: Reporter, world: World, initial: Checkpoint | None = None
) -> Checkpoint | None:
    """Train a recipe into the folder `run`.

    If the run is finished already, return its last checkpoint, every byte of which was compared with its checksum. `initial` is such a
    checkpoint of the run that `init_from` names, which is then not read again. Raises UserError if another program is training the run,
    and whatever `Trainer` raises.
    """
    recipe = with_encoded_sources(recipe, world, reporter)
    if settings.resume and (found := finished_checkpoint(run, recipe, world)):
        reporter.say(f"{run} is finished.")
        return found
    with sole_writer(run, world):
        Trainer(recipe, run, reporter, world, settings.resume, settings.accept_changes, settings.price_per_hour, initial).train()
    return None
