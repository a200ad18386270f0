"""The record of a run in its folder: recipe, versions, data, metrics, status, cost. Only the first process writes it.

A full disk does not stop training: what could not be written is kept and retried, with one warning.
"""

import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

import microdit
from microdit.config.schema import Recipe
from microdit.errors import UserError, optional_package
from microdit.io.files import keep_damaged, to_checked_json, write_aside
from microdit.io.untrusted_text import command_line
from microdit.reports.formats import finite
from microdit.reports.run_folder import METRICS, RUN, RunFolder, parse_metrics


@dataclass
class Cost:
    """GPU-hours (on a machine without GPUs: hours of processes) and dollars, counted on from those of earlier starts of the run.

    `price_per_hour` is that of one GPU. Work that was lost with a machine stays in the sum: it was paid. `seconds` is the wall-clock time
    by part of the work (planning/bill.py names them), without such lost work.
    """

    processes: int
    price_per_hour: float | None = None
    earlier_hours: float = 0.0
    earlier_dollars: float = 0.0
    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lap = self.started

    def lap(self, part: str) -> None:
        """Book the time since the last call under `part`."""
        now = time.monotonic()
        self.add(part, now - self._lap)
        self._lap = now

    def add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def gpu_hours(self) -> float:
        return self.earlier_hours + self._hours()

    def dollars(self) -> float | None:
        """Return the dollars so far, None if no price was ever given."""
        if self.price_per_hour is None:
            return self.earlier_dollars or None
        return self.earlier_dollars + self._hours() * self.price_per_hour

    def so_far(self) -> dict[str, Any]:
        """Return the cost as fields of a record."""
        return {"gpu_hours": self.gpu_hours(), "dollars": self.dollars(), "seconds": dict(self.seconds)}

    def to_go(self, seconds: float) -> float | None:
        """Dollars for `seconds` more."""
        return None if self.price_per_hour is None else seconds * self.processes * self.price_per_hour / 3600

    def _hours(self) -> float:
        return (time.monotonic() - self.started) * self.processes / 3600


STATUS = "status.json"


class RunRecord:
    """Opens the folder's files. `forget_after` drops metrics of steps that will be done again."""

    def __init__(self, run: Path, recipe: Recipe, warn: Callable[[str], None], forget_after: int):
        self.run, self.recipe, self.warn = run, recipe, warn
        self._pending: list[str] = []
        self._told = False
        with _written(run):
            run.mkdir(parents=True, exist_ok=True)
            _forget_after(run / METRICS, forget_after, warn)
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=forget_after)
        self._wandb = _start_wandb(recipe, run) if recipe.record.wandb_project else None

    def started(self, data: dict[str, Any], start: dict[str, Any]) -> None:
        """Note one more start of the run in run.json, and the recipe that it follows."""
        path, before = self.run / RUN, RunFolder(self.run).starts
        if path.is_file() and not before:
            self.warn(f"{path} is damaged, and begun anew: earlier starts are forgotten. As it was it is kept in {keep_damaged(path)}.")
        start = {"time": round(time.time(), 2), "command": command_line(sys.argv), "host": socket.gethostname(), **start}
        start |= {"git_commit": _git_commit(), "versions": _versions()}
        content = {"name": self.recipe.name, "data": data, "starts": [*before, start]}
        with _written(self.run):
            write_aside(path, to_checked_json(content))
            write_aside(self.run / "recipe.yaml", self.recipe.to_yaml().encode())

    def settle(self, bill: dict[str, Any]) -> None:
        """Add planned beside actual cost (planning/bill.py) to run.json, once the run is finished."""
        self._try(lambda: write_aside(self.run / RUN, to_checked_json({**RunFolder(self.run).record, "bill": bill})))

    def metrics(self, values: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, and send its numbers to TensorBoard and, if the recipe says so, to W&B."""
        self._pending.append(json.dumps(values) + "\n")
        self._try(self._write_pending)
        step = values["step"]
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float) and name not in ("step", "time")}
        self._try(lambda: self._to_board(numbers, step))
        if self._wandb is not None:
            self._wandb.log(numbers, step=step, commit=True)

    def status(self, state: str, reason: str | None = None, **values: Any) -> None:
        content = {"state": state, "reason": reason, "name": self.recipe.name, **values}
        content |= {"host": socket.gethostname(), "pid": os.getpid(), "time": round(time.time(), 2)}
        self._try(lambda: write_aside(self.run / STATUS, to_checked_json(content)))

    def picture(self, save: Callable[[Path], None], step: int) -> None:
        self._try(lambda: save(self.run / "samples" / f"step-{step:08d}.png"))

    def close(self) -> None:
        self._try(self._write_pending)
        self._try(self._board.close)
        if self._wandb is not None:
            self._wandb.finish()

    def _to_board(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def _write_pending(self) -> None:
        path = self.run / METRICS
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a") as file:
                file.writelines(self._pending)
        except OSError:
            if path.exists():
                os.truncate(path, size)  # no half lines
            raise
        self._pending = []
        self._told = False

    def _try(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            if not self._told:
                self.warn(f"The record in {self.run} cannot be written: {error}. Training goes on; metrics are kept and written later.")
            self._told = True


def last_cost(run: Path) -> tuple[float, float]:
    """Return the GPU-hours and dollars that the run last recorded, including work that was lost since its checkpoint."""
    hours = dollars = 0.0
    for line in parse_metrics((run / METRICS).read_bytes())[0] if (run / METRICS).is_file() else []:
        hours, dollars = max(hours, finite(line.get("gpu_hours")) or 0.0), max(dollars, finite(line.get("dollars")) or 0.0)
    return hours, dollars


def _forget_after(path: Path, step: int, warn: Callable[[str], None]) -> None:
    """Drop the steps after `step`, and, with a word and a copy, damaged lines. Half a last one, which a kill leaves, needs neither."""
    if not path.is_file():
        return
    content = path.read_bytes()
    lines, damaged = parse_metrics(content)
    if damaged[-1:] == [content.count(b"\n") + 1]:
        damaged.pop()
    if damaged:
        numbers = ", ".join(map(str, damaged[:10])) + (" ..." if len(damaged) > 10 else "")
        warn(f"{len(damaged)} lines of {path} are damaged, and dropped ({numbers}). As it was it is kept in {keep_damaged(path)}.")
    write_aside(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step).encode())


@contextmanager
def _written(run: Path) -> Iterator[None]:
    """Turn a failed write of the run record into a UserError, so that no training starts without it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"The record in {run} cannot be written: {error}. Make room on the disk, or choose another --out.") from error


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "safetensors", "numpy")}
    return {"python": platform.python_version(), "microdit": microdit.__version__, **packages}


def _git_commit() -> str | None:
    """Return the git commit of the running code, with a `+` if it was changed since; None without git."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # installed from a wheel, or without git
    return commit + ("+" if changed else "")


def _start_wandb(recipe: Recipe, run: Path) -> Any:
    with optional_package("record.wandb_project", "wandb"):
        import wandb
    return wandb.init(project=recipe.record.wandb_project, name=recipe.name, dir=str(run), id=run.name, resume="allow")
