"""A folder of pictures, captioned by text files beside them or by one list at its top. Every picture and every line counts once."""

import csv
import hashlib
import io
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from microdit.data.sidecars import CAPTION_NAMES, caption_text, from_fields, from_sidecars, sidecars_for
from microdit.data.sources import Part, Record, Source
from microdit.data.untrusted import (
    LARGEST_TEXT,
    NO_FILE,
    OUTSIDE,
    Refused,
    bounded_lines,
    lies_in,
    open_file,
    read_file,
    roots_of,
)
from microdit.errors import UserError
from microdit.foreign_json import parse_json

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LISTS = ("metadata.jsonl", "metadata.csv")
PART_SIZE = 1000  # pictures
MOST_NAMES = 100  # of fields, remembered for the message that none of them holds captions
LINE_TOO_LONG = "metadata line is too long"


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
        return Source(folder.absolute().name, parts_of(images, folder, tuple(weights)), weights)
    lines, names = _read_list(lists[0], tuple(captions or CAPTION_NAMES))
    weights = captions or {_caption_name(names, lists[0]): 1.0}
    listed = _listed(lists[0].name, lines, images, tuple(weights))
    return Source(folder.absolute().name, parts_of(listed, folder), weights)


def find_images(folder: Path) -> list[Listed]:
    """The pictures below `folder`, sorted; also the folders that are not looked into: behind links that lead out, or locked."""
    found: list[Listed] = []
    roots = roots_of(folder)

    def note_locked(error: OSError) -> None:
        name = Path(error.filename).relative_to(folder).as_posix()
        found.append(Listed(name, name, problem="folder cannot be read"))

    for place, folders, files in os.walk(folder, onerror=note_locked):
        inside = Path(place).relative_to(folder)
        names = [(inside / name).as_posix() for name in files if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]
        found += [Listed(name, name) for name in names]
        linked = [Path(place, name) for name in folders if os.path.islink(os.path.join(place, name))]
        outside = [(inside / path.name).as_posix() for path in linked if not lies_in(path, roots)]
        found += [Listed(name, name, problem=OUTSIDE) for name in outside]
    return sorted(found, key=lambda listed: listed.key)


def parts_of(listed: list[Listed], folder: Path, captions_beside: tuple[str, ...] = ()) -> list[Part]:
    """Parts of `PART_SIZE` pictures each, files of `folder`. `captions_beside` are read from the files beside them."""
    parts = []
    for start in range(0, len(listed), PART_SIZE):
        share = listed[start : start + PART_SIZE]
        read = partial(_read_with_sidecars, folder, captions_beside) if captions_beside else partial(read_listed, folder)
        known = hashlib.sha256(repr(share).encode(errors="surrogatepass")).hexdigest()
        parts.append(Part(f"{start:09d}", partial(read, share), partial(_files_of, folder, captions_beside, share), known))
    return parts


def read_listed(folder: Path, listed: Iterable[Listed]) -> Iterator[Record]:
    """Open the files."""
    roots = roots_of(folder)
    for item in listed:
        image, trouble = (b"", item.problem) if item.problem else read_file(folder / item.file, roots)
        yield Record(item.key, item.captions, image, trouble)


def _read_with_sidecars(folder: Path, wanted: tuple[str, ...], listed: list[Listed]) -> Iterator[Record]:
    roots = roots_of(folder)
    for record, item in zip(read_listed(folder, listed), listed, strict=True):
        beside = {kind: read_file((folder / item.file).with_suffix(f".{kind}"), roots, LARGEST_TEXT) for kind in sidecars_for(wanted)}
        captions, problem = from_sidecars({kind: content for kind, (content, trouble) in beside.items() if not trouble}, wanted)
        unread = next((trouble for _, trouble in beside.values() if trouble not in ("", NO_FILE)), "")
        yield Record(item.key, captions, record.image, record.problem or (problem and (unread or problem)))


