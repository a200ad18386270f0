"""Preparation of a training: open the data sets, and check them against recipe, processes and checkpoint."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.text import Text

from microdit.checkpoint import (
    STATE,
    Checkpoint,
    check_architecture,
    check_encoders,
    checkpoint_folders,
    open_checkpoint,
)
from microdit.config.load import with_todays_defaults
from microdit.config.schema import ModelRecipe, PhaseRecipe, Recipe, architecture
from microdit.data.dataset import EncodedDataset, MixedDataset
from microdit.data.latent_statistics import common_std
from microdit.data.sampler import SamplerPhase
from microdit.data.shard_cache import BLOCK, WINDOW, ShardCache
from microdit.diffusion.edm import EDM
from microdit.diffusion.objective import Objective
from microdit.distributed import World
from microdit.encoders.model_files import lasting_name
from microdit.errors import UserError
from microdit.io.console import joined, styled
from microdit.io.locks import LOCK
from microdit.io.places import MissingObject, Place, WrongBytes, is_remote
from microdit.models.microdit import ModelConfig
from microdit.pipelines.sampling import objective_record
from microdit.reports.remote_run import checkpoint_files, open_remote
from microdit.training.checkpointing import newest_intact
from microdit.training.run_store import RunStore
from microdit.training.state import TrainingState


def open_dataset(recipe: Recipe, warn: Callable[[str], None], world: World | None = None) -> MixedDataset:
    """Open the recipe's encoded sets, mixed as its phases say. All processes of `world` must call this.

    Raises UserError if a set is missing, damaged or empty, or if its encoders differ from those of the recipe or of the other sets.
    """
    data = recipe.data
    cache = open_cache(recipe)
    sets = {name: EncodedDataset(item.folder, data.resolution, world, cache) for name, item in data.named_sets.items()}
    if cache is not None:
        _check_cache(recipe, [encoded for encoded in sets.values() if encoded.cache is not None], cache)
    for encoded in sets.values():
        encoded.use_first_sentences(data.first_sentence)
        for key, wanted in (("autoencoder", data.autoencoder), ("text_encoder", data.text_encoder)):
            found = encoded.manifest[key]["name"]
            if wanted is not None and not _names_the_same(wanted, found):
                raise UserError(
                    f"data.{key} is {wanted}, but {encoded.folder} was encoded with {found}: write data.{key}={found}, or encode it again "
                    f"with --{key.replace('_', '-')} {wanted}."
                )
    repeats = tuple(item.repeat for item in data.named_sets.values())
    if recipe.alignment is not None:
        _check_features(recipe.alignment.encoder, list(sets.values()))
    phases = [_phase_order(phase, list(sets), repeats) for phase in recipe.phases]
    block_bytes = BLOCK * data.cache.gigabytes * 10**9 if data_order(recipe) == "blocks" else None
    return MixedDataset(list(sets.values()), phases, recipe.seed, data.horizontal_flip, data.on_damage, warn, block_bytes)


def open_cache(recipe: Recipe) -> ShardCache | None:
    """Open the recipe's cache of shards; None if no set is in an object store. Raises UserError if the folder cannot be written."""
    paths = [item.path for item in recipe.data.named_sets.values()] + [recipe.data.held_out]
    if not any(path is not None and is_remote(path) for path in paths):
        return None
    folder = recipe.data.cache.folder
    return ShardCache(None if folder is None else Path(folder), recipe.data.cache.gigabytes)


def data_order(recipe: Recipe) -> Literal["full", "blocks"]:
    """Return the order of the samples: the recipe's, or blocks if a set is in an object store, else full."""
    remote = any(item.path is not None and is_remote(item.path) for item in recipe.data.named_sets.values())
    return recipe.data.order or ("blocks" if remote else "full")


def with_data_order(recipe: Recipe) -> Recipe:
    """Return the recipe with the order of its samples filled in if that is `blocks`, so that it stays if the data moves."""
    return recipe if data_order(recipe) == "full" else replace(recipe, data=replace(recipe.data, order="blocks"))


def _check_cache(recipe: Recipe, sets: list[EncodedDataset], cache: ShardCache) -> None:
    """Raise UserError if the cache cannot hold what the order of the samples needs at the same time."""
    shards = [encoded.remote(number) for encoded in sets for number in range(len(encoded.manifest["shards"]))]
    if not shards:
        return
    cache.check(max(shards, key=lambda shard: shard.bytes))
    total = sum(shard.bytes for shard in shards)
    if data_order(recipe) == "full" and total > WINDOW * cache.bytes:
        raise UserError(
            f"data.order full reads from all shards at any time, {total / 1e9:,.3g} GB in all: choose data.order=blocks, or "
            f"data.cache.gigabytes={total / WINDOW / 1e9:.3g} if the disk has room for that."
        )


