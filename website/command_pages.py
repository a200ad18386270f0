"""The pages of the commands, made from the definitions that `--help` prints.

    python website/command_pages.py --write    # after changing a command: the tables of docs/commands.md

docs/commands.md holds one table for each group of commands, for readers of the repository; the site has a page for each command besides,
which `hooks.py` makes while the site is built.
"""

import argparse
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from microdit.cli.main import PANELS, app

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
BEGIN, END = "<!-- commands: python website/command_pages.py --write -->\n", "<!-- end of the commands -->"
# Where to read on about a command, or about a group of commands.
GUIDES = {
    "app": "app.md",
    "bench": "budget.md#measuring-utilisation",
    "budget": "budget.md",
    "compare": "reference-results.md",
    "data": "bring-your-own-data.md",
    "data import-latents": "storage.md",
    "data pull": "rented-machines.md",
    "data push": "rented-machines.md",
    "draw": "evaluation.md",
    "evaluate": "evaluation.md",
    "export": "hub.md",
    "geneval": "evaluation.md",
    "grid": "sampling.md",
    "import-minit2i": "hub.md#minit2is-released-weights",
    "import-official": "hub.md",
    "lab": "lab/README.md",
    "new": "bring-your-own-data.md",
    "prefer": "evaluation.md",
    "recipes": "training.md",
    "report": "training.md",
    "runs": "training.md",
    "sample": "sampling.md",
    "train": "training.md",
    "train-autoencoder": "bring-your-own-data.md",
}


@dataclass(frozen=True)
class Command:
    """A command as typer defines it: `name` follows `microdit`, such as "data encode"; `panel` is its group in `microdit --help`."""

    name: str
    panel: str
    definition: Any

    @property
    def paragraphs(self) -> list[str]:
        """The paragraphs of the help text, each on one line."""
        return [" ".join(paragraph.split()) for paragraph in (self.definition.help or "").split("\n\n")]

    @property
    def text(self) -> list[str]:
        return [paragraph for paragraph in self.paragraphs if not paragraph.startswith("Example: ")]

    @property
    def examples(self) -> list[str]:
        return [paragraph.removeprefix("Example: ") for paragraph in self.paragraphs if paragraph.startswith("Example: ")]

    @property
    def first_sentence(self) -> str:
        return re.split(r"(?<=\.) ", self.text[0])[0]

    @property
    def guide(self) -> str | None:
        return GUIDES.get(self.name) or GUIDES.get(self.name.split()[0])

    @property
    def file(self) -> str:
        """The page's file in the folder `commands` of the site."""
        return f"{self.name.replace(' ', '-')}.md"


def commands() -> list[Command]:
    """Return every command, in the order of `microdit --help`, with a group's own commands in the place of the group."""
    found = list(_commands(typer.main.get_command(app), "", ""))
    return [command for panel in PANELS for command in found if command.panel == panel]


def _commands(group: Any, name: str, panel: str) -> Iterator[Command]:
    for word, definition in group.commands.items():
        whole = f"{name} {word}".strip()
        where = panel or definition.rich_help_panel
        if hasattr(definition, "commands"):
            yield from _commands(definition, whole, where)
        else:
            yield Command(whole, where, definition)


def tables(folder: str | None = None) -> str:
    """Return a section with a table for each group of commands. In the site, whose pages are in `folder`, each command is a link."""
    lines = []
    for panel in PANELS:
        lines += [f"## {panel}", "", "| command | does | for example |", "|---|---|---|"]
        for command in commands():
            if command.panel == panel:
                name = f"`microdit {command.name}`"
                does = _in_cell(command.first_sentence) + (f" ([how]({command.guide}))" if command.guide else "")
                linked = f"[{name}]({folder}/{command.file})" if folder else name
                lines.append(f"| {linked} | {does} | {_code(command.examples[0]) if command.examples else ''} |")
        lines.append("")
    return "\n".join(lines)


def with_tables(page: str, text: str) -> str:
    """Return `page` with `text` between the two marks. Raises ValueError if one is missing."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return f"{page[:start]}\n{text}\n{page[end:]}"


def command_page(command: Command) -> str:
    """Return the page of one command: description, usage, examples, arguments and options."""
    usage, parameters = _usage(command)
    lines = [f"# microdit {command.name}", "", *_spaced(map(_prose, command.text)), "```text", usage, "```", ""]
    if command.guide:
        title = (PAGE.parent / command.guide.split("#")[0]).read_text().splitlines()[0].removeprefix("# ")
        lines += [f"Read on: [{title}](../{command.guide}).", ""]
    if command.examples:
        lines += ["## Examples", "", "```bash", *command.examples, "```", ""]
    for title, is_option in (("Arguments", False), ("Options", True)):
        rows = [row for option, row in parameters if option is is_option]
        if rows:
            lines += [f"## {title}", "", f"| {title.lower()[:-1]} | meaning |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _usage(command: Command) -> tuple[str, list[tuple[bool, str]]]:
    """Return the line of usage, and for each parameter whether it is an option and its row of the table."""
    context = typer.Context(command.definition, info_name=f"microdit {command.name}")
    usage = command.definition.get_usage(context).removeprefix("Usage: ")
    rows = []
    for parameter in command.definition.params:
        record = parameter.get_help_record(context)
        if record is not None:
            names, meaning = record
            rows.append((parameter.param_type_name == "option", f"| {_code(names)} | {_in_cell(meaning)} |"))
    return " ".join(usage.split()), rows


def _spaced(paragraphs: Iterator[str]) -> list[str]:
    return [line for paragraph in paragraphs for line in (paragraph, "")]


def _prose(text: str) -> str:
    """Return plain text as Markdown."""
    return re.sub(r"([\\`*_\[\]])", r"\\\1", text).replace("<", "&lt;")


def _in_cell(text: str) -> str:
    return _prose(" ".join(text.split())).replace("|", r"\|")


def _code(text: str) -> str:
    return f"`{' '.join(text.split())}`".replace("|", r"\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/commands.md instead of printing them")
    if not parser.parse_args().write:
        print(tables())
        return
    PAGE.write_text(with_tables(PAGE.read_text(), tables()))
    print(os.path.relpath(PAGE))


if __name__ == "__main__":
    main()
