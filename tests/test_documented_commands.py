"""Every command line in the documentation is one that microdit understands: its commands, options and arguments exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from microdit.cli.main import _repeat_option, app

PROJECT = Path(__file__).parents[1]
PAGES = [PROJECT / "README.md", *sorted(PROJECT.glob("docs/**/*.md"))]
COMMAND = typer.main.get_command(app)
LINE = re.compile(r"^(?: {4}|)(?:[A-Z_]+=\S+ )*microdit (?!\.)(.+)$", re.MULTILINE)


def lines_of(page: Path) -> list[str]:
    """The commands of indented and fenced blocks, each with the lines that a backslash continues it on."""
    text = page.read_text().replace("\\\n", " ")
    fenced = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    indented = "".join(
        line for line in re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines(True) if line[:4] == "    "
    )
    return LINE.findall(fenced + indented)


def understand(arguments: list[str]) -> None:
    """Parse the arguments as the command line does, without running anything."""
    command, name = COMMAND, "microdit"
    arguments = _repeat_option(arguments, "--resolutions")
    while hasattr(command, "commands"):
        assert arguments[0] in command.commands, f"there is no command {arguments[0]}"
        command, name, arguments = command.commands[arguments[0]], arguments[0], arguments[1:]
    command.make_context(name, arguments)


@pytest.mark.parametrize("page", [page for page in PAGES if lines_of(page)], ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_every_command_of_the_page_is_understood(page):
    for line in lines_of(page):
        words = shlex.split(re.sub(r"\[(--[^]]+)\]", r"\1", line), comments=True)  # [--option value]: it may be left out
        end = next((place for place, word in enumerate(words) if word in ("&&", "||", "|", ">", ";", "...", "[...]")), len(words))
        try:
            understand(words[:end])
        except Exception as problem:
            pytest.fail(f"{page.name}: microdit {line}: {problem}")


def test_what_is_not_understood_is_found():
    for wrong in (["trian", "emoji"], ["train", "emoji", "--resumed"], ["budget", "emoji", "--count", "many"], ["export", "runs/a"]):
        with pytest.raises(Exception, match=r"trian|resumed|valid integer|out"):
            understand(wrong)
