"""A run's metrics, size and training cost, read from its folder.

The files are evaluation/metrics.json, metrics.json (emoji), checkpoints/*/state.json, status.json and run.json; the summary.json
of GenEval and of DPG-Bench are in folders of their own. Missing values are None; invalid ones raise UserError naming the file and the key.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from microdit.checkpoint import checkpoint_folders, open_checkpoint
from microdit.errors import UserError
from microdit.evaluation.geneval.rules import TASKS
from microdit.evaluation.published import Training
from microdit.io.files import read_json
from microdit.models.microdit import MicroDiT
from microdit.reports.formats import finite
from microdit.reports.run_folder import RunFolder, is_run


@dataclass(frozen=True)
class Measured:
    """The value of a metric and how it was measured, against images of the set `reference` at `side` pixels."""

    value: float
    network: str | None = None
    reference: str | None = None
    reference_pictures: int | None = None
    pictures: int | None = None  # number of generated images
    side: int | None = None


@dataclass(frozen=True)
class GenEvalResult:
    """Shares of correct images by task and `overall`, numbers of images by task, of prompts, and of prompts without images."""

    shares: dict[str, float]
    pictures: dict[str, int]
    prompts: int
    without_pictures: int
    judges: str
    rewritten_by: str | None = None  # the language model that rewrote the prompts


@dataclass(frozen=True)
class DPGResult:
    """DPG-Bench's score in percent, the number of prompts, and the model that answered the questions."""

    score: float
    prompts: int
    judge: str


@dataclass(frozen=True, kw_only=True)
class RunResult(Training):
    """A run's training cost and metrics, by name."""

    path: Path
    metrics: dict[str, Measured]
    geneval: GenEvalResult | None = None
    dpg: DPGResult | None = None
    recognised: float | None = None  # top-10 retrieval on emoji, see evaluation/recognition.py


def read_run(path: Path, geneval: Path | None = None, dpg: Path | None = None) -> RunResult:
    """Read a run folder, and the results in the folders of `microdit geneval --out` and `microdit dpg --out` if given.

    Raises UserError if `path` is not a run folder, or a file is invalid.
    """
    if not is_run(path):
        raise UserError(f"{path} is not a run folder: it has no recipe.yaml. Name one that microdit train has written.")
    run, evaluation, emoji = (
        RunFolder(path),
        _JsonObject.read(path / "evaluation" / "metrics.json"),
        _JsonObject.read(path / "metrics.json"),
    )
    parameters, state = _checkpoint(path)
    hours = finite(run.status.get("gpu_hours"))
    starts = run.starts
    return RunResult(
        path=path,
        metrics=_metrics(evaluation),
        geneval=None if geneval is None else _geneval(geneval / "summary.json"),
        dpg=None if dpg is None else _dpg(dpg / "summary.json"),
        recognised=emoji.child("retrieval").number("top_10"),
        parameters=parameters,
        images=_images(state.child("sets")),
        seen=evaluation.count("images_seen") or state.count("images_seen"),
        gpu_days=None if hours is None else hours / 24,
        gpu=starts[-1].get("device") if starts else None,
        dollars=finite(run.status.get("dollars")),
    )


def _metrics(evaluation: "_JsonObject") -> dict[str, Measured]:
    reference, pictures, found = evaluation.child("reference"), evaluation.count("pictures"), {}
    source = reference.text("source")
    for name in evaluation.child("metrics").values:
        entry = evaluation.child("metrics").child(name)
        value = entry.number("value")
        if value is not None:
            found[name] = Measured(
                value=value,
                network=entry.text("network"),
                reference=source and source.partition(":")[0],
                reference_pictures=reference.count("pictures"),
                pictures=pictures,
                side=reference.count("side"),
            )
    return found


def _geneval(path: Path) -> GenEvalResult:
    if not path.is_file():
        raise UserError(f"There is no {path}: name the folder that microdit geneval --out wrote.")
    summary = _JsonObject.read(path)
    tasks, pictures = summary.child("tasks"), summary.child("pictures_of_tasks")
    shares = {"overall": summary.number("overall"), **{task: tasks.number(task) for task in TASKS}}
    return GenEvalResult(
        shares={name: share for name, share in shares.items() if share is not None},
        pictures={task: pictures.count(task) or 0 for task in TASKS},
        prompts=summary.count("prompts") or 0,
        without_pictures=summary.count("prompts_without_pictures") or 0,
        judges=summary.text("judges") or "",
        rewritten_by=summary.text("prompts_rewritten_by"),
    )


def _dpg(path: Path) -> DPGResult:
    if not path.is_file():
        raise UserError(f"There is no {path}: name the folder that microdit dpg --out wrote.")
    summary = _JsonObject.read(path)
    score = summary.number("score")
    if score is None:
        raise UserError(f"{path}: score is missing. Run microdit dpg again.")
    return DPGResult(score, summary.count("prompts") or 0, summary.text("judge") or "an unknown model")


def _checkpoint(path: Path) -> "tuple[int | None, _JsonObject]":
    """Return the number of parameters and the state of the newest checkpoint."""
    folders = checkpoint_folders(path)
    if not folders:
        return None, _JsonObject(path, {})
    checkpoint = open_checkpoint(folders[0])
    with torch.device("meta"):
        model = MicroDiT(checkpoint.model_config)
    return sum(weight.numel() for weight in model.parameters()), _JsonObject(checkpoint.folder / "state.json", checkpoint.state)


def _images(sets: "_JsonObject") -> int | None:
    return sum(sets.child(name).count("rows") or 0 for name in sets.values) or None


@dataclass(frozen=True)
class _JsonObject:
    """An object of a JSON file. Missing and null values are None; values of the wrong type raise UserError."""

    path: Path
    values: dict[str, Any]
    prefix: str = ""

    @classmethod
    def read(cls, path: Path) -> "_JsonObject":
        """Read a file; a missing one is an empty object."""
        if not path.is_file():
            return cls(path, {})
        return cls(path, read_json(path, "Evaluate again."))

    def child(self, key: str) -> "_JsonObject":
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return _JsonObject(self.path, value or {}, f"{self.prefix}{key}.")

    def number(self, key: str) -> float | None:
        value = self.values.get(key)
        if value is not None and finite(value) is None:
            raise self._wrong(key, "a finite number")
        return finite(value)

    def count(self, key: str) -> int | None:
        value = self.values.get(key)
        if value is not None and (type(value) is not int or value < 0):
            raise self._wrong(key, "an integer of at least 0")
        return value

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def _wrong(self, key: str, expected: str) -> UserError:
        return UserError(f"{self.path}: {self.prefix}{key} is {self.values[key]!r}, but should be {expected}. Evaluate again.")
