"""Checkpoints of other programs, read as tensors by their names: PyTorch's .pt, safetensors, and Flax's msgpack. Nothing in them is run.

A .pt is a pickle: it is read as bare tensors, numbers and containers, and refused if it holds anything that could run.
"""

import re
import zipfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from microdit.encoders.model_files import loading
from microdit.errors import UserError
from microdit.io.flax_msgpack import read_flax

_rebuild_array = np.empty(0).__reduce__()[0]
# What a trainer's state holds beside tensors: times, and the state of numpy's generator. None of them runs anything.
_HARMLESS: list[Any] = [
    timedelta,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    _rebuild_array,
    (_rebuild_array, "numpy.core.multiarray._reconstruct"),  # as numpy 1 called it
]
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors by their path through nested dictionaries, as `state.model.dit.blocks.0...`.

    The words that compiled and wrapped modules put into the names are removed. Raises UserError if there is no file, or if it is damaged,
    something else, or could run code.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, and a checkpoint is one file (.safetensors, .pt or .msgpack): name the file in it.")
    if not path.is_file():
        raise UserError(f"There is no checkpoint at {path}.")
    return {_WRAPPERS.sub("", name): tensor for name, tensor in _flat(_read(path), "")}


def in_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with floating-point numbers as float32."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def copied(name: str, load: Callable[[str], Any]) -> Any:
    """Load the encoder if `name` is a folder, which is then copied; None if it stays a name, which may be one on the hub."""
    return load(name) if Path(name).is_dir() else None


def check_fits(kind: str, encoder: Any, channels: int) -> None:
    """Raise UserError if the encoder, where there is one, has other channels than the model wants."""
    if encoder is not None and encoder.channels != channels:
        raise UserError(f"The {kind} {encoder.name} has {encoder.channels} channels, and the checkpoint's model wants {channels}.")


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        with loading(path):
            return load_file(path)
    if path.suffix == ".msgpack":
        return read_flax(path)
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no checkpoint as torch has written them since 2020, or it is cut off: download it again.")
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a strange file leads to is not foreseeable
        strange = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it holds {strange[1]}, which could run code" if strange else "it is damaged, or holds more than tensors"
        raise UserError(f"{path} is refused: {why}; nothing in it was run.") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not weights by name: it is no checkpoint of a network.")
    return content


def _flat(content: Mapping[str, Any], prefix: str) -> list[tuple[str, Tensor]]:
    """Name tensors by their path through nested dictionaries."""
    found: list[tuple[str, Tensor]] = []
    for key, value in content.items():
        if isinstance(value, Tensor):
            found.append((f"{prefix}{key}", value))
        elif isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
    return found
