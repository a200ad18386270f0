"""Read lists of images with captions: JSON lines and CSV.

Of a list, only the position of every thousandth line is kept in memory. A line that does not fit its header is rejected; what would change
the meaning of many lines in silence, such as a quote that is never closed, is refused with its line.
"""

import csv
import hashlib
import io
import os
import posixpath
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from microdit.data.sources.metadata import (
    CAPTION_NAMES,
    FILE_NAMES,
    file_named,
    find_caption_name,
    find_name,
    from_fields,
    is_url,
    url_in,
)
from microdit.data.sources.untrusted_files import ListedImage, Refused, bounded_lines, open_file, roots_of
from microdit.errors import UserError
from microdit.io.untrusted_text import parse_json_object

LINE_TOO_LONG = "metadata line is too long"
TOO_MANY_FIELDS = "metadata line has more fields than the header"
BAD_QUOTES = "quotes in the metadata line are not closed as they should be"
MOST_NAMES = 100  # field names remembered for the message that none of them holds captions
DIGEST = 16  # bytes
PASSES = 16
BOM = b"\xef\xbb\xbf"
DELIMITERS = (",", ";", "\t", "|")
LISTS = ("metadata.jsonl", "metadata.csv", "metadata.tsv")  # names of the lists that caption the images beside them
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
LIST_SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv", ".txt")


class LinePosition(NamedTuple):
    """A position between two records of a list: the bytes and lines before it, and the header of a CSV list once it has been read."""

    offset: int = 0
    lines: int = 0
    header: tuple[str, ...] | None = None
    delimiter: str = ","


Line = tuple[int, dict[str, Any] | str]
"""The number of a line, and its fields or its problem."""


@dataclass(frozen=True)
class MetadataLines:
    """The records of a list, which are read again when they are needed.

    `state` is the size and modification time of the list when it was indexed. `positions[i]` is where record `step * i` begins. `repeated`
    holds the numbers of the records whose file an earlier record names, and `names` how many records have each field. `captioned`
    of them have one with a usual name of captions. `file_column` names the field with the files, if it is not a usual one. `inside` is the
    list's folder within the source, such as "birds/", to which its file names are relative. `caption_column` names the field that is read
    as the caption "caption"; if it is empty, captions are read by their own names.
    """

    path: Path
    state: tuple[int, int]
    count: int
    step: int
    positions: list[LinePosition]
    repeated: NDArray[np.int64]  # sorted
    names: dict[str, int]
    captioned: int = 0
    file_column: str | None = None
    inside: str = ""
    caption_column: str = ""

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
                    read.append(self._listed(line, wanted, position in repeated))
            unchanged = unchanged and text.state() == self.state
        if not unchanged:
            raise UserError(
                f"{self.path} has changed since its lines were indexed, or differs between the processes: run the same command again."
            )
        return read

    def _listed(self, line: Line, wanted: Sequence[str], repeated: bool) -> ListedImage:
        number, fields = line
        key = f"{self.inside}{self.path.name}#{number}"
        if isinstance(fields, str):
            return ListedImage(key, "", problem=fields)
        file = relative_file(file_named(fields, self.file_column), self.path.parent)
        if not file:
            return ListedImage(key, "", problem="metadata line names no file")
        if is_url(file):
            return ListedImage(key, "", problem="metadata line names a URL and no file")
        if repeated:
            return ListedImage(key, self.inside + file, problem="listed twice")
        if file.startswith(("/", "../")) or file == "..":
            return ListedImage(key, self.inside + file, problem="file lies outside the folder")
        captions, problem = from_fields(fields, [self.caption_column] if self.caption_column else wanted)
        if self.caption_column and captions:
            captions = {"caption": captions[self.caption_column]}
        return ListedImage(self.inside + file, self.inside + file, captions, problem, url_in(fields))


