"""`microdit runs`: a table of all runs below a folder."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from microdit.errors import UserError
from microdit.io.console import styled
from microdit.io.near_names import did_you_mean_path
from microdit.io.untrusted_text import one_line
from microdit.reports.formats import age, count, duration, figure, finite, hours, money, share
from microdit.reports.run_folder import RECIPE, RunFolder, is_run, state_of

DEPTH = 3  # levels of folders that are searched
STYLES = {"running": "green", "finished": "blue", "stopped": "yellow", "failed": "bold red", "killed": "bold red"}


@dataclass(frozen=True)
class RunSummary:
    """A run's progress. `path` is relative to the searched folder. None means unknown."""

    name: str
    path: Path
    state: str  # running, finished, stopped, failed, killed or unknown
    step: int
    total_steps: int | None
    loss: float | None  # may be NaN
    images_per_second: float | None
    gpu_hours: float | None
    dollars: float | None  # None without a price
    seconds_left: float | None  # only while it is running
    updated: float  # Unix time


def list_runs(folder: Path) -> list[RunSummary]:
    """Return the runs in `folder` and up to DEPTH levels below it, most recently updated first.

    Raises UserError if there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.{did_you_mean_path(folder)} Name one that holds run folders, such as runs.")
    runs = [_summary(run, folder) for run in _run_folders(folder, DEPTH)]
    return sorted(runs, key=lambda run: (-run.updated, run.path))


def runs_table(runs: list[RunSummary]) -> Table:
    """Return a table with a row per run, in the given order."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("run", overflow="fold", min_width=10)
    table.add_column("state", no_wrap=True)
    for title in ("step", "loss", "img/s", "GPU-h", "cost", "left", "updated"):
        table.add_column(title, justify="right", no_wrap=True)
    for run in runs:
        label = run.name if run.path == Path() else str(run.path)
        state = styled(one_line(run.state, 20), STYLES.get(run.state, ""))
        figures = (figure(run.loss), figure(run.images_per_second, 3), hours(run.gpu_hours), money(run.dollars), duration(run.seconds_left))
        table.add_row(one_line(label, 200), state, _progress(run), *figures, age(time.time() - run.updated))
    return table


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    """Yield run folders, without searching inside them."""
    if is_run(folder):
        yield folder
    elif depth > 0:
        for below in _folders_in(folder):
            yield from _run_folders(below, depth - 1)


def _folders_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except PermissionError:
        return []


def _summary(path: Path, folder: Path) -> RunSummary:
    run = RunFolder(path)
    status = run.status
    state = state_of(status)
    updated = finite(status.get("time"))
    total_steps, loss = finite(status.get("total_steps")), status.get("loss")
    return RunSummary(
        name=str(status.get("name") or run.record.get("name") or path.resolve().name),
        path=path.relative_to(folder),
        state=state,
        step=int(finite(status.get("step")) or 0),
        total_steps=None if total_steps is None else int(total_steps),
        loss=loss if isinstance(loss, float) else finite(loss),
        images_per_second=finite(status.get("images_per_second")),
        gpu_hours=finite(status.get("gpu_hours")),
        dollars=finite(status.get("dollars")),
        seconds_left=finite(status.get("seconds_left")) if state == "running" else None,
        updated=(path / RECIPE).stat().st_mtime if updated is None else updated,
    )


def _progress(run: RunSummary) -> str:
    if not run.total_steps:
        return count(run.step)
    return f"{count(run.step)} {share(run.step, run.total_steps):3.0f}%"
