"""What all commands share: the terminal, lines of progress, and this process's share of the work."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console()
FIRST_LINE, LINE_EVERY = 10.0, 60.0  # seconds, where progress goes into a file

SOURCE_HELP = (
    "emoji and scenes are built in. Else: a folder of pictures with .txt files, metadata.jsonl or metadata.csv; .tar files (WebDataset); "
    ".parquet files; hf:NAME[:SPLIT] of the hub or a path; or NAME:PATH of cc12m, sa1b, textcaps, journeydb, diffusiondb, coco2014."
)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps. auto: the GPU, where there is one.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16. auto: bfloat16 on a GPU that has it, else float32.")]
TrainingDtype = Annotated[
    str, typer.Option(help="Of matrix products: auto, float32 or bfloat16. auto: as the recipe says, or bfloat16 on a GPU that has it.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="How many pictures at a time. Fewer need less memory.")]


def share() -> tuple[int, int]:
    """This process's number and their count, under torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class LineOfProgress(Progress):
    """A line that is drawn anew. Where that cannot be, in a file (nohup, SLURM), a new line of it once a minute."""

    _next_line = 0.0

    def start(self) -> None:
        self._next_line = time.monotonic() + FIRST_LINE
        super().start()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        if self.console.is_terminal or time.monotonic() < self._next_line:
            return
        self._next_line = time.monotonic() + LINE_EVERY
        columns = [column for column in self.columns if isinstance(column, ProgressColumn) and not isinstance(column, BarColumn)]
        parts = (column(self.tasks[self.task_ids.index(task_id)]) for column in columns)
        self.console.print(Text("  ").join(part for part in parts if isinstance(part, Text) and part), soft_wrap=True)


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
    with LineOfProgress(*columns, SpeedColumn(), TimeRemainingColumn(), console=console) as line:
        yield Advance(line, name, total)


def warn(sentence: str) -> None:
    console.print(f"[yellow]{sentence}[/]")
