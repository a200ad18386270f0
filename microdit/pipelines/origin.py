"""A trained model as the origin of another training: its architecture, objective and encoders, and the recipe lines that describe them.

An origin is a checkpoint of a run, or a pipeline's folder: an exported run, imported official weights, or the demo model.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import yaml

from microdit.checkpoint import Checkpoint, config_of_fields
from microdit.config.schema import DiffusionRecipe, ModelRecipe, architecture
from microdit.diffusion.edm import EDM
from microdit.diffusion.flow import Flow
from microdit.diffusion.objective import Objective
from microdit.errors import UserError
from microdit.io.files import read_json
from microdit.io.strict_yaml import parse_yaml, read_as
from microdit.models.config import SIZES, Size
from microdit.models.microdit import ModelConfig
from microdit.pipelines.export import read_record
from microdit.pipelines.pipeline import DEMO, INDEX, newest_checkpoint
from microdit.pipelines.sampling import recorded_objective
from microdit.reports.run_folder import is_run

AGAIN = "export or import it again"
_WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors")
_ROUNDED_TO = (256, 128, 64, 32, 16, 8, 4)  # values of model.round_ffn_to to try
_EVERY = (2, 1, 3, 4)  # and of model.experts_every

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """A trained model in the folder `place`.

    `model` is the part `model:` of a recipe for its architecture; None if no recipe describes it. `encoders` holds, for autoencoder and
    text_encoder, as much as is known: a name, and a fingerprint of the weights.
    """

    place: Path
    config: ModelConfig
    objective: Objective
    model: ModelRecipe | None
    encoders: Mapping[str, Mapping[str, Any]]


def pipeline_place(init_from: str, places: list[Path]) -> Path | None:
    """Return the first of `places` that is a pipeline's folder; for "demo", if there is no such place, the model of this package."""
    found = next((place for place in places if (place / INDEX).is_file()), None)
    return DEMO if found is None and init_from == "demo" and not any(place.exists() for place in places) else found


def find_origin(place: str) -> Origin:
    """Return the origin at `place`: a pipeline's folder, "demo", or a run's newest intact checkpoint. Raises UserError if there is none."""
    folder = Path(place)
    if pipeline := pipeline_place(place, [folder]):
        return origin_of_pipeline(pipeline)
    if not is_run(folder):
        raise UserError(f"{place} is neither a run nor an exported or imported model, so no recipe can start from it.")
    return origin_of_checkpoint(newest_checkpoint(folder, log.warning))


def diffusion_of(objective: Objective) -> DiffusionRecipe:
    """Return the part `diffusion:` of a recipe with this objective."""
    known = {one.name for one in fields(DiffusionRecipe)}
    values = {key: value for key, value in asdict(cast("Any", objective)).items() if key in known}
    return DiffusionRecipe(**values, objective="edm" if isinstance(objective, EDM) else "flow")


def origin_of_checkpoint(checkpoint: Checkpoint) -> Origin:
    """Return what a checkpoint records of itself."""
    state, config = checkpoint.state, checkpoint.model_config
    model = _recorded_model(state.get("recipe"), config) or describing_recipe(config)
    return Origin(checkpoint.folder, config, recorded_objective(state), model, state["data"])


def origin_of_pipeline(folder: Path) -> Origin:
    """Return what a pipeline's folder says of its denoiser. Raises UserError if that is damaged."""
    record = read_record(folder)
    saved = read_json(folder / "transformer" / "config.json", AGAIN)
    names = {one.name for one in fields(ModelConfig)}
    try:
        config = config_of_fields({key: value for key, value in saved.items() if key in names})
        objective = _saved_objective(read_json(folder / "scheduler" / "scheduler_config.json", AGAIN))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is damaged ({error}): {AGAIN}.") from error
    model = _recorded_model(record.get("recipe"), config) or describing_recipe(config)
    return Origin(folder, config, objective, model, _recorded_encoders(record))


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the denoiser's weights: one, or the parts of one. Raises UserError if there is none."""
    found = sorted(path for path in (folder / "transformer").glob("*.safetensors") if _WEIGHTS.fullmatch(path.name))
    if not found:
        raise UserError(f"{folder}/transformer holds no weights (diffusion_pytorch_model.safetensors): {AGAIN}.")
    return found


def describing_recipe(config: ModelConfig) -> ModelRecipe | None:
    """Return the part `model:` of a recipe that has this architecture; None if there is none, or its ratios are unusual."""
    experts = max((shape.num_experts for shape in config.blocks), default=0)
    numbers = (config.dim, len(config.blocks), config.head_dim, config.mixer_dim, len(config.mixer))
    sizes = [size for size in SIZES.values() if size.dim == config.dim] + [
        Size(*numbers, num_experts=experts, experts_every=every, round_ffn_to=rounded_to) for rounded_to in _ROUNDED_TO for every in _EVERY
    ]
    for size in sizes:
        values = {one.name: getattr(size, one.name) for one in fields(size)} | {"routing": config.routing}
        kept = {name: getattr(config, name) for name in ("patch_size", "expert_capacity", "bias", "position_scale")}
        model = ModelRecipe(**values, **kept)
        if _is(model, config):
            return model
    return None


def _recorded_model(recipe: Any, config: ModelConfig) -> ModelRecipe | None:
    """Return the part `model:` of the recorded recipe; None if it is of another version, or of another architecture."""
    try:
        model: ModelRecipe = read_as(ModelRecipe, parse_yaml(yaml.safe_dump(recipe["model"]), "model"), "model")
    except (UserError, TypeError, KeyError):
        return None
    return model if _is(model, config) else None


def _is(model: ModelRecipe, config: ModelConfig) -> bool:
    try:
        return architecture(model, config.in_channels, config.caption_channels) == config
    except ValueError:  # a routing that the other settings contradict
        return False


def _saved_objective(saved: Mapping[str, Any]) -> Objective:
    kinds: dict[str, Any] = {"EDMSettings": EDM, "FlowSettings": Flow}
    objective: Objective = kinds[saved["_class_name"]](**{key: value for key, value in saved.items() if not key.startswith("_")})
    return objective


def _recorded_encoders(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the encoders that an export records with fingerprints, or an import by name."""
    data = record.get("data") if isinstance(record.get("data"), dict) else record
    assert isinstance(data, Mapping)
    found = {key: data.get(key) for key in ("autoencoder", "text_encoder")}
    return {key: value if isinstance(value, dict) else {"name": value} for key, value in found.items() if value}
