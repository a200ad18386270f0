"""YAML read as data: lists, mappings, and scalars that stay the text that was written.

YAML itself makes False of `no`, 750 of `12:30` and 8 of `010`, before anybody knows what is wanted there (`typed_yaml.py` does). Nothing is
resolved: no variables, no aliases, no tags.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from microdit.errors import UserError

MOST_BYTES = 128 * 1024
DEEPEST = 12  # lists and mappings in each other; a recipe has four

Tree = Any  # what YAML holds: Plain | str | list[Tree] | dict[str, Tree]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")  # all but tabs and ends of lines: terminals obey them
_NULLS = ("", "~", "null", "Null", "NULL")


class Plain(str):
    """A scalar without quotes. `null` may be nothing, where a field allows that; in quotes it is a word."""

    __slots__ = ()

    @property
    def is_null(self) -> bool:
        return self in _NULLS


def read_yaml(path: Path) -> Tree:
    """Return what the file holds. Raises UserError, naming it, if it is too large or no YAML."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    if len(content) > MOST_BYTES:
        raise UserError(f"{path} is too large: it may have {MOST_BYTES:,} bytes.")
    return parse_yaml(content, str(path))


def parse_yaml(content: bytes | str, where: str) -> Tree:
    """Return what one document holds. Raises UserError, which begins with `where`, for what is no YAML, or more than data."""
    try:
        events = yaml.parse(content, yaml.SafeLoader)
        next(events)  # the stream's start
        if isinstance(next(events), yaml.StreamEndEvent):
            return Plain("")
        tree = _tree(next(events), events, DEEPEST)
        next(events)  # the document's end
        if not isinstance(extra := next(events), yaml.StreamEndEvent):
            raise _NotDataError(extra, "a second document (---) begins: take a file for each")
    except _NotDataError as error:
        raise UserError(f"{where}, {error}.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: "\U00110000" is no letter
        raise UserError(f"{where} is not readable YAML: {' '.join(str(error).split())}.") from error
    return tree


class _NotDataError(Exception):
    def __init__(self, event: Any, sentence: str):
        super().__init__(f"line {event.start_mark.line + 1}: {sentence}")


def _tree(event: Any, events: Iterator[Any], levels: int) -> Tree:
    """Build what begins with `event`. Events are parsed as they are asked for, so that nothing is read behind what is refused."""
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise _NotDataError(event, "anchors and aliases (& and *) are not read here: write the value itself, or quote it")
    if event.tag is not None:
        raise _NotDataError(event, f"tags ({event.tag:.200}) are not read here: write the value alone, or quote it")
    if isinstance(event, yaml.ScalarEvent):
        if control := _CONTROL.search(event.value):
            raise _NotDataError(event, f"a text holds the control character {control[0]!r}: leave it out")
        return event.value if event.style else Plain(event.value)
    if not levels:
        raise _NotDataError(event, f"more than {DEEPEST} lists and mappings lie in each other")
    if isinstance(event, yaml.SequenceStartEvent):
        entries = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            entries.append(_tree(item, events, levels - 1))
        return entries
    found: dict[str, Tree] = {}
    while not isinstance(key := next(events), yaml.MappingEndEvent):
        if not isinstance(key, yaml.ScalarEvent):
            raise _NotDataError(key, "a key must be a word")
        name = str(_tree(key, events, levels))
        if name in found:
            raise _NotDataError(key, f"the key {name:.200} is there twice")
        found[name] = _tree(next(events), events, levels - 1)
    return found


def override(tree: Tree, said: str) -> None:
    """Set in `tree` what `a.b=c` says. The value is the text as it stands, or YAML if it begins with a bracket, a brace or a quote.

    Raises UserError.
    """
    key, equals, value = said.partition("=")
    if not equals or not key:
        raise UserError(f"'{said}' is not an override: write key=value, for example phases.0.steps=100.")
    value = value.strip()
    if control := _CONTROL.search(said):
        raise UserError(f"The override {said!r} holds the control character {control[0]!r}: leave it out.")
    content = parse_yaml(value, f"The override '{said}'") if value[:1] in ("[", "{", '"', "'") else Plain(value)
    *way, last = key.split(".")
    for part in way:
        tree = _entry(tree, part, said)
    _entry(tree, last, said)
    tree[int(last) if isinstance(tree, list) else last] = content


def _entry(tree: Tree, part: str, said: str) -> Tree:
    """Return what lies in `tree` under `part`; an empty mapping is put there if nothing does."""
    if isinstance(tree, dict):
        if isinstance(there := tree.get(part, Plain("")), Plain) and there.is_null:
            tree[part] = {}
        return tree[part]
    if not isinstance(tree, list):
        raise UserError(f"The override '{said}' does not fit: there is a single value where it looks for {part}.")
    if not part.isdecimal() or len(part) > 9 or int(part) >= len(tree):
        raise UserError(f"The override '{said}' does not fit: {part} is none of the {len(tree)} entries, which are counted from 0.")
    return tree[int(part)]
