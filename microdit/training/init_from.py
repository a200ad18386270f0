"""The weights of another run that a run begins with (`init_from`): found, compared, given to each process as its share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from microdit.checkpoint import (
    STATE,
    Checkpoint,
    check_architecture,
    check_encoders,
    check_finite,
    find_weights,
    open_checkpoint,
)
from microdit.config.schema import Recipe
from microdit.data.dataset import EncodedDataset
from microdit.distributed import World
from microdit.errors import UserError
from microdit.models.microdit import ModelConfig
from microdit.training.checkpointing import load_into
from microdit.training.parallel import Shard, shards_of


@dataclass(frozen=True)
class InitialWeights:
    """The weights called `name` (`model`, `ema` ...) of a checkpoint that is whole."""

    checkpoint: Checkpoint
    name: str

    def fill(self, model: nn.Module, world: World) -> None:
        """Give the model's parameters these values, in place, one after the other; where they are sharded, each process reads its share.

        All processes must call this. Raises UserError if the weights cannot be read, are of other shapes, or are not finite.
        """
        what, shards, path = f"The weights {self.name} of {self.checkpoint.folder}", shards_of(model), self.checkpoint.path_of(self.name)
        with world.together():
            if path is None:
                load_into(self.checkpoint, {f"{self.name}/{shard.name}": shard.weight.detach() for shard in shards}, world)
            else:
                _read(path, shards, what)
            check_finite({shard.name: shard.leaf for shard in shards}, what)


def find_initial_weights(
    recipe: Recipe,
    run: Path,
    config: ModelConfig,
    data: EncodedDataset,
    world: World,
    warn: Callable[[str], None],
    known: Checkpoint | None,
) -> InitialWeights | None:
    """The weights that `init_from` names, those called `init_weights`; None if it names none. All processes must call this.

    `known`: that run's newest checkpoint, if it was found whole already: it is not read again. Damaged checkpoints are passed over, and
    `warn` is told; as it is if the run was not trained to its end. Position scale may differ: positions are no weights. Raises UserError if
    there are none, or if they are of another architecture or other encoders.
    """
    if recipe.init_from is None:
        return None
    places = [run.parent / recipe.init_from, Path(recipe.init_from)]
    checkpoint = known or _found(places, recipe.init_weights, world, warn)
    names = world.look(lambda: checkpoint.weights)
    if recipe.init_weights not in names:
        raise UserError(f"{checkpoint.folder} holds no weights named {recipe.init_weights}, only {', '.join(names)}.")
    if damaged := checkpoint.damage_of(recipe.init_weights, world):
        raise UserError(f"{checkpoint.folder} is damaged ({', '.join(damaged)}: not what was written, or gone).")
    check_architecture(checkpoint, config, except_for=frozenset({"position_scale"}))
    check_encoders(checkpoint, data.card, data.folder)
    return InitialWeights(checkpoint, recipe.init_weights)


def _found(places: list[Path], weights: str, world: World, warn: Callable[[str], None]) -> Checkpoint:
    for place in places:
        if checkpoint := find_weights(place, lambda sentence: warn(f"init_from: {sentence}"), weights, world):
            _warn_if_unfinished(checkpoint, warn)
            return checkpoint
        if checkpoint := world.look(lambda: _own_folder(place)):  # noqa: B023 (it is called at once)
            return checkpoint
    raise UserError(
        f"init_from is {places[-1]}, and there is no checkpoint in {' nor in '.join(str(place) for place in places)}: "
        "train that run first, or name another."
    )


def _own_folder(place: Path) -> Checkpoint | None:
    """The checkpoint whose own folder this is."""
    return open_checkpoint(place) if (place / STATE).is_file() else None


def _warn_if_unfinished(checkpoint: Checkpoint, warn: Callable[[str], None]) -> None:
    total = sum(phase["steps"] for phase in checkpoint.state["recipe"]["phases"])
    if checkpoint.step < total:
        warn(
            f"init_from: begins with {checkpoint.folder}, step {checkpoint.step} of the {total} that its recipe asks for: those weights "
            "were not trained to the end. Finish that run with --resume first, if that is not what you want."
        )


@torch.no_grad()
def _read(path: Path, shards: list[Shard], what: str) -> None:
    """A tensor that is taken out of a mapped file is read where it is looked at: a share of it costs that share."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (it is no dict)
            if shapes != {shard.name: shard.weight.shape for shard in shards}:
                raise UserError(f"{what} are not those of this recipe's model: name another run in init_from.")
            for shard in shards:
                shard.leaf.copy_(shard.own(file.get_tensor(shard.name)))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what} cannot be read: {error}.") from error
