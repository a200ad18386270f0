"""Initial weights from another model (`init_from`): find them, check that they fit, and load them into a model that may be sharded."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from microdit.checkpoint import STATE, Checkpoint, check_finite, find_weights, open_checkpoint
from microdit.config.schema import DiffusionRecipe, ModelRecipe, Recipe, objective_of, short_yaml
from microdit.data.dataset import EncodedDataset
from microdit.diffusion.edm import EDM
from microdit.diffusion.flow import Flow
from microdit.diffusion.objective import Objective
from microdit.distributed import World
from microdit.errors import UserError
from microdit.io.near_names import did_you_mean_path
from microdit.models.microdit import ModelConfig
from microdit.pipelines.origin import Origin, origin_of_checkpoint, origin_of_pipeline, pipeline_place, weight_files
from microdit.training.checkpointing import load_into
from microdit.training.parallel import Shard, shards_of

NO_WEIGHTS = ("init_scale", "position_scale", "mask_padding")  # settings of a model that no weight depends on
IN_PIPELINES = "denoiser."  # what the names of weights in a pipeline's folder begin with

Warn = Callable[[str], None]


@dataclass(frozen=True)
class InitialWeights:
    """The weights called `name` (`model`, `ema`, ...) of an intact checkpoint, or those of a pipeline's folder, which is `origin.place`."""

    origin: Origin
    name: str
    checkpoint: Checkpoint | None

    def fill(self, model: nn.Module, world: World) -> None:
        """Load the weights into the model in place, one parameter at a time; where it is sharded, each process reads its part.

        All processes must call this. Raises UserError if the weights cannot be read, have other shapes, or are not finite.
        """
        what, shards = f"The weights {self.name} of {self.origin.place}", shards_of(model)
        with world.together():
            if self.checkpoint is None:
                _read(weight_files(self.origin.place), IN_PIPELINES, shards, what)
            elif path := self.checkpoint.path_of(self.name):
                _read([path], "", shards, what)
            else:
                load_into(self.checkpoint, {f"{self.name}/{shard.name}": shard.weight.detach() for shard in shards}, world)
            check_finite({shard.name: shard.leaf for shard in shards}, what)


def find_initial_weights(
    recipe: Recipe, run: Path, config: ModelConfig, data: EncodedDataset, world: World, warn: Warn, known: Checkpoint | None
) -> InitialWeights | None:
    """Return the weights that the recipe starts from; None if it names none. All processes must call this.

    They are the weights `init_weights` of the run `init_from`, or those of a pipeline's folder. `known` is that run's newest checkpoint if
    it was verified already, and is not read again. Warns about damaged checkpoints, which are skipped, about a run that was not trained to
    its end, and about noise settings that differ. Raises UserError if there is nothing, or if its objective, encoders or architecture
    differ.
    """
    if recipe.init_from is None:
        return None
    places = [run.parent / recipe.init_from, Path(recipe.init_from)]
    folder = None if known else world.look(lambda: pipeline_place(str(recipe.init_from), places))
    if folder is not None:
        if recipe.init_weights != "model":
            raise UserError(
                f"{folder} holds one set of weights: leave out init_weights {recipe.init_weights}, which chooses among a run's."
            )
        found = InitialWeights(world.look(lambda: origin_of_pipeline(folder)), "model", None)
    else:
        checkpoint = known or _found_checkpoint(places, recipe.init_weights, world, warn)
        names = world.look(lambda: checkpoint.weights)
        if recipe.init_weights not in names:
            raise UserError(f"{checkpoint.folder} holds no weights named {recipe.init_weights}, only {', '.join(names)}.")
        if damaged := checkpoint.damage_of(recipe.init_weights, world):
            raise UserError(f"{checkpoint.folder} is damaged ({', '.join(damaged)}: not what was written, or gone).")
        found = InitialWeights(origin_of_checkpoint(checkpoint), recipe.init_weights, checkpoint)
    _check_objective(found.origin, recipe.diffusion, warn)
    _check_encoders(found.origin, data, warn)
    _check_architecture(found.origin, recipe.model, config)
    if recipe.alignment is not None:
        warn(f"init_from: {found.origin.place} gives the model its weights; the projector of alignment starts from random ones.")
    return found


def _check_objective(origin: Origin, diffusion: DiffusionRecipe, warn: Warn) -> None:
    """Raise UserError if the network learnt to predict something else; warn if its input or output is scaled otherwise."""
    objective = objective_of(diffusion)
    then, now = _in_words(origin.objective), _in_words(objective)
    if then != now:
        raise UserError(
            f"{origin.place} was trained with {then}, and the recipe asks for {now}: its weights predict something else. Give the recipe "
            "the same diffusion.objective and diffusion.prediction, or train from scratch, without init_from."
        )
    changed = [
        f"diffusion.{name} is {getattr(objective, name):g}, and was {getattr(origin.objective, name):g} in {origin.place}"
        for name in ("sigma_data", "noise_scale")
        if getattr(diffusion, name) is not None  # else sigma_data stays what it was
        and getattr(objective, name, None) != getattr(origin.objective, name, None)
    ]
    if changed:
        warn(f"init_from: {'; '.join(changed)}: the network's input is scaled otherwise than it learnt.")


