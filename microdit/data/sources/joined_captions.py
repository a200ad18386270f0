"""Join captions from another file to the records of a source by key, path or URL.

The file may have any number of rows: SQLite keeps an index of them on the disk, which also remembers the rows and records that found each
other, so that an encoding that is continued, or shared by several processes, counts all of them.
"""

import csv
import gzip
import hashlib
import io
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from microdit.data.sources.arrow_cells import check_unique, table_rows
from microdit.data.sources.base import END, Record
from microdit.data.sources.lists import CAPTION_HOW, NumberedLines, columns_in_words
from microdit.data.sources.metadata import CAPTION_PROBLEMS, FILE_NAMES, field_of, find_caption_name, find_name, from_fields, is_url
from microdit.data.sources.untrusted_files import IMAGE_SUFFIXES, Refused, bounded_lines, open_file
from microdit.errors import UserError
from microdit.io.files import aside_of
from microdit.io.locks import in_turn
from microdit.io.untrusted_text import one_line, parse_json_object

KEY_NAMES = ("key", "id", "imageid", *FILE_NAMES)
BATCH = 10_000  # rows written at a time
WAIT = 600.0  # seconds for which a process waits for the others to write
NOT_FOUND = "no caption under its key in the joined file"

Row = tuple[str, str]  # key, caption; both empty if the row is broken


@dataclass(frozen=True)
class JoinedCaptions:
    """The captions in `path`, by the column or field `key`, under the name `field`. `index` is the SQLite file, built when needed."""

    path: Path
    key: str
    field: str
    index: Path
    fingerprint: str

    def records(self, part: str, records: Iterable[Record], replaces: bool) -> Iterator[Record]:
        """Yield the records of a part with the captions found for them, in place of their own or beside them, and count both sides."""
        matched = unmatched = 0
        used: set[int] = set()
        with closing(self._connect()) as index:
            try:
                for record in records:
                    if record.key.endswith(END) or (record.problem and record.problem not in CAPTION_PROBLEMS):
                        yield record
                        continue
                    row, caption = self._find(index, record)
                    matched, unmatched = matched + (row is not None), unmatched + (row is None)
                    used |= {row} if row is not None else set()
                    if len(used) >= BATCH:
                        _mark(index, used)
                        used = set()
                    captions = {**({} if replaces else record.captions), **({self.field: caption} if caption else {})}
                    yield replace(record, captions=captions, problem="" if captions else NOT_FOUND)
            finally:  # a reader of a sample stops early
                _mark(index, used)
                with index:
                    index.execute("INSERT OR REPLACE INTO parts VALUES (?, ?, ?)", (part, matched, unmatched))

    def counts(self) -> dict[str, Any]:
        """Return how many records and rows found each other, so far."""
        with closing(self._connect()) as index:
            rows, broken, repeated = index.execute("SELECT rows, broken, repeated FROM totals").fetchone()
            (used,) = index.execute("SELECT count(*) FROM used").fetchone()
            matched, unmatched = index.execute("SELECT coalesce(sum(matched), 0), coalesce(sum(unmatched), 0) FROM parts").fetchone()
        return {
            "file": self.path.name,
            "records_matched": matched,
            "records_unmatched": unmatched,
            "rows_matched": used,
            "rows_unmatched": rows - used - broken - repeated,
            "rows_repeated": repeated,
            "rows_broken": broken,
        }

    def _find(self, index: sqlite3.Connection, record: Record) -> tuple[int | None, str]:
        """Return the number and the caption of the row for a record: by URL, by key, or by the name of its file."""
        for name in dict.fromkeys((record.url, record.key, record.key.rpartition("/")[2])):
            if name:
                found = index.execute("SELECT rowid, caption FROM rows WHERE hash = ? ORDER BY rowid LIMIT 1", (_hash_of(name),)).fetchone()
                if found:
                    return found[0], found[1]
        return None, ""

    def _connect(self) -> sqlite3.Connection:
        """Open the index, and build it if it is missing. One process builds it, and the others wait."""
        self.index.parent.mkdir(parents=True, exist_ok=True)
        with in_turn(self.index.with_suffix(".lock")):
            if not self.index.is_file():
                aside = aside_of(self.index)
                try:
                    _build(aside, read_rows(self.path, self.key, self.field))
                    aside.replace(self.index)
                finally:
                    aside.unlink(missing_ok=True)
        return sqlite3.connect(self.index, timeout=WAIT)


def open_joined(name: str, index_folder: Path | None) -> JoinedCaptions:
    """Open a file of captions by its name, FILE or FILE:KEY:FIELD. Raises UserError if it cannot be read or lacks these columns."""
    path, key, field = Path(name).expanduser(), "", ""
    if not path.is_file() and name.count(":") >= 2:
        file, key, field = name.rsplit(":", 2)
        path = Path(file).expanduser()
    columns = columns_of(path)
    key = key or find_name(columns, KEY_NAMES) or ""
    field = field or find_caption_name([column for column in columns if column != key]) or ""
    for column, what in ((key, "keys"), (field, "captions")):
        if not column or (column not in columns and column.partition(".")[0] not in columns):
            raise UserError(
                f"{path} has no column {column or f'with {what} under a usual name'}. {columns_in_words(columns)} "
                f"Name both: --captions {path}:KEY_COLUMN:COLUMN."
            )
    check_unique((key, field), columns, str(path))
    status = path.stat()
    identity = f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0{key}\0{field}"
    fingerprint = hashlib.sha256(identity.encode(errors="surrogatepass")).hexdigest()
    folder = index_folder or Path(tempfile.gettempdir()) / "microdit-captions"
    return JoinedCaptions(path, key, field, folder / f".captions-{fingerprint[:16]}.sqlite", fingerprint)