def _files_of(folder: Path, captions_beside: tuple[str, ...], listed: list[Listed]) -> Iterator[Path]:
    suffixes = sorted(sidecars_for(captions_beside)) if captions_beside else []
    for item in listed:
        if not item.problem:
            yield folder / item.file
            yield from ((folder / item.file).with_suffix(f".{suffix}") for suffix in suffixes)


# A line of a list: where it stands, and the fields that are needed of it, or what is wrong with it.
Line = tuple[int, dict[str, Any] | str]


def _read_list(path: Path, wanted: Sequence[str]) -> tuple[list[Line], set[str]]:
    """The lines, and the names of their fields."""
    lines: list[Line] = []
    names: set[str] = set()
    try:
        with open_file(path, roots_of(path.parent)) as file:
            json_lines = path.suffix == ".jsonl"
            # So that only the field that is no UTF-8 suffers. Of all fields no more is kept than is needed.
            text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="\n" if json_lines else "")
            for number, fields in (_json_lines if json_lines else _csv_lines)(text):
                if isinstance(fields, dict):
                    names.update(name for name in fields if name in wanted or len(names) < MOST_NAMES)
                    file_name = fields.get("file_name")
                    captions = {name: caption_text(fields[name]) for name in wanted if name in fields}
                    fields = captions | {"file_name": file_name if isinstance(file_name, str) else ""}
                lines.append((number, fields))
    except Refused as refused:
        raise UserError(f"{path} cannot be used: {refused.reason}. Put the file itself there.") from refused
    return lines, names


def _json_lines(file: TextIO) -> Iterator[Line]:
    for number, line in enumerate(bounded_lines(file), 1):
        if line is None:
            yield number, LINE_TOO_LONG
        elif line.strip():
            try:
                fields = parse_json(line)
            except ValueError:
                fields = None
            yield number, fields if isinstance(fields, dict) else "metadata line is not JSON"


class _CsvLines:
    """Lines for csv.reader. One that is too long is an error of its row, and the next row begins behind it."""

    def __init__(self, file: TextIO):
        self.number = 0
        self._lines = bounded_lines(file)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        if line is None:
            raise csv.Error("line is too long")
        return line


def _csv_lines(file: TextIO) -> Iterator[Line]:
    lines, header = _CsvLines(file), None
    reader = csv.reader(lines)
    while True:
        try:
            row = next(reader, None)
        except csv.Error:  # the line, or a field of it, is too long
            yield lines.number, LINE_TOO_LONG
            continue
        if row is None:
            return
        if header is None:
            header = row or None
        elif row:
            yield lines.number, dict(zip(header, row, strict=False))


def _caption_name(names: set[str], path: Path) -> str:
    for name in CAPTION_NAMES:
        if name in names:
            return name
    others = ", ".join(sorted(names - {"file_name"})) or "nothing"
    raise UserError(f"{path} has no {', '.join(CAPTION_NAMES)}: say which of its fields are captions ({others}).")


def _listed(list_name: str, lines: list[Line], images: list[Listed], wanted: Sequence[str]) -> list[Listed]:
    """The lines in their order, then the pictures that none of them names."""
    listed: list[Listed] = []
    seen = set()
    for number, fields in lines:
        key = f"{list_name}#{number}"
        if isinstance(fields, str):
            listed.append(Listed(key, "", problem=fields))
        elif not fields.get("file_name"):
            listed.append(Listed(key, "", problem="metadata line names no file"))
        elif (file := posixpath.normpath(fields["file_name"])) in seen:
            listed.append(Listed(key, file, problem="listed twice"))
        elif file.startswith(("/", "../")) or file == "..":
            seen.add(file)
            listed.append(Listed(key, file, problem="file lies outside the folder"))
        else:
            seen.add(file)
            captions, problem = from_fields(fields, wanted)
            listed.append(Listed(file, file, captions, problem))
    return listed + [image if image.problem else replace(image, problem="no caption") for image in images if image.file not in seen]
