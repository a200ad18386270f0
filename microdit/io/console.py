"""Plain text on a terminal: a console that reads no markup, lines of progress, and the reporter that library code is given.

Most of what is printed holds other people's text, so nothing here reads markup, and everything printed goes through `printable`. Rich's
own consoles, texts and columns of text are used nowhere else (tests/test_terminal.py). No console is created here but a silent one:
the command line owns the terminal (`microdit.cli.terminal`), and functions below it take a `Reporter`.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

from microdit.io.text import printable

FIRST_LINE, LINE_EVERY = 10.0, 60.0  # seconds, where progress goes into a file
LONGEST, LONGEST_NOTE = 5000, 200  # characters of a sentence, and of a name or note in a line of progress


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


def styled(what: object, style: str = "bold") -> Text:
    """`what`, as a string, in one of rich's styles."""
    return Text(printable(str(what), LONGEST), style)


def joined(*parts: str | Text) -> Text:
    """One text of several, some of them styled."""
    return Text.assemble(*(printable(part, LONGEST) if isinstance(part, str) else part for part in parts))


class PrintableFormatter(logging.Formatter):
    """Lines of the log, tracebacks in them included."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


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


class Reporter:
    """Where library code sends its sentences, warnings and progress: a console, or nowhere.

    Without a console nothing is printed, and warnings go to the logger "microdit", so that they are not lost.
    """

    def __init__(self, console: PlainConsole | None = None):
        self._console = console

    @property
    def console(self) -> PlainConsole:
        """The console, or a silent one."""
        return self._console or PlainConsole(quiet=True)

    def say(self, sentence: str | Text) -> None:
        """Print a sentence that is no warning."""
        if self._console:
            self._console.print(sentence)

    def warn(self, sentence: str) -> None:
        """Print a warning, or log it where there is no console."""
        if self._console:
            self._console.print(styled(sentence, "yellow"))
        else:
            logging.getLogger("microdit").warning("%s", sentence)

    @contextmanager
    def progress(self, name: str, total: int | None) -> Iterator[Advance]:
        """Show a line of progress with speed, and time left where `total` is known. Yields the function that counts work done."""
        columns = (PlainColumn(), BarColumn(), MofNCompleteColumn(), PlainColumn("note"))
        with LineOfProgress(*columns, SpeedColumn(), TimeRemainingColumn(), console=self.console) as line:
            yield Advance(line, name, total)


QUIET = Reporter()
