"""What a run has been found to be: its measured figures, its size and what it cost, from the files in its folder.

evaluation/metrics.json  metrics.json (emoji)  checkpoints/*/state.json  status.json  run.json, and GenEval's summary.json wherever it lies.
What is missing is None; what is there and makes no sense raises UserError with the file and the key.
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
    """One figure and how it came about. `reference` names the pictures that were compared with, `side` is their pixels."""

    value: float
    network: str | None = None
    reference: str | None = None
    reference_pictures: int | None = None
    pictures: int | None = None  # drawn
    side: int | None = None


@dataclass(frozen=True)
class GenEvalResult:
    """Shares of right pictures by task, and `overall`; pictures by task; how many prompts there were, and how many had no picture."""

    shares: dict[str, float]
    pictures: dict[str, int]
    prompts: int
    without_pictures: int
    judges: str


@dataclass(frozen=True, kw_only=True)
class RunResult(Training):
    """`metrics` by name."""

    path: Path
    metrics: dict[str, Measured]
    geneval: GenEvalResult | None = None
    recognised: float | None = None  # share of captions whose picture is among the ten nearest, on emoji


def read_run(path: Path, geneval: Path | None = None) -> RunResult:
    """Of a run folder; `geneval` is the folder that `microdit geneval --out` wrote. Raises UserError."""
    if not is_run(path):
        raise UserError(f"{path} is no run folder: it holds no recipe.yaml. Name one that microdit train has made.")
    run, evaluation, emoji = RunFolder(path), _Entry.of(path / "evaluation" / "metrics.json"), _Entry.of(path / "metrics.json")
    parameters, state = _checkpoint(path)
    hours = finite(run.status.get("gpu_hours"))
    starts = run.starts
    return RunResult(
        path=path,
        metrics=_metrics(evaluation),
        geneval=None if geneval is None else _geneval(geneval / "summary.json"),
        recognised=emoji.below("retrieval").number("top_10"),
        parameters=parameters,
        images=_images(state.below("sets")),
        seen=evaluation.count("images_seen") or state.count("images_seen"),
        gpu_days=None if hours is None else hours / 24,
        gpu=starts[-1].get("device") if starts else None,
        dollars=finite(run.status.get("dollars")),
    )


def _metrics(evaluation: "_Entry") -> dict[str, Measured]:
    reference, pictures, found = evaluation.below("reference"), evaluation.count("pictures"), {}
    source = reference.text("source")
    for name in evaluation.below("metrics").values:
        entry = evaluation.below("metrics").below(name)
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
        raise UserError(f"There is no {path}: name the folder that microdit geneval --out has written.")
    summary = _Entry.of(path)
    tasks, pictures = summary.below("tasks"), summary.below("pictures_of_tasks")
    shares = {"overall": summary.number("overall"), **{task: tasks.number(task) for task in TASKS}}
    return GenEvalResult(
        shares={name: share for name, share in shares.items() if share is not None},
        pictures={task: pictures.count(task) or 0 for task in TASKS},
        prompts=summary.count("prompts") or 0,
        without_pictures=summary.count("prompts_without_pictures") or 0,
        judges=summary.text("judges") or "",
    )


def _checkpoint(path: Path) -> "tuple[int | None, _Entry]":
    """(parameters, state) of the newest checkpoint."""
    folders = checkpoint_folders(path)
    if not folders:
        return None, _Entry(path, {})
    checkpoint = open_checkpoint(folders[0])
    with torch.device("meta"):
        model = MicroDiT(checkpoint.model_config)
    return sum(weight.numel() for weight in model.parameters()), _Entry(checkpoint.folder / "state.json", checkpoint.state)


def _images(sets: "_Entry") -> int | None:
    return sum(sets.below(name).count("rows") or 0 for name in sets.values) or None


@dataclass(frozen=True)
class _Entry:
    """An object of a JSON file; what is missing or null is None, what is of the wrong kind raises UserError."""

    path: Path
    values: dict[str, Any]
    prefix: str = ""

    @classmethod
    def of(cls, path: Path) -> "_Entry":
        """Empty if there is no such file."""
        if not path.is_file():
            return cls(path, {})
        return cls(path, read_json(path, "Evaluate again."))

    def below(self, key: str) -> "_Entry":
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return _Entry(self.path, value or {}, f"{self.prefix}{key}.")

    def number(self, key: str) -> float | None:
        value = self.values.get(key)
        if value is not None and finite(value) is None:
            raise self._wrong(key, "a finite number")
        return finite(value)

    def count(self, key: str) -> int | None:
        value = self.values.get(key)
        if value is not None and (type(value) is not int or value < 0):
            raise self._wrong(key, "a whole number from 0")
        return value

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def _wrong(self, key: str, wanted: str) -> UserError:
        return UserError(f"{self.path}: {self.prefix}{key} is {self.values[key]!r}, and {wanted} is expected. Evaluate again.")
