"""The recipe's data sets, opened and mixed as its phases say.

What is looked at before the first step: do recipe, data, processes and earlier runs fit together?
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.text import Text

from microdit.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    open_checkpoint,
    refuse_other_architecture,
    refuse_other_encoders,
)
from microdit.config.load import with_todays_defaults
from microdit.config.schema import ModelRecipe, PhaseRecipe, Recipe
from microdit.data.dataset import EncodedDataset, MixedDataset
from microdit.data.sampler import SamplerPhase
from microdit.distributed import World
from microdit.errors import UserError
from microdit.io.console import joined, styled
from microdit.io.locks import LOCK
from microdit.models.config import resolve
from microdit.models.microdit import ModelConfig
from microdit.training.checkpointing import newest_whole
from microdit.training.state import TrainingState


def open_mixture(recipe: Recipe, warn: Callable[[str], None], world: World | None = None) -> MixedDataset:
    """Raises UserError if a set is missing, damaged, encoded by other encoders than the recipe or the other sets say, or empty.

    The processes of `world` must all call this.
    """
    data = recipe.data
    sets = {name: EncodedDataset(Path(item.path), data.resolution, world) for name, item in data.named_sets.items()}
    for encoded in sets.values():
        for key, wanted in (("autoencoder", data.autoencoder), ("text_encoder", data.text_encoder)):
            found = encoded.manifest[key]["name"]
            if wanted is not None and found != wanted:
                raise UserError(
                    f"data.{key} is {wanted}, but {encoded.folder} was encoded with {found}: encode it again with the right one."
                )
    repeats = tuple(item.repeat for item in data.named_sets.values())
    phases = [_order_of(phase, list(sets), repeats) for phase in recipe.phases]
    return MixedDataset(list(sets.values()), phases, recipe.seed, data.horizontal_flip, data.on_damage, warn)


def _order_of(phase: PhaseRecipe, names: list[str], repeats: tuple[int, ...]) -> SamplerPhase:
    weights = None if phase.weights is None else tuple(phase.weights.get(name, 0.0) for name in names)
    return SamplerPhase(phase.steps, phase.batch_size, repeats, weights)


FREE_TO_CHANGE = {"record", "engine", "guard", "name"}  # of a recipe, between save and resume: what is learnt stays the same


def refuse_misfits(recipe: Recipe, sets: list[EncodedDataset], world: World) -> None:
    """Raises UserError if the batches cannot be dealt out to the processes, or the patches not into a phase's grid,
    if there are more processes than a setting is for, or if padding is to be attended that the data does not hold.
    """
    rows = sum(len(encoded) for encoded in sets)
    if world.size > rows:
        raise UserError(f"There are {world.size} processes and {rows} samples in {', '.join(str(s.folder) for s in sets)}: start fewer.")
    if recipe.engine.release_gradients and world.size > 1:
        raise UserError(
            f"engine.release_gradients is for one process that holds the model whole, and there are {world.size}: leave it out, "
            "and take engine.sharding fsdp to save memory."
        )
    _refuse_attended_padding(recipe.model, sets)
    for index, phase in enumerate(recipe.phases):
        share, rest = divmod(phase.batch_size, world.size)
        micro = recipe.engine.micro_batch or share
        if rest or not share or share % micro:
            least = world.size * min(micro, max(1, share))
            near = max(1, round(phase.batch_size / least)) * least
            raise UserError(
                f"phases.{index}.batch_size {phase.batch_size} cannot be dealt out to {world.size} processes in micro-batches of {micro}: "
                f"take a multiple of {least}, such as {near}, or another engine.micro_batch."
            )
        if phase.mask_pattern == "grid":
            _refuse_odd_grids(index, recipe.model.patch_size, sets)


def find_checkpoint(
    run: Path, recipe: Recipe, sets: list[EncodedDataset], world: World, warn: Callable[[str], None], resume: bool, accept_changes: bool
) -> Checkpoint | None:
    """What to go on from: the run's newest whole checkpoint. None for a new run.

    Raises UserError if there is a run and `resume` is not asked for, or if it was of another recipe, data or architecture.
    """
    if not resume:
        if world.look(lambda: run.exists() and any(path.name != LOCK for path in run.iterdir())):
            raise UserError(f"{run} holds a run already: go on with --resume, or choose another --out.")
        return None
    checkpoint = newest_whole(run, world, warn)
    if checkpoint is not None:
        refuse_other_architecture(checkpoint, model_config(recipe, sets[0]))
        refuse_other_encoders(checkpoint, sets[0].manifest, sets[0].folder)
        changes = _changes(checkpoint, recipe, sets)
        if changes and not accept_changes:
            raise UserError(
                f"The recipe is not the one that {checkpoint.folder} was trained with:\n  - "
                + "\n  - ".join(changes)
                + "\nGo back to the old one, or say --accept-changes to go on with the new one."
            )
        for change in changes:
            warn(f"Changed since the checkpoint: {change}")
        if checkpoint.step > recipe.total_steps:
            raise UserError(f"{checkpoint.folder} lies behind the recipe's last step ({recipe.total_steps}): there is nothing to train.")
    return checkpoint


def finished_checkpoint(run: Path, recipe: Recipe, world: World) -> Checkpoint | None:
    """The run's newest checkpoint if it is of this recipe's last step, and whole. The first process looks, all share the reading."""
    checkpoint = world.look(lambda: _of_the_last_step(run, recipe))
    return None if checkpoint is None or checkpoint.damage(sorted(checkpoint.state["files"]), world) else checkpoint


def _of_the_last_step(run: Path, recipe: Recipe) -> Checkpoint | None:
    folders = checkpoint_folders(run)
    try:
        checkpoint = open_checkpoint(folders[0]) if folders else None
    except UserError:
        return None  # damaged: resuming will say so
    if checkpoint is None or checkpoint.step != recipe.total_steps or _recipe_changes(checkpoint, recipe):
        return None
    return checkpoint


def model_config(recipe: Recipe, data: EncodedDataset) -> ModelConfig:
    """The recipe's model for this data's latents and captions. Raises UserError if the patches do not fit."""
    channels = data.latent_shape()[0]
    p = recipe.model.patch_size
    for bucket in range(len(data.bucket_sizes)):
        _, height, width = data.latent_shape(bucket)
        if height % p or width % p:
            raise UserError(f"model.patch_size {p} does not divide the {height} x {width} latents of {data.folder}.")
    return architecture(recipe.model, channels, data.manifest["text_channels"])


def architecture(model: ModelRecipe, in_channels: int, caption_channels: int) -> ModelConfig:
    """The recipe's model for latents of `in_channels` and captions of `caption_channels` a token."""
    return resolve(
        model,
        patch_size=model.patch_size,
        in_channels=in_channels,
        caption_channels=caption_channels,
        expert_capacity=model.expert_capacity,
        bias=model.bias,
        position_scale=model.position_scale,
    )


