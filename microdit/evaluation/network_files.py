"""Networks of transformers that judge pictures, from a folder or the hub, with all that can be wrong with it said in a sentence."""

from pathlib import Path
from typing import Any

import torch

from microdit.encoders.model_files import (
    find_folder,
    fingerprint_of,
    loading,
    read_json,
    refuse_incomplete,
    weight_files,
    weight_patterns,
)
from microdit.errors import UserError

_WEIGHTS = (("model", ".safetensors"), ("pytorch_model", ".bin"))  # transformers reads the second as tensors only


def load_network(place: str, model_types: tuple[str, ...], model_class: Any) -> tuple[Any, Path, str]:
    """The network in float32, the folder it came from, and the fingerprint of its weights and settings.

    Of a whole CLIP the half is taken that `model_class` is. Raises UserError if `place`, a folder or an id of the hub, holds a network of
    none of the `model_types`, or not all of it.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    folder = find_folder(place, ["*.json", "*.txt"])
    settings = read_json(folder / "config.json")
    model_type = settings.get("model_type")
    if model_type not in model_types:
        raise UserError(f"{folder / 'config.json'} says model_type {model_type}, where {' or '.join(model_types)} is needed.")
    files, ending = _find_weights(place, folder)
    with loading(folder):
        config = model_class.config_class.from_pretrained(folder, local_files_only=True)
        if model_type == "clip" and model_class.config_class.model_type != "clip":
            config.projection_dim = settings["projection_dim"]  # of the space that both halves share, which only the whole knows
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=ending == ".safetensors",
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # refused below, with the names
            output_loading_info=True,
        )
    refuse_incomplete(folder, [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    return model.eval().requires_grad_(False), folder, fingerprint_of([*files, *sorted(folder.glob("*config.json"))])


def load_beside(folder: Path, name: str, auto_class: Any) -> Any:
    """What comes with a network. Its file is looked for first: without it transformers may make up an empty one."""
    if not (folder / name).is_file():
        raise UserError(f"{folder} has no {name}: put it there, from where the model comes from.")
    with loading(folder / name):
        return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _find_weights(place: str, folder: Path) -> tuple[list[Path], str]:
    for stem, ending in _WEIGHTS:
        find_folder(place, weight_patterns(stem, ending))
        if files := weight_files(folder, stem, ending):
            return files, ending
    raise UserError(f"There are no weights in {folder}: neither model.safetensors nor pytorch_model.bin. Download the whole folder again.")