def _in_words(objective: Objective) -> str:
    if isinstance(objective, EDM):
        return "objective edm"
    assert isinstance(objective, Flow)
    return f"objective flow, prediction {objective.prediction}"


def _check_encoders(origin: Origin, data: EncodedDataset, warn: Warn) -> None:
    """Raise UserError if the data was encoded by other encoders; warn where that cannot be known."""
    options = {"autoencoder": "--autoencoder", "text_encoder": "--text-encoder"}
    for key, option in options.items():
        then, now = origin.encoders.get(key, {}), data.manifest[key]
        if "fingerprint" in then and then["fingerprint"] != now["fingerprint"]:
            raise UserError(
                f"{origin.place} was trained on data of the {key} {then['name']} ({then['fingerprint']}), and {data.folder} is of "
                f"{now['name']} ({now['fingerprint']}): encode the data with {option} {then['name']}."
            )
        if "fingerprint" not in then and then.get("name") != now["name"]:
            warn(
                f"init_from: {origin.place} was trained with the {key} {then.get('name', 'of an unknown name')}, and {data.folder} is of "
                f"{now['name']}. If these are different networks, encode the data with {option} {then.get('name', 'NAME')}."
            )


def _check_architecture(origin: Origin, model: ModelRecipe, config: ModelConfig) -> None:
    """Raise UserError, with what differs and the lines of `model:` to copy, if the weights are those of another architecture."""
    saved, wanted = (asdict(one) for one in (origin.config, config))
    keys = [key for key in wanted if saved[key] != wanted[key] and key not in NO_WEIGHTS]
    if not keys:
        return
    of_data = {"in_channels": "channels of latents", "caption_channels": "width of caption vectors"}
    differences = [f"{of_data[key]}: {saved[key]} there, {wanted[key]} in the data" for key in keys if key in of_data]
    if differences:
        fix = "Encode the data with the encoders that it was trained with."
    elif origin.model is None:
        differences = [f"{key}: {_short(saved[key])} there, {_short(wanted[key])} in the recipe" for key in keys]
        fix = "No part model: of a recipe describes it."
    else:
        then, now = asdict(origin.model), asdict(model)
        differences = [
            f"model.{key}: {then[key]} there, {now[key]} in the recipe" for key in now if then[key] != now[key] and key not in NO_WEIGHTS
        ]
        fix = f"To start from it, copy these lines into the recipe, in place of its model:\n\n{_model_lines(origin.model)}"
    raise UserError(f"{origin.place} is of another architecture than the recipe asks for:\n  - " + "\n  - ".join(differences) + f"\n{fix}")


def _model_lines(model: ModelRecipe) -> str:
    return "model:\n" + "".join(f"  {line}\n" for line in short_yaml(model).splitlines())


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _found_checkpoint(places: list[Path], weights: str, world: World, warn: Warn) -> Checkpoint:
    for place in places:
        if checkpoint := find_weights(place, lambda sentence: warn(f"init_from: {sentence}"), weights, world):
            _warn_if_unfinished(checkpoint, warn)
            return checkpoint
        if checkpoint := world.look(lambda: _own_folder(place)):  # noqa: B023 (it is called at once)
            return checkpoint
    near = next(filter(None, map(did_you_mean_path, places)), "")
    raise UserError(
        f"init_from is {places[-1]}, and there is no checkpoint in {' nor in '.join(str(place) for place in places)}, and no exported or "
        f"imported model.{near} Train that run first, or name another."
    )


def _own_folder(place: Path) -> Checkpoint | None:
    """Return the checkpoint if `place` is itself the folder of one."""
    return open_checkpoint(place) if (place / STATE).is_file() else None


def _warn_if_unfinished(checkpoint: Checkpoint, warn: Warn) -> None:
    total = sum(phase["steps"] for phase in checkpoint.state["recipe"]["phases"])
    if checkpoint.step < total:
        warn(
            f"init_from: begins with {checkpoint.folder}, step {checkpoint.step} of the {total} that its recipe asks for: those weights "
            "were not trained to the end. Finish that run with --resume first, if that is not what you want."
        )


@torch.no_grad()
def _read(paths: list[Path], prefix: str, shards: list[Shard], what: str) -> None:
    """Load files into the shards, whose names follow `prefix` there. Files are mapped, so that a process reads no more than its part."""
    missing = {f"{prefix}{shard.name}": shard for shard in shards}
    try:
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no dict)
                    shard = missing.pop(name, None)
                    if shard is None or torch.Size(file.get_slice(name).get_shape()) != shard.weight.shape:
                        raise UserError(f"{what} are not those of this recipe's model ({name}): name another origin in init_from.")
                    shard.leaf.copy_(shard.own(file.get_tensor(name)))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what} cannot be read: {error}.") from error
    if missing:
        raise UserError(
            f"{what} lack {len(missing)} of this recipe's model, such as {next(iter(missing))}: name another origin in init_from."
        )