def find_lines(
    path: Path, wanted: Sequence[str], step: int, file_column: str | None = None, inside: str = ""
) -> tuple[MetadataLines, bytearray]:
    """Index the records of a list, every `step`-th one by its position. Also returns the concatenated digests of their file names.

    `repeated` is left empty: the caller sets it, from all digests. Raises UserError if no line names a file, if all name URLs, or if the
    list is in a form that is not read.
    """
    positions: list[LinePosition] = []
    names: Counter[str] = Counter()
    digests = bytearray()
    count = files = urls = captioned = 0
    with _opened(path) as text:
        state, position = text.state(), LinePosition()
        for number, fields in text.lines(position):
            if count % step == 0:
                positions.append(position)
            position = text.position
            if isinstance(fields, dict):
                names.update(name for name in fields if name in names or name in wanted or len(names) < MOST_NAMES)
                captioned += find_name(fields, CAPTION_NAMES) is not None
            file = relative_file(file_named(fields, file_column), path.parent) if isinstance(fields, dict) else ""
            files, urls = files + bool(file), urls + is_url(file)
            digests += digest_of(inside + file) if file else number.to_bytes(DIGEST, "big")  # without a name: differs from all others
            count += 1
    if names and not files:
        raise UserError(
            f"{path} names no files in {f'the column {file_column}' if file_column else 'a column with a usual name'}. "
            f"{columns_in_words(names)} Say which of them holds the files: --file-column NAME."
        )
    if files and files == urls:
        raise UserError(only_urls(path, names, file_column))
    none = np.zeros(0, np.int64)
    return MetadataLines(path, state, count, step, positions, none, dict(names), captioned, file_column, inside), digests


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
    """Return the name of the field that holds the captions. Raises UserError if there is none, or if the lines differ in its name."""
    usual = [name for name in lines.names if find_name([name], CAPTION_NAMES)]
    everywhere = [name for name in usual if lines.names[name] == lines.captioned]
    if usual and not everywhere:
        named = ", ".join(f"{name} in {lines.names[name]:,}" for name in usual)
        raise UserError(f"The lines of {lines.path} name their captions differently: {named} of {len(lines):,}. {CAPTION_HOW}")
    return caption_column(everywhere or lines.names, str(lines.path))


def caption_column(names: Collection[str], where: str) -> str:
    """Return the column that usually holds captions. Raises UserError if there is none."""
    found = find_caption_name(names)
    if found is None:
        raise UserError(f"{where} has no {', '.join(CAPTION_NAMES)}. {columns_in_words(names)} {CAPTION_HOW}")
    return found


def check_captions(names: Collection[str], wanted: Collection[str], where: str) -> None:
    """Raise UserError if one of the `wanted` captions is neither a column nor a field inside one."""
    met = {name.lower() for name in names}
    missing = [name for name in wanted if name and name.lower() not in met and name.partition(".")[0] not in names]
    if missing and len(names) < MOST_NAMES:
        raise UserError(f"{where} has no column {', '.join(missing)}. {columns_in_words(names)} {CAPTION_HOW}")


def columns_in_words(names: Collection[str]) -> str:
    """Return a sentence with the names of columns, the first of them if there are many."""
    shown = ", ".join(sorted(names)[:MOST_NAMES]) or "none"
    return f"Its columns are {shown}."


def only_urls(path: Path, names: Collection[str], file_column: str | None = None) -> str:
    """Return the sentence that refuses a table whose images are only addresses, with the command that fetches them."""
    kind = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".json": "json"}.get(path.suffix.lower(), "jsonl")
    url, caption = file_column or find_name(names, FILE_NAMES), find_caption_name(names)
    columns = f"--url_col {shlex.quote(url or 'url')}" + (f" --caption_col {shlex.quote(caption)}" if caption else "")
    return (
        f"{path} holds addresses of pictures, and no pictures. img2dataset fetches them: img2dataset --url_list {shlex.quote(str(path))} "
        f"--input_format {kind} {columns} --output_format webdataset --output_folder {shlex.quote(path.stem)} --resize_mode no. "
        f"Then name the folder {path.stem} as the source."
    )


CAPTION_HOW = "Say which hold captions: --caption NAME, or with weights --caption NAME=0.7 --caption OTHER=0.3."


def relative_file(file: str, folder: Path) -> str:
    """Return a file name that a list in `folder` holds, relative to the folder; URLs, and empty names, as they are."""
    return file if not file or is_url(file) else posixpath.normpath(file.removeprefix(f"{folder.absolute().as_posix()}/"))


def _opened(path: Path) -> "_OpenList":
    try:
        return _OpenList(path)
    except Refused as refused:
        raise UserError(f"{path} cannot be used: {refused.reason}. Put the file itself there.") from refused


