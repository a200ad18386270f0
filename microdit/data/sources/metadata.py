"""Read captions from text files, JSON fields and columns beside images, and from lists: metadata.jsonl and metadata.csv.

Missing and broken captions are reported, never guessed. Of a list, only the position of every thousandth line is kept in memory.
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

from microdit.data.sources.untrusted_files import ListedImage, Refused, bounded_lines, open_file, roots_of
from microdit.errors import UserError
from microdit.io.untrusted_text import parse_json_object

CAPTION_NAMES = ("caption", "text", "prompt")  # columns and fields with captions; the first one that exists is used
NO_CAPTION = "no caption"
NOT_UTF8 = "caption is not UTF-8"
TOO_LONG = "caption is too long"
LINE_TOO_LONG = "metadata line is too long"
LONGEST_CAPTION = 131_072  # characters; a longer text is no caption. It is also the longest field that the csv module reads.
MOST_NAMES = 100  # field names remembered for the message that none of them holds captions
DIGEST = 16  # bytes
PASSES = 16
BOM = b"\xef\xbb\xbf"


def caption_text(value: Any) -> str:
    """Return the caption in a field: a string, or the first string of a list; empty if there is none.

    A caption that is too long is cut one character after the limit, so that it is still recognised as too long.
    """
    if isinstance(value, (list, tuple)):
        value = next((item for item in value if isinstance(item, str)), None)
    return value.strip()[: LONGEST_CAPTION + 1] if isinstance(value, str) else ""


def from_fields(fields: Mapping[str, Any], wanted: Sequence[str]) -> tuple[dict[str, str], str]:
    """Return those of the `wanted` captions that the fields of an object hold, and the problem if there is none, else ""."""
    captions = {name: text for name in wanted if (text := caption_text(fields.get(name)))}
    troubles = {name: trouble for name, text in captions.items() if (trouble := _caption_problem(text))}
    whole = {name: text for name, text in captions.items() if name not in troubles}
    return whole, "" if whole else next(iter(troubles.values()), NO_CAPTION)


def from_sidecars(files: Mapping[str, bytes], wanted: Sequence[str]) -> tuple[dict[str, str], str]:
    """Return those of the `wanted` captions that the files beside an image hold, and the problem if there is none, else "".

    `files` maps extensions to contents: `txt` holds the caption named "caption", `json` an object whose fields are captions.
    """
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
    """Return the extensions of the files beside an image that must be read for these captions."""
    return frozenset({"txt", "json"} if "caption" in wanted else {"json"})


def _caption_problem(caption: str) -> str:
    if len(caption) > LONGEST_CAPTION:
        return TOO_LONG
    try:
        caption.encode()
    except UnicodeEncodeError:  # lone surrogates, from JSON escapes or from bytes that are not UTF-8
        return NOT_UTF8
    return ""


class LinePosition(NamedTuple):
    """A position between two records of a list: the bytes and lines before it, and the header of a CSV list once it has been read."""

    offset: int = 0
    lines: int = 0
    header: tuple[str, ...] | None = None


Line = tuple[int, dict[str, Any] | str]
"""The number of a line, and its fields or its problem."""


@dataclass(frozen=True)
class MetadataLines:
    """The records of a list, which are read again when they are needed.

    `state` is the size and modification time of the list when it was indexed. `positions[i]` is where record `step * i` begins. `repeated`
    holds the numbers of the records whose file an earlier record names, and `names` the names of the fields.
    """

    path: Path
    state: tuple[int, int]
    count: int
    step: int
    positions: list[LinePosition]
    repeated: NDArray[np.int64]  # sorted
    names: frozenset[str]

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int, wanted: Sequence[str]) -> list[ListedImage]:
        """Read records `start` to `stop` with the captions `wanted`. Raises UserError if the list has changed since it was indexed."""
        stop = min(stop, self.count)
        if start >= stop:
            return []
        repeated = set(self.repeated[np.searchsorted(self.repeated, start) : np.searchsorted(self.repeated, stop)].tolist())
        read: list[ListedImage] = []
        with _opened(self.path) as text:
            unchanged = text.state() == self.state
            lines = text.lines(self.positions[start // self.step]) if unchanged else iter(())
            for position, line in zip(range(start - start % self.step, stop), lines, strict=False):
                if position >= start:
                    read.append(_listed(self.path.name, line, wanted, position in repeated))
            unchanged = unchanged and text.state() == self.state
        if not unchanged:
            raise UserError(
                f"{self.path} has changed since its lines were indexed, or differs between the processes: run the same command again."
            )
        return read


def find_lines(path: Path, wanted: Sequence[str], step: int) -> tuple[MetadataLines, bytearray]:
    """Index the records of a list, every `step`-th one by its position. Also returns the concatenated digests of their file names.

    `repeated` is left empty: the caller sets it, from all digests.
    """
    positions: list[LinePosition] = []
    names: set[str] = set()
    digests = bytearray()
    count = 0
    with _opened(path) as text:
        state, position = text.state(), LinePosition()
        for number, fields in text.lines(position):
            if count % step == 0:
                positions.append(position)
            position = text.position
            if isinstance(fields, dict) and not names.issuperset(fields):
                names.update(name for name in fields if name in wanted or len(names) < MOST_NAMES)
            file = _file_of(fields) if isinstance(fields, dict) else ""
            digests += digest_of(file) if file else number.to_bytes(DIGEST, "big")  # without a name: differs from all others
            count += 1
    return MetadataLines(path, state, count, step, positions, np.zeros(0, np.int64), frozenset(names)), digests


def digest_of(file: str) -> bytes:
    """Return a digest of a file name, DIGEST bytes long."""
    return hashlib.blake2b(file.encode(errors="surrogatepass"), digest_size=DIGEST).digest()


def repeated_in(digests: bytearray) -> NDArray[np.bool_]:
    """Return which of the concatenated digests equal an earlier one, (N,).

    Works in several passes, each over a share of the digests, so that it needs little memory beside them.
    """
    halves_N2, first_N = np.frombuffer(digests, np.uint64).reshape(-1, 2), np.frombuffer(digests, np.uint8)[::DIGEST] % PASSES
    repeated = np.zeros(len(halves_N2), np.bool_)
    for number in range(PASSES):
        share = np.flatnonzero(first_N == number)
        these = halves_N2[share]
        order = np.lexsort((these[:, 1], these[:, 0]))  # stable: the first of several equal digests stays first
        same = (these[order[1:]] == these[order[:-1]]).all(axis=1)
        repeated[share[order[1:][same]]] = True
    return repeated


def caption_name(lines: MetadataLines) -> str:
    """Return the name of the field that holds the captions. Raises UserError if there is none."""
    for name in CAPTION_NAMES:
        if name in lines.names:
            return name
    others = ", ".join(sorted(lines.names - {"file_name"})) or "nothing"
    raise UserError(f"{lines.path} has no {', '.join(CAPTION_NAMES)}: say which of its fields hold captions ({others}).")


def _file_of(fields: dict[str, Any]) -> str:
    """Return the file that a line names, relative to the folder; empty if it names none."""
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


def _opened(path: Path) -> "_OpenList":
    try:
        return _OpenList(path)
    except Refused as refused:
        raise UserError(f"{path} cannot be used: {refused.reason}. Put the file itself there.") from refused


class _OpenList(io.TextIOWrapper):
    """An open list that counts the bytes read. Bytes that are not UTF-8 are kept as surrogates, so that only their field is affected."""

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
        """Yield the lines from `start` on; after each, `position` is where the next one begins. May be called once."""
        self._offset = max(start.offset, self._begins)
        self._header = start.header
        self._file.seek(self._offset)
        self._numbered = _Numbered(bounded_lines(self), start.lines)
        return self._json_lines() if self._json else self._csv_lines()

    @property
    def position(self) -> LinePosition:
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
    """Numbered lines for csv.reader. A line that is too long is an error of its row, and the next row begins after it."""

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
