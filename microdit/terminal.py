"""What all commands share: the terminal, lines of progress, and this process's share of the work."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console()

SOURCE_HELP = (
    "emoji and scenes are built in. Else: a folder of pictures with .txt files, metadata.jsonl or metadata.csv; .tar files (WebDataset); "
    ".parquet files; hf:NAME[:SPLIT] of the hub or a path; or NAME:PATH of cc12m, sa1b, textcaps, journeydb, diffusiondb, coco2014."
)


def share() -> tuple[int, int]:
    """This process's number and their count, under torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Advance:
    """Counts work done on a progress line: `advance(n)`, or `advance(n, "a note")`."""

    def __init__(self, progress: Progress, name: str, total: int | None):
        self._progress = progress
        self._task = progress.add_task(name, total=total, note="")

    def __call__(self, count: float, note: str = "") -> None:
        self._progress.update(self._task, advance=count, note=note)


class SpeedColumn(ProgressColumn):
    """Units of work a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:,.0f}/s" if speed >= 100 else f"{speed:.3g}/s")


@contextmanager
def progress(name: str, total: int | None) -> Iterator[Advance]:
    """A line on the terminal, with speed and time left where `total` is known."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, SpeedColumn(), TimeRemainingColumn(), console=console) as line:
        yield Advance(line, name, total)


def warn(sentence: str) -> None:
    console.print(f"[yellow]{sentence}[/]")
