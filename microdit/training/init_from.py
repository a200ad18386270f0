"""Initial weights from another run or from a pipeline's folder (`init_from`): find them, check them, and load them, sharded or whole."""

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
from microdit.encoders.model_files import DOWNLOAD_AGAIN
from microdit.errors import UserError
from microdit.io.files import read_json
from microdit.models.microdit import MicroDiT, ModelConfig
from microdit.training.checkpointing import load_into
from microdit.training.parallel import Shard, shards_of

INDEX = "model_index.json"  # of a pipeline's folder


@dataclass(frozen=True)
class InitialWeights:
    """The weights called `name` (`model`, `ema`, ...) of an intact checkpoint."""

    checkpoint: Checkpoint
    name: str

    def fill(self, model: nn.Module, world: World) -> None:
        """Load the weights into the model in place, one parameter at a time; where it is sharded, each process reads its part.

        All processes must call this. Raises UserError if the weights cannot be read, have other shapes, or are not finite.
        """
        what, shards, path = f"The weights {self.name} of {self.checkpoint.folder}", shards_of(model), self.checkpoint.path_of(self.name)
        with world.together():
            if path is None:
                load_into(self.checkpoint, {f"{self.name}/{shard.name}": shard.weight.detach() for shard in shards}, world)
            else:
                _read(path, shards, what)
            check_finite({shard.name: shard.leaf for shard in shards}, what)


@dataclass(frozen=True)
class PipelineWeights:
    """The denoiser's weights in the folder of a pipeline, as `microdit export` and the import commands write it."""

    folder: Path

    def fill(self, model: nn.Module, world: World) -> None:
        """Load the weights into the model in place. Each process reads them whole. Raises UserError if they cannot be read."""
        with world.together():
            weights = _denoiser_in(self.folder).state_dict()
            for shard in shards_of(model):
                shard.leaf.detach().copy_(shard.own(weights[shard.name]))


def find_initial_weights(
    recipe: Recipe,
    run: Path,
    config: ModelConfig,
    data: EncodedDataset,
    world: World,
    warn: Callable[[str], None],
    known: Checkpoint | None,
) -> InitialWeights | PipelineWeights | None:
    """Return the weights `init_weights` of `init_from`, a run or a pipeline's folder; None if the recipe names none.

    All processes must call this.

    `known` is that run's newest checkpoint if it was verified already, and is not read again. Warns about damaged checkpoints, which are
    skipped, and about a run that was not trained to its end. The position scale may differ, since positions are not weights. Raises
    UserError if there is no checkpoint, or if its architecture or encoders differ.
    """
    if recipe.init_from is None:
        return None
    places = [run.parent / recipe.init_from, Path(recipe.init_from)]
    if known is None and (folder := world.look(lambda: next((place for place in places if (place / INDEX).is_file()), None))):
        return _of_pipeline(folder, recipe, config, data, world)
    checkpoint = known or _found(places, recipe.init_weights, world, warn)
    names = world.look(lambda: checkpoint.weights)
    if recipe.init_weights not in names:
        raise UserError(f"{checkpoint.folder} holds no weights named {recipe.init_weights}, only {', '.join(names)}.")
    if damaged := checkpoint.damage_of(recipe.init_weights, world):
        raise UserError(f"{checkpoint.folder} is damaged ({', '.join(damaged)}: not what was written, or gone).")
    check_architecture(checkpoint.model_config, str(checkpoint.folder), config, except_for=frozenset({"position_scale"}))
    check_encoders(checkpoint, data.manifest, data.folder)
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


def _of_pipeline(folder: Path, recipe: Recipe, config: ModelConfig, data: EncodedDataset, world: World) -> PipelineWeights:
    """Return the weights of a pipeline's folder. Raises UserError if they are of another architecture, or for another text encoder."""
    if recipe.init_weights != "model":
        raise UserError(f"{folder} holds one set of weights, and init_weights is {recipe.init_weights}: leave it out.")
    with world.together():
        found, text_encoder = _denoiser_in(folder).config, _text_encoder_of(folder)
        check_architecture(found, str(folder), config, except_for=frozenset({"position_scale"}))
        name = data.manifest["text_encoder"]["name"]
        if text_encoder not in (None, name):
            raise UserError(
                f"{folder} was trained with the text encoder {text_encoder}, and {data.folder} was encoded with {name}: encode the data "
                f"again with --text-encoder {text_encoder}."
            )
    return PipelineWeights(folder)


def _denoiser_in(folder: Path) -> MicroDiT:
    """Load the denoiser of a pipeline's folder, on the CPU. Raises UserError if it is damaged."""
    from microdit.pipelines.components import MicroDiTTransformer2DModel  # diffusers, which is slow to import

    model: MicroDiT = MicroDiTTransformer2DModel.from_pretrained(folder, subfolder="transformer").denoiser
    check_finite(model.state_dict(), f"The weights of {folder}")
    return model


def _text_encoder_of(folder: Path) -> str | None:
    """Return the name of the text encoder that the folder refers to; None if it holds one itself."""
    config = folder / "text_encoder" / "config.json"
    found = read_json(config, DOWNLOAD_AGAIN).get("name") if config.is_file() else None
    return found if isinstance(found, str) else None


def _own_folder(place: Path) -> Checkpoint | None:
    """Return the checkpoint if `place` is itself the folder of one."""
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
    """Load a file into the shards. The file is mapped, so that a process reads no more than its part."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (it is no dict)
            if shapes != {shard.name: shard.weight.shape for shard in shards}:
                raise UserError(f"{what} are not those of this recipe's model: name another run in init_from.")
            for shard in shards:
                shard.leaf.copy_(shard.own(file.get_tensor(shard.name)))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what} cannot be read: {error}.") from error
