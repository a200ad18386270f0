"""A model by its place: a run folder, a pipeline's folder, or an id of the hub, all to draw with in the same way."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging

from microdit.checkpoint import Checkpoint, default_weights
from microdit.encoders.model_files import find_folder, is_place, lasting_name, loading, read_json
from microdit.errors import UserError
from microdit.hub.components import PIPELINE
from microdit.hub.conversion import from_diffusers
from microdit.hub.folders import read_record
from microdit.hub.pipeline import MicroDiTPipeline
from microdit.memory import keep_freed_memory
from microdit.pipeline import Pipeline
from microdit.run_folder import is_run

INDEX = "model_index.json"
_COSTS = ("images_seen", "gpu_hours", "dollars")


@dataclass(frozen=True)
class OpenedModel:
    """`about`: where it comes from, how many steps it was trained for and what that cost, as far as known. `resolution` in pixels.

    `weights_file`: the denoiser's weights, if they lie in one file on this disk.
    """

    pipeline: Pipeline
    about: dict[str, Any]
    resolution: int
    weights_file: Path | None

    @property
    def name(self) -> str:
        """For people."""
        place = Path(self.about.get("run") or self.about["pipeline"]).name
        return f"{place}, step {self.about['step']:,}" if "step" in self.about else place


def open_model(place: str, warn: Callable[[str], None], weights: str | None = None) -> OpenedModel:
    """`weights` chooses among those of a run. Raises UserError for what is no model, is damaged, or could run code."""
    keep_freed_memory()  # drawing, too, takes and frees the same memory again and again
    folder = Path(place)
    if is_run(folder) or (folder.exists() and not (folder / INDEX).is_file()):
        return opened_run(folder, *Pipeline.from_run(folder, warn, weights), weights)
    if weights is not None:
        raise UserError(f"--weights {weights} chooses among the weights of a run, and {place} is a pipeline with one set: leave it out.")
    diffusers_logging.disable_progress_bar()
    with loading(Path(place)):
        pipeline = from_diffusers(MicroDiTPipeline.from_pretrained(place))
    record = read_record(folder)
    known = {key: record[key] for key in ("step", *_COSTS) if record.get(key) is not None}
    resolution = min(pipeline.latent_shape[1:]) * pipeline.autoencoder.downsampling
    files = list((folder / "transformer").glob("*.safetensors"))
    about = {"pipeline": lasting_name(place), "class": PIPELINE, **known}
    return OpenedModel(pipeline, about, resolution, files[0] if len(files) == 1 else None)


def is_our_pipeline(place: str) -> bool:
    """Whether a folder, or what the hub has under that id, is a `MicroDiTPipeline`. Raises UserError if the hub does not answer."""
    folder = Path(place)
    if not folder.exists():
        if not is_place(place):
            return False
        folder = find_folder(place, [INDEX])
    return (folder / INDEX).is_file() and read_json(folder / INDEX).get("_class_name") == PIPELINE


def opened_run(run: Path, pipeline: Pipeline, checkpoint: Checkpoint, weights: str | None = None) -> OpenedModel:
    """A run, with the pipeline that was made of one of its checkpoints."""
    state = checkpoint.state
    costs = {key: state[key] for key in _COSTS if state.get(key) is not None}
    file = checkpoint.folder / f"{weights or default_weights(checkpoint)}.safetensors"
    about = {"run": str(run), "step": checkpoint.step, **costs}
    return OpenedModel(pipeline, about, state["data"]["resolution"], file if file.is_file() else None)
