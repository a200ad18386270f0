"""Open a model by its place, which is a run folder, an exported folder or an id of the hub, with what is known of it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging

from microdit.checkpoint import Checkpoint, default_weights
from microdit.encoders.captions import clean_caption
from microdit.encoders.model_files import DOWNLOAD_AGAIN, find_folder, is_place, lasting_name
from microdit.errors import UserError
from microdit.io.files import read_json
from microdit.io.near_names import did_you_mean_path
from microdit.io.places import is_remote
from microdit.pipelines.components import PIPELINE
from microdit.pipelines.export import read_record
from microdit.pipelines.pipeline import DEMO, INDEX, MicroDiTPipeline, check_no_weights, is_run_folder, newest_checkpoint
from microdit.process_limits import keep_freed_memory
from microdit.reports.remote_run import fetched_weights

_COSTS = ("images_seen", "gpu_hours", "dollars")


@dataclass(frozen=True)
class OpenedModel:
    """A pipeline, and where it comes from.

    `about` holds its place, the steps that it was trained for and what they cost, as far as known. `resolution` is in pixels.
    `weights_file` holds the denoiser's weights, if they lie in one file on this disk. `sample_prompts` were drawn during training.
    """

    pipeline: MicroDiTPipeline
    about: dict[str, Any]
    resolution: int
    weights_file: Path | None
    sample_prompts: list[str]

    @property
    def name(self) -> str:
        """A name for people to read."""
        place = Path(self.about.get("run") or self.about["pipeline"]).name
        return f"{place}, step {self.about['step']:,}" if "step" in self.about else place


def open_model(place: str, warn: Callable[[str], None], weights: str | None = None) -> OpenedModel:
    """Open a model; `weights` chooses among those of a run, which may be in an object store.

    Raises UserError for what is no model, is damaged, or could run code.
    """
    keep_freed_memory()  # sampling, too, takes and frees the same memory again and again
    folder = fetched_weights(place, warn, weights)
    if is_run_folder(folder):
        checkpoint = newest_checkpoint(folder, warn, weights)
        return opened_run(folder, MicroDiTPipeline.from_checkpoint(checkpoint, weights), checkpoint, weights)
    check_no_weights(place, weights)
    diffusers_logging.disable_progress_bar()
    try:
        pipeline = MicroDiTPipeline.from_pretrained(folder if folder.exists() else place)
    except UserError as error:
        if folder.exists() or not (near := did_you_mean_path(place)):
            raise
        raise UserError(f"There is no folder {place}.{near} As the name of a model on the hub: {error}") from error
    record = read_record(folder)
    known = {key: record[key] for key in ("step", *_COSTS) if record.get(key) is not None}
    resolution = min(pipeline.latent_shape[1:]) * pipeline.config.vae_scale_factor
    files = list((folder / "transformer").glob("*.safetensors"))
    about = {"pipeline": lasting_name(place), "class": PIPELINE, **known}
    return OpenedModel(pipeline, about, resolution, files[0] if len(files) == 1 else None, _sample_prompts(record.get("recipe")))


def opened_run(run: Path, pipeline: MicroDiTPipeline, checkpoint: Checkpoint, weights: str | None = None) -> OpenedModel:
    """Describe a run whose pipeline was built of one of its checkpoints."""
    state = checkpoint.state
    costs = {key: state[key] for key in _COSTS if state.get(key) is not None}
    file = checkpoint.folder / f"{weights or default_weights(checkpoint)}.safetensors"
    about = {"run": str(run), "step": checkpoint.step, **costs}
    return OpenedModel(pipeline, about, state["data"]["resolution"], file if file.is_file() else None, _sample_prompts(state.get("recipe")))


def is_our_pipeline(place: str) -> bool:
    """Return whether a folder or hub id holds a `MicroDiTPipeline`. Raises UserError if the hub does not respond."""
    folder = Path(place)
    if not folder.exists():
        if not is_place(place):
            return False
        folder = find_folder(place, [INDEX])
    return (folder / INDEX).is_file() and read_json(folder / INDEX, DOWNLOAD_AGAIN).get("_class_name") == PIPELINE


def model_and_prompts(arguments: list[str], demo: Path = DEMO) -> tuple[str, list[str]]:
    """Return the model's place and the prompts. A first argument that is a folder is the model; else all are prompts for the demo model.

    Raises UserError for a first argument that looks like a path and is none, and if there is no demo model.
    """
    if arguments and (
        is_remote(arguments[0]) or os.path.isdir(arguments[0])
    ):  # not Path.is_dir: "" is no folder, and what is too long for a name is none
        return arguments[0], arguments[1:]
    if arguments and _looks_like_a_path(arguments[0]):
        raise UserError(
            f"There is no folder {arguments[0]}.{did_you_mean_path(arguments[0])} Name a run or an exported model first, then the prompts "
            "('microdit train RECIPE --out FOLDER' makes one); or prompts alone, for the demo model (a prompt with a slash needs "
            "a space, too)."
        )
    if not demo.is_dir():
        raise UserError(
            'This installation holds no demo model: name a model first, as in microdit sample runs/emoji "red heart"; `microdit train` '
            "makes one."
        )
    return str(demo), arguments


def _sample_prompts(recipe: Any) -> list[str]:
    """Return the prompts in a recipe that a run or an exported folder holds; none if there are none, or it is damaged."""
    record = recipe.get("record") if isinstance(recipe, dict) else None
    prompts = record.get("sample_prompts") if isinstance(record, dict) else None
    found = [clean_caption(prompt) for prompt in prompts if isinstance(prompt, str)] if isinstance(prompts, list) else []
    return [prompt for prompt in found if prompt]


def _looks_like_a_path(text: str) -> bool:
    """Prompts may hold a slash, as in "a black/white cat"; paths rarely hold a space, and then begin like this."""
    separated = any(separator in text for separator in {"/", os.sep})
    return (
        text.startswith(("runs/", "./", "../", "/", "~")) or text in (".", "..") or (separated and " " not in text) or os.path.exists(text)
    )
