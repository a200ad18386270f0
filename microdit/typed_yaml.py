"""YAML's text as what a dataclass says it should be: each field by its type, and by the `Range` that stands beside it."""

import difflib
import re
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from microdit.errors import UserError
from microdit.ranges import Range
from microdit.yaml_file import Plain, Tree

MOST_DIGITS = 40

_WHOLE = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WORDS: dict[Any, str] = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


def read_as(kind: type, tree: Tree, where: str) -> Any:
    """Read `tree` as the dataclass `kind`, each field by its type and its `Range`.

    Raises UserError, which names `where`, the key, what is there and what may be.
    """
    try:
        return _read(kind, tree, "")
    except _UnknownKeyError as error:
        raise UserError(f"{where}: unknown key {error!s:.200}; {_hint(kind, str(error))}") from error
    except _WrongError as error:
        raise UserError(f"{where}: {error}.") from error


class _WrongError(Exception):
    """Says key and fault."""


class _UnknownKeyError(Exception):
    """Says the key."""


def _read(kind: Any, tree: Tree, key: str, within: Range | None = None) -> Any:
    """Return the value of the field `key`."""
    origin, inner = get_origin(kind), get_args(kind)
    is_null = isinstance(tree, Plain) and tree.is_null
    if origin is Annotated:
        return _read(inner[0], tree, key, inner[1])
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
    """Return the number that is written there in decimal digits, as 010, -2.5 or 1e-3; None if none is."""
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
    near = difflib.get_close_matches(unknown.rsplit(".", 1)[-1], {name.rsplit(".", 1)[-1] for name in names}, n=1)
    paths = [name for name in names if near and name.rsplit(".", 1)[-1] == near[0]]
    return f"did you mean {' or '.join(paths)}?" if paths else f"known keys: {', '.join(names)}."


def known_keys(kind: type, before: str = "") -> list[str]:
    """List all that a dataclass may say, keys of lists and mappings without their number or name: `phases.steps`."""
    found = []
    for name, hint in _hints(kind).items():
        inner = _dataclass_in(hint)
        found += known_keys(inner, f"{before}{name}.") if inner else [f"{before}{name}"]
    return found


def _dataclass_in(hint: Any) -> type | None:
    if isinstance(hint, type) and is_dataclass(hint):
        return hint
    return next((found for item in get_args(hint) if (found := _dataclass_in(item))), None)
