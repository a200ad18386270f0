"""What a pipeline's model_index.json may name. Diffusers would import whatever is written there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from microdit.encoders.model_files import refuse_incomplete, weight_files
from microdit.errors import UserError

PIPELINE = "MicroDiTPipeline"
_TEXT_MODELS = ("BertModel", "CLIPTextModel", "MT5EncoderModel", "T5EncoderModel", "UMT5EncoderModel")
_COMPONENTS: dict[str, set[tuple[str, str]]] = {
    "transformer": {("microdit.hub.transformer", "MicroDiTTransformer2DModel")},
    "scheduler": {("microdit.hub.scheduler", "EDMSettings")},
    "vae": {
        *(("diffusers", name) for name in ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")),
        ("microdit.hub.references", "ReferencedAutoencoder"),
    },
    "text_encoder": {*(("transformers", name) for name in _TEXT_MODELS), ("microdit.hub.references", "ReferencedTextEncoder")},
}


def refuse_strange_components(model_index: Mapping[str, Any], place: str) -> None:
    """Raises UserError if it is another pipeline's, or names classes that are no components of ours."""
    if model_index.get("_class_name") != PIPELINE:
        raise UserError(f"{place} holds a {model_index.get('_class_name')}, not a {PIPELINE}: load it with diffusers' own class.")
    for name, value in model_index.items():
        if isinstance(value, list | tuple) and not _is_component(name, value):
            raise UserError(f"{place} is refused: its model_index.json names {value} as its {name}, which is no component of {PIPELINE}.")


def refuse_incomplete_autoencoder(folder: Path, model: Any) -> None:
    """Raises UserError if the folder that `model` was loaded from lacks some of its weights: diffusers goes on with random ones."""
    found: set[str] = set()
    for path in weight_files(folder, "diffusion_pytorch_model", ".safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    refuse_incomplete(folder, [name for name in model.state_dict() if name not in found])


def _is_component(name: str, value: list[Any] | tuple[Any, ...]) -> bool:
    if len(value) != 2 or name.startswith("_"):
        return False
    library, class_name = value
    if library is None:
        return name not in ("transformer", "scheduler")
    if name == "tokenizer":
        return library == "transformers" and isinstance(class_name, str) and "Tokenizer" in class_name
    return (library, class_name) in _COMPONENTS.get(name, ())
