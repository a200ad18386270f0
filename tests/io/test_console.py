import ast
import io
import json
import logging
import re
import warnings
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

import microdit
from microdit.cli import terminal
from microdit.io import console as module
from microdit.io.console import LONGEST, QUIET, PlainConsole, PrintableFormatter, Reporter, joined, styled
from tests.io.test_untrusted_text_printable import HOSTILE

PACKAGE = Path(microdit.__file__).parent
STYLE = re.compile(r"\x1b\[[\d;]*m")  # colours and weights, which are our own


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told to."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def minutes_of_work(clock, **console) -> str:
    """Three minutes, a step a second; what is printed before the end."""
    file = io.StringIO()
    reporter = Reporter(PlainConsole(file=file, width=80, **console))
    with reporter.progress("encode a folder with a long name, which takes its place", 180) as advance:
        for _ in range(180):
            clock[0] += 1
            advance(1, "loss 0.5")
        return file.getvalue()


def test_a_file_gets_a_line_after_ten_seconds_and_one_each_minute(clock):
    lines = minutes_of_work(clock).splitlines()
    assert [line.split("  ")[1].split("/")[0].strip() for line in lines] == ["10", "70", "130"]
    assert all(line.startswith("encode a folder") and "/180" in line and "loss 0.5" in line and "━" not in line for line in lines)


def test_a_terminal_gets_its_bar_alone(clock):
    assert "\n" not in minutes_of_work(clock, force_terminal=True).replace("\r", "").strip("\n")


def test_a_quiet_console_gets_nothing(clock):
    assert minutes_of_work(clock, quiet=True) == ""


