"""Plain text on a terminal: a console without markup, progress lines, and the `Reporter` that library code prints through.

Most printed text contains other people's words, so nothing here interprets markup, and everything goes through `printable`. Rich's own
consoles, texts and text columns are used nowhere else (tests/test_terminal.py). The only console created here is a silent one: the
command line owns the terminal (`microdit.cli.terminal`), and functions below it take a `Reporter`.
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

from microdit.io.untrusted_text import printable

FIRST_LINE, LINE_EVERY = 10.0, 60.0  # seconds between lines when progress is written to a file
LONGEST, LONGEST_NOTE = 5000, 200  # characters of a message, and of a name or note in a progress line


class PlainConsole(Console):
    """A console that prints strings as plain text: without markup or terminal escapes, and cut to LONGEST characters.

    Use `styled` for styles. All output passes through `render`, including tables and progress lines.
    """

    def __init__(self, **settings: Any):
        if Console().is_jupyter:  # into a notebook rich writes HTML: it gets plain lines instead, as a file does
            settings = {"force_jupyter": False, "force_terminal": False, **settings}
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(printable(text, LONGEST), **{**settings, "markup": False, "emoji": False})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def styled(what: object, style: str = "bold") -> Text:
    """Return `what` as text in one of rich's styles."""
    return Text(printable(str(what), LONGEST), style)


def joined(*parts: str | Text) -> Text:
    """Join strings and styled texts to one text."""
    return Text.assemble(*(printable(part, LONGEST) if isinstance(part, str) else part for part in parts))


class PrintableFormatter(logging.Formatter):
    """Formats log records, including their tracebacks, as printable text."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class LineOfProgress(Progress):
    """A progress line that is redrawn in place, or, if the output is a file (nohup, SLURM), printed once a minute."""

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
    """The description of a progress line, or one of its fields, as plain text."""

    def __init__(self, field: str = "description"):
        super().__init__(Column(no_wrap=True))
        self._field = field

    def render(self, task: Task) -> Text:
        return Text(printable(str(task.fields.get(self._field, task.description)), LONGEST_NOTE))


class SpeedColumn(ProgressColumn):
    """Units of work per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:,.0f}/s" if speed >= 100 else f"{speed:.3g}/s")


class Advance:
    """Adds completed work to a progress line: `advance(n)`, or `advance(n, "a note")`."""

    def __init__(self, progress: Progress, name: str, total: int | None):
        self._progress = progress
        self._task = progress.add_task(name, total=total, note="")

    def __call__(self, count: float, note: str = "") -> None:
        self._progress.update(self._task, advance=count, note=note)


class Reporter:
    """The outlet for messages, warnings and progress of library code: a console, or nothing.

    Without a console nothing is printed, and warnings go to the logger "microdit".
    """

    def __init__(self, console: PlainConsole | None = None):
        self._console = console

    @property
    def console(self) -> PlainConsole:
        """Return the console, or a silent one if there is none."""
        return self._console or PlainConsole(quiet=True)

    def say(self, sentence: str | Text) -> None:
        """Print a message."""
        if self._console:
            self._console.print(sentence)

    def warn(self, sentence: str) -> None:
        """Print a warning, or log it if there is no console."""
        if self._console:
            self._console.print(styled(sentence, "yellow"))
        else:
            logging.getLogger("microdit").warning("%s", sentence)

    @contextmanager
    def progress(self, name: str, total: int | None) -> Iterator[Advance]:
        """Show a progress line with speed, and with the time left if `total` is known. Yields the function that adds completed work."""
        columns = (PlainColumn(), BarColumn(), MofNCompleteColumn(), PlainColumn("note"))
        with LineOfProgress(*columns, SpeedColumn(), TimeRemainingColumn(), console=self.console) as line:
            yield Advance(line, name, total)


QUIET = Reporter()
