"""Checkpoints: folders of safetensors that are either whole or not there.

    checkpoints/step-00000500/  model.safetensors  ema.safetensors  optimizer.safetensors  state.json

A checkpoint is written beside its place and renamed once it is on the disk. `state.json` holds the checksums of the rest, and all
that is needed to make pictures: architecture, noise settings, which encoders, which latents.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from microdit.errors import UserError
from microdit.files import sha256_of, write_aside
from microdit.model.blocks import BlockShape
from microdit.model.microdit import ModelConfig

STATE = "state.json"
FOLDER = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole. `state` is the content of state.json."""

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    @property
    def model_config(self) -> ModelConfig:
        fields = dict(self.state["model"])
        for stack in ("blocks", "mixer"):
            fields[stack] = tuple(BlockShape(**shape) for shape in fields[stack])
        return ModelConfig(**fields)


def save_checkpoint(run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int) -> Path:
    """Write `tensors` (file stem -> name -> tensor) and `state` as the run's checkpoint of `step`; keep the newest `keep`.

    Raises UserError if the disk refuses; then nothing is left behind and the older checkpoints are untouched.
    """
    target = run / FOLDER / f"step-{step:08d}"
    aside = target.with_name(f".{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        files = {}
        for name, content in tensors.items():
            path = aside / f"{name}.safetensors"
            save_file({key: tensor.contiguous() for key, tensor in content.items()}, path)
            _flush(path)
            files[path.name] = sha256_of(path)
        write_aside(aside / STATE, json.dumps({"step": step, "files": files, **state}, indent=1).encode())
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"The checkpoint of step {step} could not be written to {run / FOLDER}: {error}. "
            "Earlier checkpoints are intact: make room on the disk and run again with --resume."
        ) from error
    for old in _folders(run)[keep:]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint. Damaged ones are passed over, each with a sentence to `warn`; None if there is none.

    Raises UserError if there are checkpoints and all are damaged: starting anew silently would lose a run.
    """
    folders = _folders(run)
    for folder in folders:
        try:
            return _open(folder)
        except UserError as error:
            warn(str(error))
    if folders:
        raise UserError(f"Every checkpoint in {run / FOLDER} is damaged. Delete the folder to start anew.")
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as `{parameter name}/{key}` -> tensor."""
    return {f"{name}/{key}": value for name, weight in model.named_parameters() for key, value in optimizer.state.get(weight, {}).items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    weights = dict(model.named_parameters())
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        optimizer.state[weights[name]][key] = value


def refuse_other_architecture(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raises UserError naming what differs between the checkpoint's model and the recipe's."""
    saved, wanted = asdict(checkpoint.model_config), asdict(config)
    different = [
        f"{key}: {_short(saved[key])} in the checkpoint, {_short(wanted[key])} in the recipe" for key in wanted if saved[key] != wanted[key]
    ]
    if different:
        raise UserError(
            f"{checkpoint.folder} is of another architecture than the recipe asks for:\n  - "
            + "\n  - ".join(different)
            + "\nGo back to the recipe that made it, or start a new run with another --out."
        )


def _open(folder: Path) -> Checkpoint:
    try:
        state = json.loads((folder / STATE).read_text())
        damaged = [name for name, checksum in state["files"].items() if sha256_of(folder / name) != checksum]
        if damaged:
            raise UserError(f"{folder} is damaged ({', '.join(damaged)} is not what was written).")
        return Checkpoint(folder, state["step"], state)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is damaged ({error}).") from error


def _folders(run: Path) -> list[Path]:
    """Newest first."""
    folder = run / FOLDER
    found = [p for p in folder.iterdir() if re.fullmatch(r"step-\d{8}", p.name)] if folder.is_dir() else []
    return sorted(found, reverse=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