def _check_features(encoder: str, sets: list[EncodedDataset]) -> None:
    """Raise UserError unless all sets have features of the encoder, and of the same weights."""
    for encoded in sets:
        manifest, found = encoded.manifest, encoded.manifest.get("features")
        if found is None or not _names_the_same(encoder, found["name"]):
            holds = "no features of images" if found is None else f"features of {found['name']}"
            names = f"--autoencoder {manifest['autoencoder']['name']} --text-encoder {manifest['text_encoder']['name']}"
            sides = " ".join(map(str, manifest["settings"]["resolutions"]))
            raise UserError(
                f"alignment.encoder is {encoder}, and {encoded.folder} holds {holds}: leave out alignment, or encode the data again, such "
                f"as by: microdit data encode {manifest['source']} --out {encoded.folder}-features --resolutions {sides} {names} "
                f"--features {encoder}"
            )
        if found != sets[0].manifest["features"]:
            raise UserError(
                f"{sets[0].folder} and {encoded.folder} hold features of {encoder} of different weights or grids: encode one of them again."
            )


def _names_the_same(wanted: str, recorded: str) -> bool:
    """Return whether a recipe's name of an encoder, perhaps a relative folder with options behind it, is the one that a set records."""
    place, mark, options = wanted.partition("?")
    return recorded in (wanted, lasting_name(place) + mark + options)


def _phase_order(phase: PhaseRecipe, names: list[str], repeats: tuple[int, ...]) -> SamplerPhase:
    weights = None if phase.weights is None else tuple(phase.weights.get(name, 0.0) for name in names)
    return SamplerPhase(phase.steps, phase.batch_size, repeats, weights)


SIGMA_MISMATCH = 0.2  # the share by which sigma_data may differ from the data before a warning is due


def with_sigma_data(recipe: Recipe, sets: list[EncodedDataset], before: Objective | None, warn: Callable[[str], None]) -> Recipe:
    """Return the recipe with EDM's `sigma_data` filled in, if it leaves that open, and warn if the value does not suit the data.

    `before` is the objective of the weights that training starts from, if any: its value is kept, because they were trained with that.
    Otherwise sigma_data is the standard deviation of the latents that the run will see, or the paper's 0.9 if a set does not record it.
    """
    if recipe.diffusion.objective != "edm":
        return recipe
    measured = _latent_std(recipe, sets)
    sigma_data = recipe.diffusion.sigma_data
    if sigma_data is None and isinstance(before, EDM):
        sigma_data = before.sigma_data
    elif sigma_data is None:
        sigma_data = EDM.sigma_data if measured is None else round(measured, 4)
    if measured is not None and abs(sigma_data - measured) > SIGMA_MISMATCH * measured:
        folders = ", ".join(str(encoded.folder) for encoded in sets)
        warn(
            f"sigma_data is {sigma_data:g}, and the latents of {folders} have a standard deviation of {measured:.3g}: the noise levels and "
            "the scale of the network's input were made for other data. Leave out diffusion.sigma_data, and a run from scratch takes that "
            "of the data."
        )
    return replace(recipe, diffusion=replace(recipe.diffusion, sigma_data=sigma_data))


def _latent_std(recipe: Recipe, sets: list[EncodedDataset]) -> float | None:
    """Return the standard deviation of the latents of all samples of the run; None if a set does not record its own, or it is zero."""
    names, shares = list(recipe.data.named_sets), [0.0] * len(sets)
    by_size = {name: len(encoded) * item.repeat for (name, item), encoded in zip(recipe.data.named_sets.items(), sets, strict=True)}
    for phase in recipe.phases:
        weights = by_size if phase.weights is None else phase.weights
        for number, name in enumerate(names):
            shares[number] += phase.steps * phase.batch_size * weights.get(name, 0.0) / sum(weights.values())
    used = [(share, encoded.latent_statistics) for share, encoded in zip(shares, sets, strict=True) if share]
    measured = [(share, statistics) for share, statistics in used if statistics is not None]
    return (common_std(measured) or None) if len(measured) == len(used) else None


FREE_TO_CHANGE = {"record", "engine", "guard", "name"}  # keys of a recipe that may change on resume without changing the result


