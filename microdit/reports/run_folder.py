"""Reader of run folders, during training or long after. Missing and half-written files read as empty and never raise.

recipe.yaml  run.json  status.json  metrics.jsonl  samples/step-00000500.png
"""

import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microdit.io.files import from_checked_json, read_regular
from microdit.io.untrusted_text import parse_json_object
from microdit.reports.formats import finite

RECIPE = "recipe.yaml"  # its presence makes a folder a run folder
RUN, METRICS, STATUS = "run.json", "metrics.jsonl", "status.json"
RECONSTRUCTIONS = "reconstructions.png"  # in the folder of an encoded set: what the autoencoder makes of its pictures
LARGEST_STEP = 2**53  # larger numbers are damage
SILENCE = 15 * 60  # seconds without an update after which a run on another host counts as killed


@dataclass(frozen=True)
class RunFolder:
    """The run folder `path`. Each property reads its file again."""

    path: Path

    @property
    def recipe_text(self) -> str:
        return read_regular(self.path / RECIPE).decode(errors="replace")

    @property
    def record(self) -> dict[str, Any]:
        """The content of run.json: name, data, starts. Empty if its checksum differs."""
        return _read_checked(self.path / RUN)

    @property
    def has_damaged_record(self) -> bool:
        """True if there is a run.json whose checksum differs."""
        return not self.record and (self.path / RUN).is_file()

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The starts recorded in run.json, oldest first."""
        starts = self.record.get("starts")
        return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []

    @property
    def status(self) -> dict[str, Any]:
        """The content of status.json: the run's progress. Empty if its checksum differs."""
        return _read_checked(self.path / STATUS)

    def read_metrics(self, check: Callable[[], None] = lambda: None) -> tuple[list[dict[str, Any]], int]:
        """Return the lines of metrics.jsonl by step, and the number of unreadable ones (a killed process leaves half a line).

        Of steps that were trained twice, after a rollback or from an older checkpoint, the last line counts. `check` is called once per
        line, and may raise to cancel.
        """
        try:
            lines, damaged = parse_metrics(read_regular(self.path / METRICS), check)
        except OSError:
            return [], 0
        by_step: dict[int, dict[str, Any]] = {}
        for metrics in lines:
            while by_step and next(reversed(by_step)) >= metrics["step"]:
                by_step.popitem()
            by_step[metrics["step"]] = metrics
        return list(by_step.values()), len(damaged)

    @property
    def modified(self) -> float:
        """When training last wrote metrics, status or samples, in seconds since the epoch; 0 if it has written none."""
        newest = 0.0
        for name in (METRICS, STATUS, "samples"):
            with suppress(OSError):
                newest = max(newest, (self.path / name).stat().st_mtime)
        return newest

    @property
    def samples(self) -> list[tuple[int, Path]]:
        """The sample grids, as (step, file) by step."""
        found = ((re.fullmatch(r"step-(\d+)\.png", path.name), path) for path in (self.path / "samples").glob("step-*.png"))
        return sorted((int(match[1]), path) for match, path in found if match)


def parse_metrics(content: bytes, check: Callable[[], None] = lambda: None) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the valid lines of metrics.jsonl, and the numbers (from 1) of invalid ones. `check` is called once per line."""
    lines: list[dict[str, Any]] = []
    damaged: list[int] = []
    for number, raw in enumerate(content.split(b"\n"), start=1):
        check()
        line = _parse_object(raw)
        step = line.get("step")
        if type(step) is int and 0 <= step < LARGEST_STEP:
            lines.append(line)
        elif raw.strip():
            damaged.append(number)
    return lines, damaged


def is_run(folder: Path) -> bool:
    """Return whether a trainer wrote the folder."""
    return (folder / RECIPE).is_file()


def state_of(status: dict[str, Any]) -> str:
    """Return the state in status.json; "killed" if that is "running" but the process is gone, "unknown" if it has none."""
    state = str(status.get("state") or "unknown")
    return "killed" if state == "running" and not _may_be_alive(status) else state


def _may_be_alive(status: dict[str, Any]) -> bool:
    pid, written = status.get("pid"), status.get("time")
    if status.get("host") == socket.gethostname() and isinstance(pid, int) and pid > 0:
        return _is_process(pid)
    seconds = finite(written)
    return seconds is not None and time.time() - seconds <= SILENCE


def _is_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:  # somebody else's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _read_checked(path: Path) -> dict[str, Any]:
    try:
        return from_checked_json(read_regular(path))
    except (OSError, ValueError):
        return {}


def _parse_object(text: bytes) -> dict[str, Any]:
    try:
        return parse_json_object(text)
    except ValueError:
        return {}
