"""Times of a recipe's parts on this machine, as `microdit bench --recipe` measures them and `microdit budget` bills them.

They are kept in the user's cache folder, one JSON file with a checksum for each machine, version of torch and recipe. The name of a file
is a hash of all that has an effect on the times, which stands in the file too: a file that was copied there from elsewhere, or that was
damaged, is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from microdit.config.schema import Recipe
from microdit.devices import choose_device, choose_dtype, device_name, processor_name
from microdit.errors import UserError
from microdit.io.files import cache_folder, from_checked_json, to_checked_json, write_aside
from microdit.io.untrusted_text import one_line, parse_json_object
from microdit.planning.workload import Shapes
from microdit.reports.formats import finite

FORMAT = 1
# Settings that have no effect on the time of a part. How often a part occurs is multiplied, not measured.
FREE: dict[str, set[str]] = {
    "": {"name", "seed", "init_from", "init_weights", "guard"},
    "data": {"path", "sets", "cache", "on_damage", "read_timeout"},
    "diffusion": {"sigma_data", "P_mean", "P_std", "t_mean", "t_std", "shift", "noise_scale", "training_floor", "sampling_floor"},
    "phases": {"name", "steps", "learning_rate", "warmup_steps", "final_learning_rate", "grad_clip", "weights"},
    "optimizer": {"betas", "eps", "weight_decay", "decay", "expert_learning_rate"},
    "ema": {"decay", "start"},
    "engine": {"device", "precision"},  # the machine and the dtype that they mean are recorded instead
    "record": {
        "samples_every",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "held_out_every",
        "fid_every",
        "fid_reference",
        "fid_samples",
        "fid_network",
    },
    "alignment": {"weight", "until"},
}


@dataclass(frozen=True)
class Stretch:
    """Steps of one phase (its number in the recipe) that are alike: all with an alignment loss, or all without."""

    phase: int
    aligned: bool
    steps: int


def stretches(recipe: Recipe) -> list[Stretch]:
    """Return the stretches of a training in their order. The alignment loss ends somewhere, perhaps within a phase."""
    found, to_align = [], recipe.aligned_steps
    for number, phase in enumerate(recipe.phases):
        aligned = min(phase.steps, to_align)
        to_align -= aligned
        found += [Stretch(number, with_loss, steps) for with_loss, steps in ((True, aligned), (False, phase.steps - aligned)) if steps]
    return found


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step in a stretch, data and record included, and `warm_up`: how much longer its first steps take in all.

    `samples` is the size of the batch that was timed. If that is less than the recipe's, the time was multiplied.
    """

    phase: int
    aligned: bool
    seconds: float
    warm_up: float
    samples: int


@dataclass(frozen=True)
class Repeated:
    """Seconds of something that a run does several times: the first time, when networks are loaded for it, and again."""

    first: float
    again: float


@dataclass(frozen=True)
class Timings:
    """The measured times of a recipe's parts on one machine, in seconds unless a name says otherwise.

    A checkpoint is copied while training waits, and then written beside it. What a recipe does not ask for, or what could not be
    measured, is None; `notes` says why. `picture` is the time of drawing one picture, `features` that of looking at one with the feature
    network of `microdit evaluate`. `memory_gb` is the peak of the process, as the run's record counts it.
    """

    date: str
    recipe: str
    start: float
    steps: tuple[StepTime, ...]
    checkpoint_copy: float
    checkpoint_write: float
    grid: Repeated | None
    held_out: Repeated | None
    quality: Repeated | None
    picture: float | None
    features: float | None
    pictures_encoded_per_second: float | None
    memory_gb: float | None
    notes: tuple[str, ...] = ()


def conditions(recipe: Recipe, shapes: Shapes, processes: int = 1) -> dict[str, Any]:
    """Return everything that has an effect on the times, as JSON values: machine, torch, the recipe without FREE, shapes of the data.

    Raises UserError if the recipe's device does not exist here.
    """
    device = choose_device(recipe.engine.device)
    sides: dict[str, float] = {}
    for share, height, width in shapes.sides:
        sides[f"{height} x {width}"] = sides.get(f"{height} x {width}", 0.0) + share
    return {
        "machine": f"{processor_name()}, {device_name(device)}",
        "processes": processes,
        "dtype": str(choose_dtype(recipe.engine.precision, device)).removeprefix("torch."),
        "torch": torch.__version__,
        "recipe": _what_matters(recipe),
        "stretches": [[item.phase, item.aligned] for item in stretches(recipe)],
        "latents": [shapes.latent_channels, {side: round(share, 2) for side, share in sorted(sides.items())}],
        "captions": [shapes.caption_tokens, shapes.caption_channels],
        "encoders": [shapes.autoencoder, shapes.text_encoder, shapes.feature_channels],
    }