def check_recipe_fits(recipe: Recipe, sets: list[EncodedDataset], world: World) -> None:
    """Check the recipe against its data and the number of processes.

    Raises UserError if a batch cannot be split evenly over processes and micro-batches, if a phase's mask pattern does not fit the image
    sizes, if a setting is for one process only, or if the model attends padding that the data does not hold.
    """
    rows = sum(len(encoded) for encoded in sets)
    if world.size > rows:
        raise UserError(f"There are {world.size} processes and {rows} samples in {', '.join(str(s.folder) for s in sets)}: start fewer.")
    if recipe.engine.release_gradients and world.size > 1:
        raise UserError(
            f"engine.release_gradients is for one process that holds the model whole, and there are {world.size}: leave it out, "
            "and take engine.sharding fsdp to save memory."
        )
    _check_padding(recipe.model, sets)
    for index, phase in enumerate(recipe.phases):
        share, rest = divmod(phase.batch_size, world.size)
        micro = recipe.engine.micro_batch or share
        if rest or not share or share % micro:
            least = world.size * min(micro, max(1, share))
            near = max(1, round(phase.batch_size / least)) * least
            raise UserError(
                f"phases.{index}.batch_size {phase.batch_size} cannot be split over {world.size} processes in micro-batches of {micro}: "
                f"use a multiple of {least}, such as {near}, or another engine.micro_batch."
            )
        if phase.mask_pattern == "grid":
            _check_grid_pattern(index, recipe.model.patch_size, sets)


def find_checkpoint(
    run: Path,
    recipe: Recipe,
    sets: list[EncodedDataset],
    world: World,
    warn: Callable[[str], None],
    resume: bool,
    accept_changes: bool,
    store: RunStore | None = None,
) -> Checkpoint | None:
    """Return the run's newest intact checkpoint, which training continues from; None for a new run.

    Raises UserError if the run exists and `resume` is not set, or if the checkpoint has another architecture or other encoders, or no
    projector where the recipe has an alignment. Other differences of recipe or data are warnings with `accept_changes`, else a UserError.
    """
    if not resume:
        if world.look(lambda: run.exists() and any(path.name != LOCK for path in run.iterdir())):
            raise UserError(f"{run} holds a run already: continue with --resume, or choose another --out.")
        return None
    checkpoint = newest_intact(run, world, warn, store=store)
    if checkpoint is not None:
        check_architecture(checkpoint, model_config(recipe, sets[0]))
        check_encoders(checkpoint, sets[0].manifest, sets[0].folder)
        changes = _changes(checkpoint, recipe, sets)
        if changes and not accept_changes:
            raise UserError(
                f"The recipe is not the one that {checkpoint.folder} was trained with:\n  - "
                + "\n  - ".join(changes)
                + "\nReturn to the old one, or continue with the new one by --accept-changes."
            )
        for change in changes:
            warn(f"Changed since the checkpoint: {change}")
        if recipe.alignment is not None and checkpoint.state["recipe"].get("alignment") is None:
            raise UserError(
                f"{checkpoint.folder} has no projector, since it was trained without alignment: leave alignment out, or start another run "
                "from its weights (init_from)."
            )
        if checkpoint.step > recipe.total_steps:
            raise UserError(f"{checkpoint.folder} is beyond the recipe's last step ({recipe.total_steps}): there is nothing to train.")
    return checkpoint


def finished_checkpoint(run: Path, recipe: Recipe, world: World) -> Checkpoint | None:
    """Return the run's newest checkpoint if it is of this recipe's last step and intact, else None. All processes must call this."""
    checkpoint = world.look(lambda: _last_step_checkpoint(run, recipe))
    return None if checkpoint is None or checkpoint.damage(sorted(checkpoint.state["files"]), world) else checkpoint


def is_finished_in_store(place: Place, recipe: Recipe) -> bool:
    """Return whether the newest checkpoint of a run in a store is of this recipe's last step. Only its state.json is read."""
    name, sizes = next(((name, sizes) for name, sizes in checkpoint_files(place).items() if STATE in sizes), ("", {}))
    try:
        remote = open_remote(place, name, sizes) if name else None
    except (MissingObject, WrongBytes):
        return False  # damaged: resuming will warn about it
    if remote is None or not remote.state["files"].keys() <= sizes.keys():
        return False
    checkpoint = Checkpoint(Path(name), remote.state["step"], remote.state)
    return checkpoint.step == recipe.total_steps and not _recipe_changes(checkpoint, recipe)


def _last_step_checkpoint(run: Path, recipe: Recipe) -> Checkpoint | None:
    folders = checkpoint_folders(run)
    try:
        checkpoint = open_checkpoint(folders[0]) if folders else None
    except UserError:
        return None  # damaged: resuming will warn about it
    if checkpoint is None or checkpoint.step != recipe.total_steps or _recipe_changes(checkpoint, recipe):
        return None
    return checkpoint


