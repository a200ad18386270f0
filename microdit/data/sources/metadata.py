"""Find captions and file names in the fields of objects and tables, and in text files beside images.

Missing and broken captions are reported, never guessed.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from microdit.io.untrusted_text import decode_text, parse_json_object

# Names of columns and fields in lower case, without separators; the first one that exists is used.
CAPTION_NAMES = ("caption", "text", "prompt")
MORE_CAPTION_NAMES = ("title", "description", "name")  # used if there is none of those
FILE_NAMES = ("filename", "file", "filepath", "image", "imagepath", "imagefile", "imagefilename", "path", "url", "imageurl")

NO_CAPTION = "no caption"
NOT_TEXT = "caption is not text"
NOT_UTF8 = "caption is not UTF-8"
NOT_JSON = "sidecar is not JSON"
TOO_LONG = "caption is too long"
CAPTION_PROBLEMS = frozenset({NO_CAPTION, NOT_TEXT, NOT_UTF8, NOT_JSON, TOO_LONG})  # of records whose image may be good
LONGEST_CAPTION = 131_072  # characters; a longer text is no caption. It is also the longest field that the csv module reads.
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def find_name(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """Return the first of the `wanted` names that is among `names`, as it is written there: in any case, with or without separators."""
    by_normal: dict[str, str] = {}
    for name in names:
        by_normal.setdefault(re.sub(r"[\s_-]", "", name).lower(), name)
    return next((by_normal[name] for name in wanted if name in by_normal), None)


def find_caption_name(names: Collection[str]) -> str | None:
    """Return the name of the column or field that usually holds captions."""
    return find_name(names, CAPTION_NAMES) or find_name(names, MORE_CAPTION_NAMES)


def file_named(fields: Mapping[str, Any], column: str | None = None) -> str:
    """Return the file, or the URL, that fields name, in this column or in one with a usual name; empty if they name none."""
    column = column or _file_column(tuple(fields))
    value = field_of(fields, column) if column else None
    if isinstance(value, Mapping):  # as the `datasets` library writes images
        value = value.get("path")
    return value if isinstance(value, str) else ""


def url_in(fields: Mapping[str, Any]) -> str:
    """Return the address from which an image comes, if a field named `url` holds it."""
    url = fields.get("url")
    return url if isinstance(url, str) and is_url(url) else ""


def is_url(file: str) -> bool:
    """Return whether a file name is the address of a file elsewhere."""
    return _URL.match(file) is not None


def field_of(fields: Mapping[str, Any], name: str) -> Any:
    """Return a field by its name, or by its path ("metadata.caption") through objects, which may be stored as JSON text; else None."""
    if name in fields:
        return fields[name]
    for key, value in fields.items():
        if key.lower() == name.lower():
            return value
    head, dot, rest = name.partition(".")
    inner = fields.get(head) if dot else None
    if isinstance(inner, str):
        try:
            inner = parse_json_object(inner)
        except ValueError:
            return None
    return field_of(inner, rest) if isinstance(inner, Mapping) else None


def caption_text(value: Any) -> str:
    """Return the caption in a field: a string, or the first string with text in a list, or in lists in it; empty if there is none.

    A caption that is too long is cut one character after the limit, so that it is still recognised as too long.
    """
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, (list, tuple)):
            left.extend(reversed(item))
        elif isinstance(item, str) and (text := item.strip()):
            return text[: LONGEST_CAPTION + 1]
    return ""


def from_fields(fields: Mapping[str, Any], wanted: Sequence[str]) -> tuple[dict[str, str], str]:
    """Return those of the `wanted` captions that the fields of an object hold, and the problem if there is none, else ""."""
    values = {name: field_of(fields, name) for name in wanted}
    captions = {name: text for name, value in values.items() if (text := caption_text(value))}
    troubles = {name: trouble for name, text in captions.items() if (trouble := _caption_problem(text))}
    whole = {name: text for name, text in captions.items() if name not in troubles}
    if whole:
        return whole, ""
    missing = NOT_TEXT if any(_is_no_text(value) for value in values.values()) else NO_CAPTION
    return {}, next(iter(troubles.values()), missing)


def from_sidecars(files: Mapping[str, bytes], wanted: Sequence[str]) -> tuple[dict[str, str], str]:
    """Return those of the `wanted` captions that the files beside an image hold, and the problem if there is none, else "".

    `files` maps extensions to contents: `txt` holds the caption named "caption", `json` an object whose fields are captions. Without a
    `txt`, any usual field stands for "caption". An extension such as `prompt.txt` holds the caption of that name.
    """
    return captions_in(*sidecar_fields(files), wanted)


def sidecar_fields(files: Mapping[str, bytes]) -> tuple[dict[str, Any], str]:
    """Return the fields that the files beside an image hold, and the problem with one of them, else ""."""
    fields: dict[str, Any] = {}
    broken = ""
    for extension in sorted(files, key=lambda extension: (extension.endswith("txt"), extension.count("."))):
        name, _, kind = extension.rpartition(".")
        try:
            if kind == "json":
                found = parse_json_object(files[extension])
                fields = {**found, **fields, **({name: found} if name else {})}
            else:
                fields[name or "caption"] = decode_text(files[extension])
        except UnicodeDecodeError:
            broken = NOT_UTF8
            fields.pop(name or "caption", None)
        except ValueError:
            broken = NOT_JSON
    if "txt" not in files and not caption_text(fields.get("caption")):
        other = find_caption_name([name for name in fields if name != "caption"])
        fields |= {"caption": fields[other]} if other else {}
    return fields, broken


def captions_in(fields: Mapping[str, Any], broken: str, wanted: Sequence[str]) -> tuple[dict[str, str], str]:
    """Return those of the `wanted` captions that fields of sidecars hold, and the problem if there is none, else ""."""
    captions, problem = from_fields(fields, wanted)
    return captions, broken if problem == NO_CAPTION and broken else problem


def sidecars_for(wanted: Collection[str]) -> frozenset[str]:
    """Return the extensions of the files beside an image that must be read for these captions."""
    return frozenset({"txt", "json"} if "caption" in wanted else {"json"})


@lru_cache(maxsize=256)
def _file_column(names: tuple[str, ...]) -> str | None:
    return find_name(names, FILE_NAMES)


def _is_no_text(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_is_no_text(item) for item in value)
    return value is not None and not isinstance(value, str)


def _caption_problem(caption: str) -> str:
    if len(caption) > LONGEST_CAPTION:
        return TOO_LONG
    try:
        caption.encode()
    except UnicodeEncodeError:  # lone surrogates, from JSON escapes or from bytes that are not UTF-8
        return NOT_UTF8
    return ""
