"""The pages of the commands say what the commands say of themselves."""

import re
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from microdit.cli.main import app
from website.command_pages import GUIDES, PAGE, Command, command_page, commands, tables, with_tables

COMMANDS = commands()


def test_the_page_of_all_commands_is_up_to_date():
    page = PAGE.read_text()
    assert with_tables(page, tables()) == page, "run python website/command_pages.py --write"
    with pytest.raises(ValueError, match="substring not found"):
        with_tables("a page without marks", tables())


def test_every_command_of_the_help_has_a_page():
    listed = CliRunner().invoke(app, ["--help"]).output
    groups = {command.name.split()[0] for command in COMMANDS}
    assert groups == set(re.findall(r"^│ ([a-z][a-z0-9-]+)  ", listed, re.MULTILINE))
    assert len({command.file for command in COMMANDS}) == len(COMMANDS) > 25
    assert set(GUIDES) <= {command.name for command in COMMANDS} | groups


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_page_has_every_option_of_the_help(command: Command):
    shown = CliRunner().invoke(app, [*command.name.split(), "--help"])
    assert shown.exit_code == 0
    page = command_page(command)
    in_page = {word for row in re.findall(r"^\| `(-[^`]+)", page, re.MULTILINE) for word in re.findall(r"(?<!\S)--?[a-z][-a-z0-9]*", row)}
    in_help = set(re.findall(r"^│ (?:[* ]  )?(--[-a-z0-9]+)", shown.output, re.MULTILINE)) - {"--help"}
    assert {option for option in in_page if option.startswith("--")} == in_help
    assert all(re.search(rf"^│.* {short} +<", shown.output, re.MULTILINE) for short in in_page - in_help)
    shown_in_one_line = " ".join(shown.output.split())
    assert all(f"Example: {example}" in shown_in_one_line for example in command.examples)
    assert command.first_sentence in shown_in_one_line


def test_signs_of_markdown_are_written_out():
    own = typer.Typer()

    @own.command()
    def it(name: Annotated[str, typer.Option(help="One of a|b*, [needed].")]) -> None:
        """Take a*b*c, x_y_z and <file> | [x].

        Example: it --name a
        """

    page = command_page(Command("it", "Data", typer.main.get_command(own)))
    assert r"Take a\*b\*c, x\_y\_z and &lt;file> | \[x\]." in page
    assert r"| One of a\|b\*, \[needed\]. \[required\] |" in page
    assert "```bash\nit --name a\n```" in page
