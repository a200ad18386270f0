"""Captions as they lie beside pictures: text files, JSON fields, columns. What is missing or broken is named, never guessed.

metadata.jsonl and metadata.csv: the lines of a list, of which only is remembered where each thousandth begins.
"""

import csv
import hashlib
import io
import os
import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from microdit.data.sources.files import ListedImage, Refused, bounded_lines, open_file, roots_of
from microdit.errors import UserError
from microdit.io.text import parse_json_object

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
        fields = parse_json_object(files["json"]) if "json" in files else {}
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


MOST_NAMES = 100  # of fields, remembered for the message that none of them holds captions
DIGEST = 16  # bytes
PASSES = 16
LINE_TOO_LONG = "metadata line is too long"
BOM = b"\xef\xbb\xbf"


class LinePosition(NamedTuple):
    """Between two records: how many bytes and lines lie before it, and the header of a CSV list once it has been read."""

    offset: int = 0
    lines: int = 0
    header: tuple[str, ...] | None = None


Line = tuple[int, dict[str, Any] | str]
"""Its number, and its fields or what is wrong with it."""


@dataclass(frozen=True)
class MetadataLines:
    """The records of a list. `places[i]` is where number `step * i` begins; `repeated` are the numbers of those whose file came before.

    `state` is the size and the time of the file when this was so; `names` are those of its fields.
    """

    path: Path
    state: tuple[int, int]
    count: int
    step: int
    places: list[LinePosition]
    repeated: NDArray[np.int64]  # sorted
    names: frozenset[str]

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int, wanted: Sequence[str]) -> list[ListedImage]:
        """Raises UserError if the list has changed since."""
        stop = min(stop, self.count)
        if start >= stop:
            return []
        repeated = set(self.repeated[np.searchsorted(self.repeated, start) : np.searchsorted(self.repeated, stop)].tolist())
        read: list[ListedImage] = []
        with _opened(self.path) as text:
            unchanged = text.state() == self.state
            lines = text.lines(self.places[start // self.step]) if unchanged else iter(())
            for position, line in zip(range(start - start % self.step, stop), lines, strict=False):
                if position >= start:
                    read.append(_listed(self.path.name, line, wanted, position in repeated))
            unchanged = unchanged and text.state() == self.state
        if not unchanged:
            raise UserError(
                f"{self.path} has changed since its lines were listed, or is not the same for all processes: run the same command again."
            )
        return read


def find_lines(path: Path, wanted: Sequence[str], step: int) -> tuple[MetadataLines, bytearray]:
    """The records of a list, and the digest of each one's file name. Whoever knows all digests says which are `repeated`."""
    places: list[LinePosition] = []
    names: set[str] = set()
    digests = bytearray()
    count = 0
    with _opened(path) as text:
        state, place = text.state(), LinePosition()
        for number, fields in text.lines(place):
            if count % step == 0:
                places.append(place)
            place = text.place
            if isinstance(fields, dict) and not names.issuperset(fields):
                names.update(name for name in fields if name in wanted or len(names) < MOST_NAMES)
            file = _file_of(fields) if isinstance(fields, dict) else ""
            digests += digest_of(file) if file else number.to_bytes(DIGEST, "big")  # no name: like no other's
            count += 1
    return MetadataLines(path, state, count, step, places, np.zeros(0, np.int64), frozenset(names)), digests


def digest_of(file: str) -> bytes:
    return hashlib.blake2b(file.encode(errors="surrogatepass"), digest_size=DIGEST).digest()


def repeated_in(digests: bytearray) -> NDArray[np.bool_]:
    """Which digests came before. In several passes, each over a share of them, so that hardly more is held than the digests."""
    halves_N2, first_N = np.frombuffer(digests, np.uint64).reshape(-1, 2), np.frombuffer(digests, np.uint8)[::DIGEST] % PASSES
    repeated = np.zeros(len(halves_N2), np.bool_)
    for number in range(PASSES):
        share = np.flatnonzero(first_N == number)
        these = halves_N2[share]
        order = np.lexsort((these[:, 1], these[:, 0]))  # stable: of the same ones the first comes first
        same = (these[order[1:]] == these[order[:-1]]).all(axis=1)
        repeated[share[order[1:][same]]] = True
    return repeated


def caption_name(lines: MetadataLines) -> str:
    """The field that holds the captions. Raises UserError if there is none."""
    for name in CAPTION_NAMES:
        if name in lines.names:
            return name
    others = ", ".join(sorted(lines.names - {"file_name"})) or "nothing"
    raise UserError(f"{lines.path} has no {', '.join(CAPTION_NAMES)}: say which of its fields are captions ({others}).")


def _file_of(fields: dict[str, Any]) -> str:
    """The file that a line names, below the folder; empty if it names none."""
    name = fields.get("file_name")
    return posixpath.normpath(name) if name and isinstance(name, str) else ""


def _listed(list_name: str, line: Line, wanted: Sequence[str], repeated: bool) -> ListedImage:
    number, fields = line
    key = f"{list_name}#{number}"
    if isinstance(fields, str):
        return ListedImage(key, "", problem=fields)
    file = _file_of(fields)
    if not file:
        return ListedImage(key, "", problem="metadata line names no file")
    if repeated:
        return ListedImage(key, file, problem="listed twice")
    if file.startswith(("/", "../")) or file == "..":
        return ListedImage(key, file, problem="file lies outside the folder")
    captions, problem = from_fields(fields, wanted)
    return ListedImage(file, file, captions, problem)


def _opened(path: Path) -> "_List":
    try:
        return _List(path)
    except Refused as refused:
        raise UserError(f"{path} cannot be used: {refused.reason}. Put the file itself there.") from refused


class _List(io.TextIOWrapper):
    """The file, which knows how many bytes of it were read: what is no UTF-8 is kept as it is, so that only its field suffers."""

    def __init__(self, path: Path):
        self._file = file = open_file(path, roots_of(path.parent))
        self._json = path.suffix == ".jsonl"
        self._begins = len(BOM) if file.read(len(BOM)) == BOM else 0
        super().__init__(file, "utf-8", errors="surrogateescape", newline="\n" if self._json else "")

    def state(self) -> tuple[int, int]:
        status = os.fstat(self.fileno())
        return status.st_size, status.st_mtime_ns

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        text = super().readline(size)
        self._offset += len(text) if text.isascii() else len(text.encode(errors="surrogateescape"))
        return text

    def lines(self, start: LinePosition) -> Iterator[Line]:
        """Behind each, `place` is where the next one begins. Only once."""
        self._offset = max(start.offset, self._begins)
        self._header = start.header
        self._file.seek(self._offset)
        self._numbered = _Numbered(bounded_lines(self), start.lines)
        return self._json_lines() if self._json else self._csv_lines()

    @property
    def place(self) -> LinePosition:
        return LinePosition(self._offset, self._numbered.number, self._header)

    def _json_lines(self) -> Iterator[Line]:
        for line in self._numbered.lines:
            self._numbered.number += 1
            if line is None:
                yield self._numbered.number, LINE_TOO_LONG
            elif line.strip():
                try:
                    yield self._numbered.number, parse_json_object(line)
                except ValueError:
                    yield self._numbered.number, "metadata line is not JSON"

    def _csv_lines(self) -> Iterator[Line]:
        reader = csv.reader(self._numbered)
        while True:
            try:
                row = next(reader, None)
            except csv.Error:  # the line, or a field of it, is too long
                yield self._numbered.number, LINE_TOO_LONG
                continue
            if row is None:
                return
            if self._header is None:
                self._header = tuple(row) or None
            elif row:
                yield self._numbered.number, dict(zip(self._header, row, strict=False))


class _Numbered:
    """Lines for csv.reader. One that is too long is an error of its row, and the next row begins behind it."""

    def __init__(self, lines: Iterator[str | None], number: int):
        self.lines, self.number = lines, number

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.number += 1
        if line is None:
            raise csv.Error("line is too long")
        return line
