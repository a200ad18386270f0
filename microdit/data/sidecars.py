"""Captions as they lie beside pictures: text files, JSON fields, columns. What is missing or broken is named, never guessed."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from microdit.foreign_json import parse_json

CAPTION_NAMES = ("caption", "text", "prompt")  # of columns and fields, the first that exists is used
NO_CAPTION = "no caption"
NOT_UTF8 = "caption is not UTF-8"
TOO_LONG = "caption is too long"
LONGEST_CAPTION = 131_072  # characters; what is longer is no caption. It is also the longest field that the csv module reads.


def caption_text(value: Any) -> str:
    """The caption in a field: a string, or the first string of a list. Empty if there is none; of one that is too long, just too much."""
    if isinstance(value, (list, tuple)):
        value = next((item for item in value if isinstance(item, str)), None)
    return value.strip()[: LONGEST_CAPTION + 1] if isinstance(value, str) else ""


def from_fields(fields: Mapping[str, Any], wanted: Sequence[str]) -> tuple[dict[str, str], str]:
    """The wanted captions among the fields of an object, in the order wanted, and what is wrong if there is none."""
    captions = {name: text for name in wanted if (text := caption_text(fields.get(name)))}
    troubles = {name: trouble for name, text in captions.items() if (trouble := _trouble(text))}
    whole = {name: text for name, text in captions.items() if name not in troubles}
    return whole, "" if whole else next(iter(troubles.values()), NO_CAPTION)


def from_sidecars(files: Mapping[str, bytes], wanted: Sequence[str]) -> tuple[dict[str, str], str]:
    """The wanted captions in the files `txt` (the caption named "caption") and `json` (its fields), and what is wrong if there is none."""
    fields: dict[str, Any] = {}
    broken = ""
    try:
        loaded = parse_json(files["json"]) if "json" in files else {}
        fields = loaded if isinstance(loaded, dict) else {}
    except ValueError:
        broken = "sidecar is not JSON"
    try:
        fields |= {"caption": files["txt"].decode("utf-8-sig")} if "txt" in files else {}
    except UnicodeDecodeError:
        broken = NOT_UTF8
        fields.pop("caption", None)
    captions, problem = from_fields(fields, wanted)
    return captions, broken if problem == NO_CAPTION and broken else problem


def sidecars_for(wanted: Collection[str]) -> frozenset[str]:
    """The files beside a picture that must be read for these captions."""
    return frozenset({"txt", "json"} if "caption" in wanted else {"json"})


def _trouble(caption: str) -> str:
    if len(caption) > LONGEST_CAPTION:
        return TOO_LONG
    try:
        caption.encode()
    except UnicodeEncodeError:  # lone surrogates, from JSON escapes or from bytes that were no UTF-8
        return NOT_UTF8
    return ""