def columns_of(path: Path) -> list[str]:
    """Return the names of the columns, or of the fields of the first line. Raises UserError if the file cannot be read."""
    if path.suffix.lower() == ".parquet":
        try:
            return list(pq.read_schema(path).names)
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
            raise UserError(f"{path} cannot be read as a Parquet file: {one_line(str(error))}") from error
    first = next((fields for fields in _fields(path) if fields), None)
    if not first:
        raise UserError(f"{path} holds no captions: it should have JSON objects in lines, or a table as CSV or Parquet. {CAPTION_HOW}")
    return list(first)


def read_rows(path: Path, key: str, field: str) -> Iterator[Row]:
    """Yield the rows of a file; broken ones as empty strings."""
    for fields in _parquet_fields(path, key, field) if path.suffix.lower() == ".parquet" else _fields(path):
        name = field_of(fields, key) if fields else None
        name = str(name) if isinstance(name, (str, int)) else ""
        caption = from_fields(fields, [field])[0].get(field, "") if fields and name else ""
        yield (name, caption) if caption else ("", "")


def _parquet_fields(path: Path, key: str, field: str) -> Iterator[Mapping[str, Any]]:
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as table:
            names = set(table.schema_arrow.names)
            columns = [name if name in names else name.partition(".")[0] for name in (key, field)]
            for batch in table.iter_batches(BATCH, columns=columns):
                yield from table_rows(batch)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read to its end: {one_line(str(error))}. Fetch it again.") from error


def _fields(path: Path) -> Iterator[Mapping[str, Any] | None]:
    """Yield the fields of each line of a CSV file or of a file with JSON lines, plain or gzipped; None for broken lines."""
    try:
        with open_file(path, None) as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            with io.TextIOWrapper(gzip.GzipFile(fileobj=file) if zipped else file, "utf-8-sig", "surrogateescape", newline="") as text:
                name = path.name.lower().removesuffix(".gz")
                yield from _csv_fields(path, text) if name.endswith((".csv", ".tsv")) else _json_fields(text)
    except Refused as refused:
        raise UserError(f"{path} cannot be read: {refused.reason}.") from refused
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read to its end: {error}. Fetch it again.") from error


def _json_fields(text: io.TextIOWrapper) -> Iterator[Mapping[str, Any] | None]:
    for line in bounded_lines(text):
        if line is None or line.strip():
            try:
                yield parse_json_object(line or "")
            except ValueError:
                yield None


def _csv_fields(path: Path, text: io.TextIOWrapper) -> Iterator[Mapping[str, Any] | None]:
    lines = NumberedLines(bounded_lines(text), 0)
    header, names = "\n", []
    try:
        while not header.strip():
            header = next(lines)
        delimiter = max(",;\t|", key=header.count)
        names = next(csv.reader([header], delimiter=delimiter), [])
    except StopIteration:
        return
    except csv.Error as error:
        raise UserError(f"{path}, line {lines.number}: the header cannot be read: {error}. Correct it.") from error
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        first = lines.number + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            if lines.number > first:
                raise UserError(f"{path}: a quote is opened in line {first} and not closed as it should be. Close it.") from error
            yield None
            continue
        if row is None:
            return
        if row:
            yield None if any(row[len(names) :]) else dict(zip(names, row, strict=False))


def _build(path: Path, rows: Iterator[Row]) -> None:
    total = broken = 0
    with closing(sqlite3.connect(path)) as index:
        index.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; CREATE TABLE rows (hash INTEGER, caption TEXT); "
            "CREATE TABLE used (row INTEGER PRIMARY KEY); CREATE TABLE parts (part TEXT PRIMARY KEY, matched INTEGER, unmatched INTEGER); "
            "CREATE TABLE totals (rows INTEGER, broken INTEGER, repeated INTEGER);"
        )
        with index:
            while batch := list(islice(rows, BATCH)):
                good = [(_hash_of(key), caption) for key, caption in batch if key]
                total, broken = total + len(batch), broken + len(batch) - len(good)
                index.executemany("INSERT INTO rows VALUES (?, ?)", good)
        with index:
            index.execute("CREATE INDEX by_hash ON rows (hash)")
            (distinct,) = index.execute("SELECT count(*) FROM (SELECT 1 FROM rows GROUP BY hash)").fetchone()
            index.execute("INSERT INTO totals VALUES (?, ?, ?)", (total, broken, total - broken - distinct))


def _mark(index: sqlite3.Connection, used: set[int]) -> None:
    with index:
        index.executemany("INSERT OR IGNORE INTO used VALUES (?)", [(row,) for row in sorted(used)])


def _hash_of(name: str) -> int:
    """Return 64 bits of a digest of a key: of a URL as it is, of a file without its suffix."""
    if not is_url(name):
        name = name.removeprefix("./")
        name = name.rpartition(".")[0] if name.lower().endswith(IMAGE_SUFFIXES) else name
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(), "big", signed=True)