def _what_matters(recipe: Recipe) -> dict[str, Any]:
    kept = _without(FREE[""], yaml.safe_load(recipe.to_yaml()))
    for key, free in FREE.items():
        item = kept.get(key)
        if isinstance(item, list):
            kept[key] = [_without(free, one) for one in item]
        elif isinstance(item, dict):
            kept[key] = _without(free, item)
    for key in ("resolution", "autoencoder", "text_encoder"):
        del kept["data"][key]  # stand among the shapes, where a recipe says none too
    kept["data"]["held_out"] = recipe.data.held_out is not None
    record = kept["record"]
    record["sample_prompts"] = len(recipe.record.sample_prompts)
    record["quality_every"] = recipe.record.quality_every is not None
    return kept


def _without(free: set[str], item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in free}


def timings_file(where: Mapping[str, Any]) -> Path:
    """Return the file of a measurement under these `conditions`."""
    digest = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()
    return timings_folder() / f"{digest[:32]}.json"


def timings_folder() -> Path:
    return cache_folder() / "timings"


def keep_timings(timings: Timings, where: Mapping[str, Any], file: Path) -> None:
    """Write a measurement. Raises UserError if the file cannot be written."""
    try:
        write_aside(file, to_checked_json({"format": FORMAT, "conditions": where, "timings": asdict(timings)}))
    except OSError as error:
        raise UserError(f"The measurement cannot be written to {file}: {error.strerror}. Make room, or name another place.") from error


def find_timings(recipe: Recipe, shapes: Shapes, assumed: Shapes, processes: int = 1) -> Timings | None:
    """Return the measurement of this recipe on this machine; None if there is none.

    `assumed` are the shapes that count if the measurement was made before the data was encoded. Raises UserError if the file is damaged,
    or was measured under other conditions.
    """
    for item in (shapes, assumed):
        try:
            where = conditions(recipe, item, processes)
        except UserError:
            return None  # of a recipe for a device that is not here, nothing was measured
        file = timings_file(where)
        if file.is_file():
            return read_timings(file, where)
    return None


def read_timings(file: Path, where: Mapping[str, Any]) -> Timings:
    """Read a measurement. Raises UserError unless its checksum, its conditions and every number in it are as they must be."""
    try:
        raw = file.read_bytes()
        if "checked_by" not in parse_json_object(raw):
            raise ValueError("it has no checksum")
        content = from_checked_json(raw)
        if content.get("format") != FORMAT:
            raise ValueError(f"its format is {content.get('format')}, not {FORMAT}")
        if content.get("conditions") != json.loads(json.dumps(where)):
            raise ValueError("it was made on another machine or for another recipe")
        return _parsed(content["timings"], where)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"The measurement {file} cannot be used: {one_line(str(error))}. Delete it, and measure again: microdit bench --recipe ..."
        ) from error


def _parsed(said: dict[str, Any], where: Mapping[str, Any]) -> Timings:
    """Raises ValueError, TypeError or KeyError for anything but what `keep_timings` writes."""
    if set(said) != {field.name for field in fields(Timings)}:
        raise ValueError("it holds other keys")
    steps = tuple(
        StepTime(int(item["phase"]), bool(item["aligned"]), _seconds(item["seconds"]), _seconds(item["warm_up"]), int(item["samples"]))
        for item in said["steps"]
    )
    if [[item.phase, item.aligned] for item in steps] != where["stretches"]:
        raise ValueError("it holds the steps of other phases")
    return Timings(
        date=str(said["date"]),
        recipe=str(said["recipe"]),
        start=_seconds(said["start"]),
        steps=steps,
        checkpoint_copy=_seconds(said["checkpoint_copy"]),
        checkpoint_write=_seconds(said["checkpoint_write"]),
        grid=_repeated(said["grid"]),
        held_out=_repeated(said["held_out"]),
        quality=_repeated(said["quality"]),
        picture=_figure(said["picture"]),
        features=_figure(said["features"]),
        pictures_encoded_per_second=_figure(said["pictures_encoded_per_second"]),
        memory_gb=_figure(said["memory_gb"]),
        notes=tuple(map(str, said["notes"])),
    )


def _repeated(said: dict[str, Any] | None) -> Repeated | None:
    return None if said is None else Repeated(_seconds(said["first"]), _seconds(said["again"]))


def _figure(said: Any) -> float | None:
    return None if said is None else _seconds(said)


def _seconds(value: Any) -> float:
    number = finite(value)
    if number is None or number < 0:
        raise ValueError(f"{value} is no time")
    return number
