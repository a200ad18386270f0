"""What all commands share: the terminal, lines of progress, and this process's share of the work.

Most of what is printed holds other people's text. So nothing here reads markup, and whatever is printed goes through `printable`; rich's
own consoles, texts and columns of text are used nowhere else (tests/test_terminal.py).
"""

import logging
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

from microdit.io.text import printable

FIRST_LINE, LINE_EVERY = 10.0, 60.0  # seconds, where progress goes into a file
LONGEST, LONGEST_NOTE = 5000, 200  # characters of a sentence, and of a name or note in a line of progress

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


class PlainConsole(Console):
    """A console whose strings are plain text: no markup, no commands to the terminal, none of more than LONGEST characters.

    Our own styles are `styled`. `render` is what everything goes through, in tables and lines of progress too.
    """

    def __init__(self, **settings: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(printable(text, LONGEST), **{**settings, "markup": False, "emoji": False})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


console = PlainConsole()


def styled(what: object, style: str = "bold") -> Text:
    """`what`, as a string, in one of rich's styles."""
    return Text(printable(str(what), LONGEST), style)


def joined(*parts: str | Text) -> Text:
    """One text of several, some of them styled."""
    return Text.assemble(*(printable(part, LONGEST) if isinstance(part, str) else part for part in parts))


def warn(sentence: str) -> None:
    console.print(styled(sentence, "yellow"))


class PrintableFormatter(logging.Formatter):
    """Lines of the log, tracebacks in them included."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def take_logs() -> None:
    """Print what libraries log or warn of, and do not print themselves, without its commands to the terminal, too."""
    if (handler := logging.lastResort) is not None:
        handler.setFormatter(PrintableFormatter())
        logging.getLogger("py.warnings").addHandler(handler)
        logging.captureWarnings(True)


def print_traceback() -> None:
    """Of the exception that is being handled: a mistake of ours, whose message may hold anything."""
    sys.stderr.write(printable(traceback.format_exc()))


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


class PlainColumn(ProgressColumn):
    """What a line of progress is about, or one of its own fields."""

    def __init__(self, field: str = "description"):
        super().__init__(Column(no_wrap=True))
        self._field = field

    def render(self, task: Task) -> Text:
        return Text(printable(str(task.fields.get(self._field, task.description)), LONGEST_NOTE))


class SpeedColumn(ProgressColumn):
    """Units of work a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:,.0f}/s" if speed >= 100 else f"{speed:.3g}/s")


class Advance:
    """Counts work done on a progress line: `advance(n)`, or `advance(n, "a note")`."""

    def __init__(self, progress: Progress, name: str, total: int | None):
        self._progress = progress
        self._task = progress.add_task(name, total=total, note="")

    def __call__(self, count: float, note: str = "") -> None:
        self._progress.update(self._task, advance=count, note=note)


@contextmanager
def progress(name: str, total: int | None) -> Iterator[Advance]:
    """A line on the terminal, with speed and time left where `total` is known."""
    columns = (PlainColumn(), BarColumn(), MofNCompleteColumn(), PlainColumn("note"))
    with LineOfProgress(*columns, SpeedColumn(), TimeRemainingColumn(), console=console) as line:
        yield Advance(line, name, total)