class _OpenList(io.TextIOWrapper):
    """An open list that counts the bytes read. Bytes that are not UTF-8 are kept as surrogates, so that only their field is affected."""

    def __init__(self, path: Path):
        self._path = path
        self._file = file = open_file(path, roots_of(path.parent))
        start = file.read(4096)
        self._begins = len(BOM) if start.startswith(BOM) else 0
        try:
            self._json = self._is_json(start[self._begins :])
        except UserError:
            file.close()
            raise
        super().__init__(file, "utf-8", errors="surrogateescape", newline="\n" if self._json else "")

    def _is_json(self, start: bytes) -> bool:
        """Return whether the list is JSON lines, and not CSV. Raises UserError if it is neither."""
        if b"\0" in start:  # in UTF-16 every other character is one
            name = shlex.quote(str(self._path))
            raise UserError(f"{self._path} is not UTF-8, but probably UTF-16. Convert it: iconv -f UTF-16 -t UTF-8 {name} > {name}.new")
        suffix, first = self._path.suffix.lower(), start.lstrip()[:1]
        if suffix in JSON_SUFFIXES and first == b"[":
            raise UserError(
                f"{self._path} is one JSON list, where an object in each line is expected. Convert it: "
                f"jq -c '.[]' {shlex.quote(str(self._path))} > {shlex.quote(str(self._path.with_name('metadata.jsonl')))}.new"
            )
        return suffix in JSON_SUFFIXES or (suffix not in (".csv", ".tsv") and first == b"{")

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
        self._header, self._delimiter = start.header, start.delimiter
        self._file.seek(self._offset)
        self._numbered = NumberedLines(bounded_lines(self), start.lines)
        return self._json_lines() if self._json else self._csv_lines()

    @property
    def position(self) -> LinePosition:
        return LinePosition(self._offset, self._numbered.number, self._header, self._delimiter)

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
        if self._header is None:
            self._read_header()
        reader = csv.reader(self._numbered, delimiter=self._delimiter, strict=True)
        while True:
            first = self._numbered.number + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield self._numbered.number, self._reason(error, first)
                continue
            if row is None or self._header is None:
                return
            if any(row[len(self._header) :]):
                yield self._numbered.number, TOO_MANY_FIELDS
            elif row:
                yield self._numbered.number, {name: field for name, field in zip(self._header, row, strict=False) if name}

    def _read_header(self) -> None:
        """Read the names of the columns, and find out what separates them. Raises UserError if that fails, or if two have one name."""
        line = ""
        while not line.strip():
            try:
                line = next(self._numbered)
            except csv.Error:  # the line is too long
                continue
            except StopIteration:
                return
        headers = {delimiter: self._columns(line, delimiter) for delimiter in DELIMITERS}
        # The separator is the one that yields a column of files; of several, or of none, the one that yields most columns.
        self._delimiter = max(DELIMITERS, key=lambda delimiter: (bool(find_name(headers[delimiter], FILE_NAMES)), len(headers[delimiter])))
        self._header = headers[self._delimiter]
        twice = [name for name, times in Counter(filter(None, self._header)).items() if times > 1]
        if twice or not self._header:
            what = f"several columns are named {', '.join(twice)}. Rename all but one" if twice else f"{BAD_QUOTES}. Correct the header"
            raise UserError(f"{self._path}, line {self._numbered.number}: {what}.")

    def _columns(self, line: str, delimiter: str) -> tuple[str, ...]:
        try:
            return tuple(name.strip() for name in next(csv.reader([line], delimiter=delimiter, strict=True), ()))
        except csv.Error:
            return ()

    def _reason(self, error: csv.Error, first: int) -> str:
        """Return why a row is rejected. Raises UserError if it swallowed lines, which cannot be told apart from its own."""
        if self._numbered.number > first:
            raise UserError(
                f"{self._path}, line {first}: a quote is opened there and not closed as it should be before line {self._numbered.number}. "
                'Close it; a quote within a quoted field is written twice: "a ""red"" cat".'
            )
        return LINE_TOO_LONG if "line is too long" in str(error) or "field larger" in str(error) else BAD_QUOTES


class NumberedLines:
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