def test_a_notebook_gets_plain_lines_as_a_file_does(clock, monkeypatch):
    """Its output says that it is a terminal, and rich would write HTML."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr(io, "StringIO", type("Output", (io.StringIO,), {"isatty": lambda _: True}))
    assert [re.match("encode a folder.*  (10|70|130)/180  loss 0.5", line)[1] for line in minutes_of_work(clock).splitlines()] == [
        "10",
        "70",
        "130",
    ]


def table_of(text: str) -> Table:
    table = Table(title=text, caption=text)
    table.add_column(text)
    table.add_row(text)
    table.add_row(styled(text, "red"))
    return table


WAYS = {
    "a string": lambda text: text,
    "a styled text": styled,
    "several": lambda text: joined(text, styled(text)),
    "a table": table_of,
    "a text of rich's own": Text,
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_that_is_printed_commands_the_terminal_or_is_markup(way):
    for settings in ({}, {"markup": True, "emoji": True}):
        file = io.StringIO()
        PlainConsole(file=file, width=400, force_terminal=True).print(WAYS[way](f"[/b] [red]word[/] :smile: {HOSTILE}"), **settings)
        shown = STYLE.sub("", file.getvalue())
        assert re.findall(r"[^\n -~─-╿]", shown) == []
        assert r"[/b] [red]word[/] :smile: \u001b[2J" in shown


def test_a_line_of_progress_shows_any_name_and_note_and_cuts_them():
    file = io.StringIO()
    reporter = Reporter(PlainConsole(file=file, width=1000, force_terminal=True))
    with reporter.progress("[/b] " + HOSTILE, 2) as advance:
        advance(2, "[/b]" + "x" * 10_000 + HOSTILE)
    shown = re.sub(r"\x1b\[(\?25[lh]|2K|1A)", "", STYLE.sub("", file.getvalue()))  # the line is drawn anew
    assert r"[/b] \u001b[2J" in shown
    assert "characters left out" in shown
    assert len(shown) < 2000
    assert set(re.findall(r"[^\n -~━╸]", shown)) <= {"\r"}


def test_a_sentence_that_is_too_long_is_cut_and_json_is_not():
    file = io.StringIO()
    console = PlainConsole(file=file, width=80)
    console.print(joined("x" * 100_000, " Make it shorter."), soft_wrap=True)
    assert len(file.getvalue()) < LONGEST + 100
    assert file.getvalue().endswith(" Make it shorter.\n")
    file.truncate(0)
    file.seek(0)
    content = {"caption": "x" * 100_000, HOSTILE: HOSTILE}
    console.print_json(data=content)
    assert json.loads(file.getvalue()) == content


def test_a_warning_may_hold_what_looks_like_markup():
    file = io.StringIO()
    reporter = Reporter(PlainConsole(file=file, width=80))
    reporter.warn('The prompt "[/b] word" is cut.')
    assert file.getvalue() == 'The prompt "[/b] word" is cut.\n'


def test_without_a_console_nothing_is_printed_and_warnings_are_logged(capsys, caplog):
    QUIET.say("A sentence.")
    QUIET.warn("A warning.")
    with QUIET.progress("work", 2) as advance:
        advance(2, "done")
    assert capsys.readouterr() == ("", "")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("microdit", "A warning.")]


def test_logs_with_their_tracebacks_are_printable():
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "GET %s", ("/\x1b[2J",), (ValueError, error, error.__traceback__))
    lines = PrintableFormatter().format(record)
    assert re.findall(r"[^\n -~]", lines) == []
    assert r"GET /\u001b[2J" in lines
    assert r"ValueError: \u001b[2J" in lines


@pytest.fixture
def taken_logs():
    logging.captureWarnings(False)  # another test may have run a command in this process, and pytest have undone half of that
    yield terminal.take_logs()
    logging.captureWarnings(False)
    logging.getLogger("py.warnings").removeHandler(logging.lastResort)
    logging.lastResort.setFormatter(None)


def test_what_libraries_log_and_warn_of_is_printable(taken_logs, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # those of the tests
    logging.getLogger("microdit.something").warning("GET /\x1b[2J")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("odd\x1b[2J", stacklevel=1)
    said = capsys.readouterr().err
    assert said.count(r"\u001b[2J") == 2
    assert "\x1b" not in said


def test_a_traceback_is_printable(capsys):
    try:
        raise KeyError("x") from ValueError(HOSTILE)
    except KeyError:
        terminal.print_traceback()
    said = capsys.readouterr().err
    assert "KeyError: 'x'" in said
    assert re.findall(r"[^\n -~]", said) == []


def calls_of(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def loopholes(source: str) -> list[str]:
    """Ways to the terminal that do not go through `printable`."""
    tree, found, ours = ast.parse(source), list[str](), set[str]()
    harmless = {"Table", "Column", "Text", "SIMPLE_HEAD", "BarColumn", "MofNCompleteColumn", "TimeRemainingColumn", "TaskID"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "rich"]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rich":
            found += [alias.name for alias in node.names if alias.name not in harmless]
            ours |= {alias.name for alias in node.names if alias.name == "Text"}
    for name, call in calls_of(tree):
        arguments = [ast.unparse(argument) for argument in call.args]
        if name == "print" and not (len(arguments) == 1 and arguments[0].startswith("printable(")):
            found.append(f"print({', '.join(arguments)})")
        if name.split(".")[0] in ours or re.match(r"(click|typer)\.(echo|secho|style)|sys\.(stdout|stderr)\.(buffer\.)?write", name):
            found.append(name)
        if re.match(r"(click|typer)\.(confirm|prompt)", name) and not all(isinstance(argument, ast.Constant) for argument in call.args):
            found.append(name)
        if re.search(r"console\.(out|log|input|rule|status|print_exception)$", name):
            found.append(name)
    return found


def test_there_is_no_other_way_to_the_terminal():
    found = {
        name: loopholes(path.read_text())
        for path in PACKAGE.rglob("*.py")
        if (name := str(path.relative_to(PACKAGE))) not in ("io/console.py", "cli/terminal.py")
    }
    assert {name: ways for name, ways in found.items() if ways} == {}


@pytest.mark.parametrize(
    "source",
    [
        "print(name)",
        "print(printable(a), b)",
        "from rich.console import Console",
        "import rich",
        "from rich import print",
        "from rich.progress import TextColumn",
        "typer.echo(name)",
        "typer.confirm(f'Delete {name}?')",
        "sys.stderr.write(name)",
        "from rich.text import Text\nText.from_markup(name)",
        "from rich.text import Text\nText(name)",
        "console.out(name)",
    ],
)
def test_each_loophole_would_be_found(source):
    assert loopholes(source)
