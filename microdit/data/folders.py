"""A folder of pictures, captioned by text files beside them or by one list at its top. Every picture and every line counts once."""

import csv
import io
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from microdit.data.sidecars import CAPTION_NAMES, from_fields, from_sidecars, sidecars_for
from microdit.data.sources import Part, Record, Source
from microdit.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LISTS = ("metadata.jsonl", "metadata.csv")
PART_SIZE = 1000  # pictures


@dataclass(frozen=True)
class Listed:
    """What is known of a picture before its file is opened. `file` is relative to the folder."""

    key: str
    file: str
    captions: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def folder_source(folder: Path, captions: dict[str, float] | None = None) -> Source:
    """All pictures below `folder`, in the order of their paths. Raises UserError if there is none, or if the list has no captions."""
    images = find_images(folder)
    if not images:
        raise UserError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}), nor archives, nor tables.")
    lists = [folder / name for name in LISTS if (folder / name).is_file()]
    if len(lists) > 1:
        raise UserError(f"{folder} holds both {LISTS[0]} and {LISTS[1]}: remove the one that should not be used.")
    if not lists:
        weights = captions or {"caption": 1.0}
        return Source(folder.absolute().name, parts_of(images, partial(_read_with_sidecars, folder, tuple(weights))), weights)
    lines = _json_lines(lists[0]) if lists[0].suffix == ".jsonl" else _csv_lines(lists[0])
    weights = captions or {_caption_name(lines, lists[0]): 1.0}
    listed = _listed(folder, lists[0].name, lines, images, tuple(weights))
    return Source(folder.absolute().name, parts_of(listed, partial(read_listed, folder)), weights)


def find_images(folder: Path) -> list[str]:
    """Paths of the pictures below `folder`, relative to it, sorted."""
    found = []
    for place, _, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        found += [(inside / name).as_posix() for name in files if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def parts_of(items: list[Any], read: "partial[Iterator[Record]]") -> list[Part]:
    """Parts of `PART_SIZE` items each, which `read(items)` turns into records."""
    starts = range(0, len(items), PART_SIZE)
    return [Part(f"{start:09d}", partial(read, items[start : start + PART_SIZE])) for start in starts]


def read_listed(folder: Path, listed: Iterable[Listed]) -> Iterator[Record]:
    """Open the files."""
    for item in listed:
        image, trouble = (b"", item.problem) if item.problem else read_file(folder / item.file)
        yield Record(item.key, item.captions, image, trouble)


def read_file(path: Path) -> tuple[bytes, str]:
    """The content, or why there is none."""
    try:
        return path.read_bytes(), ""
    except FileNotFoundError:
        return b"", "no such file"
    except OSError:
        return b"", "file cannot be read"


def _read_with_sidecars(folder: Path, wanted: tuple[str, ...], images: list[str]) -> Iterator[Record]:
    for name in images:
        image, trouble = read_file(folder / name)
        beside = {kind: read_file((folder / name).with_suffix(f".{kind}")) for kind in sidecars_for(wanted)}
        captions, problem = from_sidecars({kind: content for kind, (content, missing) in beside.items() if not missing}, wanted)
        yield Record(name, captions, image, trouble or problem)


# A line of a list: where it stands, and its fields; None if it is broken.
Line = tuple[int, dict[str, Any] | None]


def _json_lines(path: Path) -> list[Line]:
    lines: list[Line] = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line.decode(errors="surrogateescape"))  # so that only the field that is no UTF-8 suffers
        except ValueError:
            fields = None
        lines.append((number, fields if isinstance(fields, dict) else None))
    return lines


def _csv_lines(path: Path) -> list[Line]:
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        return [(reader.line_num, fields) for fields in reader]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}, is not CSV: {error}.") from error


def _caption_name(lines: list[Line], path: Path) -> str:
    names = {name for _, fields in lines if fields for name in fields}
    for name in CAPTION_NAMES:
        if name in names:
            return name
    others = ", ".join(sorted(str(name) for name in names - {"file_name"})) or "nothing"
    raise UserError(f"{path} has no {', '.join(CAPTION_NAMES)}: say which of its fields are captions ({others}).")


def _listed(folder: Path, list_name: str, lines: list[Line], images: list[str], wanted: Sequence[str]) -> list[Listed]:
    """The lines in their order, then the pictures that none of them names."""
    listed: list[Listed] = []
    present, seen = set(images), set()
    for number, fields in lines:
        key = f"{list_name}#{number}"
        if fields is None:
            listed.append(Listed(key, "", problem="metadata line is not JSON"))
        elif not isinstance(fields.get("file_name"), str) or not fields["file_name"]:
            listed.append(Listed(key, "", problem="metadata line names no file"))
        elif (file := posixpath.normpath(fields["file_name"])) in seen:
            listed.append(Listed(key, file, problem="listed twice"))
        elif file.startswith(("/", "../")) or file == "..":
            seen.add(file)
            listed.append(Listed(key, file, problem="file lies outside the folder"))
        else:
            seen.add(file)
            captions, problem = from_fields(fields, wanted)
            missing = file not in present and not (folder / file).is_file()
            listed.append(Listed(file, file, captions, "no such file" if missing else problem))
    return listed + [Listed(name, name, problem="no caption") for name in images if name not in seen]
