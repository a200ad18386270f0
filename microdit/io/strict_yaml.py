"""Strict YAML: parsed to lists, mappings and unresolved text, then read as a dataclass by the types and ranges of its fields.

Plain YAML turns `no` into False, `12:30` into 750 and `010` into 8 before the expected type is known. Here scalars stay the text that
was written until `read_as` converts them. Variables, aliases and tags are not supported.
"""

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from microdit.errors import UserError
from microdit.io.near_names import nearest
from microdit.ranges import OneOf, Range

MOST_BYTES = 128 * 1024
MOST_DIGITS = 40
DEEPEST = 12  # nested lists and mappings; a recipe has four

Tree = Any  # a parsed document: Plain | str | list[Tree] | dict[str, Tree]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")  # control characters except tabs and line ends
_NULLS = ("", "~", "null", "Null", "NULL")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WORDS: dict[Any, str] = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


class Plain(str):
    """A scalar without quotes. Unquoted, `null` means None for fields that allow it; in quotes it is a word."""

    __slots__ = ()

    @property
    def is_null(self) -> bool:
        return self in _NULLS


def read_yaml(path: Path) -> Tree:
    """Return the parsed content of a file. Raises UserError, naming the file, if it is too large or not YAML."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    if len(content) > MOST_BYTES:
        raise UserError(f"{path} is too large: it may have {MOST_BYTES:,} bytes.")
    return parse_yaml(content, str(path))


def parse_yaml(content: bytes | str, where: str) -> Tree:
    """Return the parsed content of one document. Raises UserError, which begins with `where`, if it is not YAML or not plain data."""
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
    except (yaml.YAMLError, ValueError) as error:  # ValueError: "\U00110000" is not a character
        raise UserError(f"{where} is not readable YAML: {' '.join(str(error).split())}.") from error
    return tree


class _NotDataError(Exception):
    def __init__(self, event: Any, sentence: str):
        super().__init__(f"line {event.start_mark.line + 1}: {sentence}")


def _tree(event: Any, events: Iterator[Any], levels: int) -> Tree:
    """Build the node that begins with `event`. Events are parsed lazily, so nothing after an error is read."""
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
    """Apply the override `a.b=c` to `tree`. The value is plain text, or YAML if it begins with a bracket, a brace or a quote.

    Raises UserError if the override is malformed or does not fit the tree.
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
    """Return the entry `part` of `tree`. An absent entry of a mapping becomes an empty mapping."""
    if isinstance(tree, dict):
        if isinstance(there := tree.get(part, Plain("")), Plain) and there.is_null:
            tree[part] = {}
        return tree[part]
    if not isinstance(tree, list):
        raise UserError(f"The override '{said}' does not fit: there is a single value where it looks for {part}.")
    if not part.isdecimal() or len(part) > 9 or int(part) >= len(tree):
        raise UserError(f"The override '{said}' does not fit: {part} is none of the {len(tree)} entries, which are counted from 0.")
    return tree[int(part)]


def read_as(kind: type, tree: Tree, where: str) -> Any:
    """Read `tree` as the dataclass `kind`, each field by its type and its `Range`.

    Raises UserError, which names `where`, the key, its value and what is allowed.
    """
    try:
        return _read(kind, tree, "")
    except _UnknownKeyError as error:
        raise UserError(f"{where}: unknown key {error!s:.200}; {_hint(kind, str(error))}") from error
    except _WrongError as error:
        raise UserError(f"{where}: {error}.") from error


class _WrongError(Exception):
    """Its message names the key and the fault."""


class _UnknownKeyError(Exception):
    """Its message is the key."""


def _read(kind: Any, tree: Tree, key: str, within: Range | None = None) -> Any:
    """Return the value of the field `key`."""
    origin, inner = get_origin(kind), get_args(kind)
    is_null = isinstance(tree, Plain) and tree.is_null
    if origin is Annotated:
        return _read_name(inner[1], tree, key) if isinstance(inner[1], OneOf) else _read(inner[0], tree, key, inner[1])
    if origin in (Union, UnionType):
        if NoneType in inner and is_null:
            return None
        kinds = [item for item in inner if item is not NoneType]
        is_truth = isinstance(tree, str) and tree.lower() in _TRUTHS
        return _read(bool if bool in kinds and is_truth else kinds[-1], tree, key, within)
    if is_dataclass(kind):
        return _read_dataclass(kind, {} if is_null else tree, key)
    if origin in (list, tuple):
        return _read_list(origin, inner, [] if is_null else tree, key, within)
    if origin is dict:
        tree = {} if is_null else tree
        if not isinstance(tree, dict):
            raise _wrong(key, tree, "a mapping of names, such as {a: ..., b: ...}")
        _check(key, len(tree), within, "entries")
        return {name: _read(inner[1], item, f"{key}.{name}") for name, item in tree.items()}
    if not isinstance(tree, str):
        raise _wrong(key, tree, _WORDS.get(kind, "a single word") + (": put it in quotes" if kind is str else ""))
    return _read_scalar(kind, inner, tree, key, within)