def model_config(recipe: Recipe, data: EncodedDataset) -> ModelConfig:
    """Return the architecture of the recipe's model for this data. Raises UserError if the patch size does not divide the latents."""
    channels = data.latent_shape()[0]
    p = recipe.model.patch_size
    for bucket in range(len(data.bucket_sizes)):
        _, height, width = data.latent_shape(bucket)
        if height % p or width % p:
            raise UserError(f"model.patch_size {p} does not divide the {height} x {width} latents of {data.folder}.")
    return architecture(recipe.model, channels, data.manifest["text_channels"])


def _check_padding(model: ModelRecipe, sets: list[EncodedDataset]) -> None:
    """Raise UserError if the model attends padding that is not stored: results would depend on the longest caption in the batch."""
    for encoded in sets:
        packing = encoded.manifest["settings"]["captions"]
        if not model.mask_padding and packing != "full":
            raise UserError(
                f"model.mask_padding is false, and {encoded.folder} holds captions without their padding ({packing}): "
                "take model.mask_padding=true, or encode again with --store-captions full, as the authors' captions are."
            )


def _check_grid_pattern(phase: int, patch_size: int, sets: list[EncodedDataset]) -> None:
    """Raise UserError unless all images have even numbers of rows and columns of patches."""
    for encoded in sets:
        for bucket in range(len(encoded.bucket_sizes)):
            rows, columns = (side // patch_size for side in encoded.latent_shape(bucket)[1:])
            if rows % 2 or columns % 2:
                raise UserError(
                    f"phases.{phase}.mask_pattern grid divides patches into cells of 2 x 2, and images of {encoded.folder} have "
                    f"{rows} x {columns} patches at model.patch_size {patch_size}: use mask_pattern random, or another patch_size."
                )


def fingerprints(recipe: Recipe, sets: list[EncodedDataset]) -> dict[str, dict[str, Any]]:
    """Return the path, number of rows and fingerprint of the shards of each encoded set, by its name in the recipe."""
    return {
        name: {
            "path": str(encoded.folder),
            "rows": len(encoded),
            "fingerprint": hashlib.sha256("".join(shard["sha256"] for shard in encoded.manifest["shards"]).encode()).hexdigest()[:16],
        }
        for name, encoded in zip(recipe.data.named_sets, sets, strict=True)
    }


def _changes(checkpoint: Checkpoint, recipe: Recipe, sets: list[EncodedDataset]) -> list[str]:
    """Return sentences about what differs from the recipe and data that the checkpoint was trained with."""
    changes = _recipe_changes(checkpoint, recipe)
    old, new = checkpoint.state["sets"], fingerprints(recipe, sets)
    for name in sorted(old.keys() & new.keys()):
        if old[name]["fingerprint"] != new[name]["fingerprint"]:
            changes.append(f"the content of the set {name}: {old[name]['rows']} rows then ({old[name]['path']}), {new[name]['rows']} now")
    return changes


def _recipe_changes(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    then, now = with_todays_defaults(checkpoint.state["recipe"]), yaml.safe_load(recipe.to_yaml())
    now["data"]["order"], then["data"]["order"] = data_order(recipe), then["data"].get("order") or "full"
    for kept in (then["data"], now["data"]):
        cache = kept.pop("cache", None)
        if cache is not None and kept["order"] == "blocks":  # its size has an effect on the order, its folder never
            kept["cache"] = {"gigabytes": cache["gigabytes"]}
    if now["diffusion"]["sigma_data"] is None:  # what the data gave at the start stays
        now["diffusion"]["sigma_data"] = then.get("diffusion", {}).get("sigma_data")
    for key, used in _used_data(checkpoint).items():
        if then["data"].get(key) is None and now["data"][key] is not None:
            then["data"][key] = used  # naming what was used all along is not a change
    return [change for change in _differences(then, now) if re.split(r"[.:]", change)[0] not in FREE_TO_CHANGE]


def _used_data(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the resolution and encoders of the checkpoint's data, which a recipe may name."""
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
    """Return what a checkpoint records besides tensors and position: enough to generate images, and to know what it was trained with."""
    return {
        "model": asdict(config),
        **objective_record(recipe.objective),
        "mask_padding": recipe.model.mask_padding,
        "data": data.summary(),
        "sets": fingerprints(recipe, sets),
        "recipe": yaml.safe_load(recipe.to_yaml()),
    }


def start_message(recipe: Recipe, run: Path | Place, sets: list[EncodedDataset], state: TrainingState, step: int, world: World) -> Text:
    """Return the sentence that announces a training."""
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