def _refuse_attended_padding(model: ModelRecipe, sets: list[EncodedDataset]) -> None:
    """Trimmed captions are padded with zeros up to the longest of a micro-batch: what is learnt would depend on who is beside whom."""
    for encoded in sets:
        form = encoded.manifest["settings"]["captions"]
        if not model.mask_padding and form != "full":
            raise UserError(
                f"model.mask_padding is false, and {encoded.folder} holds captions without their padding ({form}): "
                "take model.mask_padding=true, or encode again with --store-captions full, as the authors' captions are."
            )


def _refuse_odd_grids(phase: int, patch_size: int, sets: list[EncodedDataset]) -> None:
    for encoded in sets:
        for bucket in range(len(encoded.bucket_sizes)):
            rows, columns = (side // patch_size for side in encoded.latent_shape(bucket)[1:])
            if rows % 2 or columns % 2:
                raise UserError(
                    f"phases.{phase}.mask_pattern grid cuts patches into cells of 2 x 2, and pictures of {encoded.folder} have "
                    f"{rows} x {columns} patches at model.patch_size {patch_size}: use mask_pattern random, or another patch_size."
                )


def fingerprints(recipe: Recipe, sets: list[EncodedDataset]) -> dict[str, dict[str, Any]]:
    """Of each encoded set, by its name in the recipe: path, rows, and a fingerprint of every shard's content."""
    return {
        name: {
            "path": str(encoded.folder),
            "rows": len(encoded),
            "fingerprint": hashlib.sha256("".join(shard["sha256"] for shard in encoded.manifest["shards"]).encode()).hexdigest()[:16],
        }
        for name, encoded in zip(recipe.data.named_sets, sets, strict=True)
    }


def _changes(checkpoint: Checkpoint, recipe: Recipe, sets: list[EncodedDataset]) -> list[str]:
    """What of the recipe and the data differs from those that the checkpoint was made with, in words."""
    changes = _recipe_changes(checkpoint, recipe)
    old, new = checkpoint.state["sets"], fingerprints(recipe, sets)
    for name in sorted(old.keys() & new.keys()):
        if old[name]["fingerprint"] != new[name]["fingerprint"]:
            changes.append(f"the content of the set {name}: {old[name]['rows']} rows then ({old[name]['path']}), {new[name]['rows']} now")
    return changes


def _recipe_changes(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    then, now = with_todays_defaults(checkpoint.state["recipe"]), yaml.safe_load(recipe.to_yaml())
    for key, used in _used_data(checkpoint).items():
        if then["data"].get(key) is None and now["data"][key] is not None:
            then["data"][key] = used  # naming what was used all along is no change
    return [change for change in _differences(then, now) if re.split(r"[.:]", change)[0] not in FREE_TO_CHANGE]


def _used_data(checkpoint: Checkpoint) -> dict[str, Any]:
    """What recipes may say of their sets, as the checkpoint's were."""
    data = checkpoint.state["data"]
    return {"resolution": data["resolution"], "autoencoder": data["autoencoder"]["name"], "text_encoder": data["text_encoder"]["name"]}


def _differences(then: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(then, list) and isinstance(now, list) and then and now and isinstance((then + now)[0], dict):
        then, now = dict(enumerate(then)), dict(enumerate(now))
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            change
            for name in {**then, **now}
            for change in _differences(then.get(name), now.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if then == now else [f"{key}: {then} then, {now} now"]


def describe(recipe: Recipe, config: ModelConfig, data: EncodedDataset, sets: list[EncodedDataset]) -> dict[str, Any]:
    """What a checkpoint says of itself beside its tensors and position: enough to draw pictures, and to know what it was made with."""
    diffusion = recipe.diffusion
    return {
        "model": asdict(config),
        "edm": {"sigma_data": diffusion.sigma_data, "P_mean": diffusion.P_mean, "P_std": diffusion.P_std},
        "mask_padding": recipe.model.mask_padding,
        "data": data.summary(),
        "sets": fingerprints(recipe, sets),
        "recipe": yaml.safe_load(recipe.to_yaml()),
    }


def greeting(recipe: Recipe, run: Path, sets: list[EncodedDataset], state: TrainingState, step: int, world: World) -> Text:
    """What begins, in words."""
    before = "scratch" if recipe.init_from is None else f"the weights {recipe.init_weights} of {recipe.init_from}"
    start = f"from step {step}" if step else f"from {before}"
    samples = " + ".join(f"{len(encoded):,}" for encoded in sets)
    ways = {"none": "", "ddp": f", copied to {world.size} processes", "fsdp": f", sharded over {world.size} processes"}
    ways["hybrid"] = f", sharded over the {world.local_size} processes of each of {world.size // world.local_size} machines"
    return joined(
        styled(recipe.name),
        f": {state.parameters / 1e6:.1f} M parameters on {samples} samples, "
        f"{recipe.total_steps:,} steps {start}, into {run}{ways[state.sharding]}.",
    )