def _read_dataclass(kind: Any, tree: Tree, key: str) -> Any:
    if not isinstance(tree, dict):
        raise _wrong(key, tree, "keys and values, such as 'name: my-run'")
    before = f"{key}." if key else ""
    hints = _hints(kind)
    unknown = [name for name in tree if name not in hints]
    if unknown:
        raise _UnknownKeyError(f"{before}{unknown[0]}")
    for field in fields(kind):
        if field.name not in tree and field.default is MISSING and field.default_factory is MISSING:
            raise _WrongError(f"{before}{field.name} is missing, and has no default")
    return kind(**{name: _read(hints[name], item, f"{before}{name}") for name, item in tree.items()})


def _read_list(origin: Any, inner: tuple[Any, ...], tree: Tree, key: str, within: Range | None) -> Any:
    if not isinstance(tree, list):
        raise _wrong(key, tree, "a list, such as [...]")
    if origin is tuple:
        if len(tree) != len(inner):
            raise _wrong(key, tree, f"a list of {len(inner)}")
        return tuple(_read(kind, item, f"{key}.{place}") for place, (kind, item) in enumerate(zip(inner, tree, strict=True)))
    _check(key, len(tree), within, "entries")
    return [_read(inner[0], item, f"{key}.{place}") for place, item in enumerate(tree)]


def _read_name(names: OneOf, tree: Tree, key: str) -> str:
    if not isinstance(tree, str) or tree not in names.table:
        raise _wrong(key, tree, str(names))
    return str(tree)


def _read_scalar(kind: Any, inner: tuple[Any, ...], text: str, key: str, within: Range | None) -> Any:
    if get_origin(kind) is Literal:
        if text not in inner:
            raise _wrong(key, text, f"one of {', '.join(inner)}")
        return str(text)
    if kind is str:
        _check(key, len(text), within, "letters")
        return str(text)
    if kind is bool:
        if text.lower() not in _TRUTHS:
            raise _wrong(key, text, _WORDS[bool])
        return _TRUTHS[text.lower()]
    number = decimal(text, whole=kind is int)
    if number is None or (within and not within.holds(number)):
        raise _wrong(key, text, _WORDS[kind] + (f" {within}" if within else ""))
    return number


def decimal(text: str, whole: bool = False) -> float | None:
    """Return the number written in decimal digits, such as 010, -2.5 or 1e-3; None if the text is not one."""
    if len(text) > MOST_DIGITS or not (_WHOLE if whole else _DECIMAL).fullmatch(text):
        return None
    return int(text) if whole else float(text)


def _check(key: str, size: int, within: Range | None, what: str) -> None:
    if within and not within.holds(size):
        raise _WrongError(f"{key} has {size:,} {what}, and may have {within}")


def _wrong(key: str, tree: Tree, wanted: str) -> _WrongError:
    kinds: dict[Any, str] = {list: "a list", dict: "a mapping"}
    there = kinds.get(type(tree)) or f"{' '.join(str(tree).split()) or 'empty'!s:.60}"
    return _WrongError(f"{key or 'it'} is {there}, and must be {wanted}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _hint(kind: type, unknown: str) -> str:
    names = sorted(known_keys(kind))
    before, _, last = unknown.rpartition(".")
    near = nearest(last, {name.rsplit(".", 1)[-1] for name in names})
    paths = [name for name in names if near and name.rsplit(".", 1)[-1] == near[0]]
    if near and f"{re.sub(r'[.][0-9]+', '.0', before)}.{near[0]}" in paths:
        paths = [f"{before}.{near[0]}"]  # in the part that was named
    return f"did you mean {' or '.join(paths)}?" if paths else f"known keys: {', '.join(names)}."


def known_keys(kind: type, before: str = "") -> list[str]:
    """List all keys of a dataclass, with those of a list's first item, and those within mappings: `phases.0.steps`, `sets.NAME.path`."""
    found = []
    for name, hint in _hints(kind).items():
        inner = _dataclass_in(hint)
        within = "0." if _has(list, hint) else "NAME." if _has(dict, hint) else ""
        found += known_keys(inner, f"{before}{name}.{within}") if inner else [f"{before}{name}"]
    return found


def _has(container: type, hint: Any) -> bool:
    return get_origin(hint) is container or any(_has(container, item) for item in get_args(hint))


def _dataclass_in(hint: Any) -> type | None:
    if isinstance(hint, type) and is_dataclass(hint):
        return hint
    return next((found for item in get_args(hint) if (found := _dataclass_in(item))), None)
