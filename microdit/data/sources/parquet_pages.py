"""Read the binary values of a Parquet column one at a time, whatever the size of its pages.

Parquet's unit of reading is the page. Most writers put a thousand values into one, and a thousand pictures have hundreds of megabytes,
which pyarrow holds twice. Here a page is read as a stream, decompressed piece by piece, with one value in memory. The format is described
at https://parquet.apache.org/docs/file-format; only what writers use for binary columns without repetition is read.
"""

import gzip
import io
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, BinaryIO

import pyarrow as pa

from microdit.data.sources.untrusted_files import LARGEST_FILE, TOO_LARGE, Refused

LARGE_COLUMN = 64_000_000  # bytes of a column in a row group; smaller ones are left to pyarrow
MOST_LEVELS = 16_000_000  # bytes of the levels of a page, which tell where values are missing
IN_MEMORY = 16_000_000  # bytes of a dictionary that are not put into a temporary file
HISTORY = 1 << 20  # bytes that a compressed page may refer back to; Snappy's encoders work on blocks of 64 KiB
PIECE = 1 << 16  # bytes copied at a time
MOST_DEPTH = 8  # of structures inside each other in a page's header

DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY = 0, 2, 8

Value = bytes | None | Refused  # Refused: the value is too large


@dataclass(frozen=True)
class BinaryColumn:
    """A binary column of one row group: where its pages lie, how many values it has, and the level at which a value is present."""

    start: int
    end: int
    count: int
    codec: str
    level: int


def large_column(table: Any, group: int, image: str) -> BinaryColumn | None:
    """Return the column of images in a row group, or the field `bytes` inside it, if it is large and in a form that is read here."""
    metadata = table.metadata.row_group(group)
    for number in range(metadata.num_columns):
        column, shape = metadata.column(number), table.schema.column(number)
        if column.path_in_schema in (image, f"{image}.bytes") and shape.physical_type == "BYTE_ARRAY":
            if shape.max_repetition_level or column.compression not in _CODECS or column.total_uncompressed_size < LARGE_COLUMN:
                return None
            start = min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset)
            end = start + column.total_compressed_size
            return BinaryColumn(start, end, column.num_values, column.compression, shape.max_definition_level)
    return None


def binary_values(file: BinaryIO, column: BinaryColumn) -> Iterator[Value]:
    """Yield the values of a column, None where there is none. Raises ValueError where it is damaged, and OSError if reading fails."""
    try:
        yield from _values(file, column)
    except (KeyError, TypeError, AttributeError, EOFError, OverflowError, zlib.error) as error:  # of headers and pages that make no sense
        raise ValueError(f"a page is damaged: {error}") from error


def _values(file: BinaryIO, column: BinaryColumn) -> Iterator[Value]:
    place, left = column.start, column.count
    with ExitStack() as held:
        dictionary: _Dictionary | None = None
        while left > 0:
            if place >= column.end:
                raise ValueError("the pages end too early")
            file.seek(place)
            header = _Header(file).structure()
            body, size = file.tell(), _number(header, 3)
            kind, place = _number(header, 1), body + size
            if kind == DICTIONARY_PAGE:
                dictionary = held.enter_context(_Dictionary(file, body, size, column.codec, _number(header[7], 1)))
            elif kind in (DATA_PAGE, DATA_PAGE_V2):
                count = min(left, _number(header[5 if kind == DATA_PAGE else 8], 1))
                yield from _page_values(file, body, size, column, header, dictionary, count)
                left -= count


def _page_values(
    file: BinaryIO, body: int, size: int, column: BinaryColumn, header: dict[int, Any], dictionary: "_Dictionary | None", count: int
) -> Iterator[Value]:
    if _number(header, 1) == DATA_PAGE:
        encoding, stream = _number(header[5], 2), _stream(file, body, size, column.codec)
        levels = _exactly(stream, _bounded(_little(stream, 4))) if column.level else b""
    else:
        about = header[8]
        encoding, width = _number(about, 4), _bounded(_number(about, 5) + _number(about, 6))
        file.seek(body + _number(about, 6))
        levels = file.read(_number(about, 5))
        codec = column.codec if about.get(7, True) else "UNCOMPRESSED"
        stream = _stream(file, body + width, size - width, codec)
    present = _hybrid(io.BytesIO(levels), column.level.bit_length(), count) if column.level else None
    if encoding == PLAIN:
        values = (_plain(stream) for _ in range(count))
    elif encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY) and dictionary is not None:
        indices = _hybrid(stream, _little(stream, 1), count)
        values = (dictionary.value(index) for index in indices)
    else:
        raise ValueError(f"encoding {encoding}")
    for level in islice(present, count) if present else [column.level] * count:
        yield next(values) if level == column.level else None


def _plain(stream: IO[bytes]) -> Value:
    size = _little(stream, 4)
    if size <= LARGEST_FILE:
        return _exactly(stream, size)
    _copy(stream, None, size)
    return Refused(TOO_LARGE)


class _Dictionary:
    """The values of a dictionary page, read where they are needed: from the file itself, or decompressed into a temporary file."""

    def __init__(self, file: BinaryIO, body: int, size: int, codec: str, count: int):
        self._temporary: Any = None
        if codec == "UNCOMPRESSED":
            self._file: Any = file
        else:
            self._file = self._temporary = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115
            size, body = _copy(_stream(file, body, size, codec), self._file, None), 0
        self._places: list[tuple[int, int]] = []
        place, end = body, body + size
        for _ in range(count):
            self._file.seek(place)
            length = _little(self._file, 4)
            self._places.append((place + 4, length))
            place += 4 + length
            if place > end:
                raise ValueError("a value reaches beyond its page")

    def __enter__(self) -> "_Dictionary":
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary is not None:
            self._temporary.close()

    def value(self, index: int) -> Value:
        if index >= len(self._places):
            raise ValueError("an index beyond the dictionary")
        place, length = self._places[index]
        if length > LARGEST_FILE:
            return Refused(TOO_LARGE)
        self._file.seek(place)
        return _exactly(self._file, length)


def _hybrid(stream: IO[bytes], width: int, count: int) -> Iterator[int]:
    """Yield at most `count` numbers of `width` bits, in runs of one number or bit-packed in groups of eight."""
    if width > 32:
        raise ValueError("numbers of more than 32 bits")
    mask = (1 << width) - 1
    while count > 0:
        header = _varint(stream)
        if header & 1:
            for _ in range(header >> 1):
                packed = int.from_bytes(stream.read(width), "little")  # the last group may be cut
                for number in range(min(8, count)):
                    yield packed >> number * width & mask
                count -= 8
                if count <= 0:
                    return
        else:
            number = _little(stream, (width + 7) // 8)
            for _ in range(min(count, header >> 1)):
                yield number
            count -= header >> 1
            if not header:
                raise ValueError("an empty run")


class _Header:
    """A page's header in Thrift's compact protocol."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def structure(self, depth: int = 0) -> dict[int, Any]:
        """Return the fields of a structure by their numbers; texts are skipped."""
        if depth > MOST_DEPTH:
            raise ValueError("structures are nested too deeply")
        fields: dict[int, Any] = {}
        last = 0
        while byte := _little(self._file, 1):
            last = last + (byte >> 4) if byte >> 4 else self._signed()
            fields[last] = self._value(byte & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return _little(self._file, 1)
        if kind in (4, 5, 6):
            return self._signed()
        if kind in (7, 8):
            self._file.seek(8 if kind == 7 else _varint(self._file), io.SEEK_CUR)
            return None
        if kind == 9:
            head = _little(self._file, 1)
            size = _varint(self._file) if head >> 4 == 15 else head >> 4
            for _ in range(size):
                self._value(3 if head & 15 in (1, 2) else head & 15, depth)
            return None
        if kind == 12:
            return self.structure(depth + 1)
        raise ValueError(f"type {kind} in a page's header")

    def _signed(self) -> int:
        number = _varint(self._file)
        return (number >> 1) ^ -(number & 1)


class _Window(io.RawIOBase):
    """A range of a file as a stream of its own, which seeks before each read, because others read the file in between."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file, self._place, self._end = file, start, start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._place)
        content = self._file.read(min(len(buffer), self._end - self._place))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


class _Snappy(io.RawIOBase):
    """A stream of Snappy's raw format, decompressed as it is read."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self._left = _varint(stream)
        self._output, self._given = bytearray(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while len(self._output) == self._given and self._left > 0:
            self._element()
        content = self._output[self._given : self._given + len(buffer)]
        buffer[: len(content)] = content
        self._given += len(content)
        if self._given > 2 * HISTORY:
            del self._output[: self._given - HISTORY]
            self._given = HISTORY
        return len(content)

    def _element(self) -> None:
        tag = _little(self._stream, 1)
        kind, size = tag & 3, tag >> 2
        if kind == 0:
            size = (size if size < 60 else _little(self._stream, size - 59)) + 1
            if size > self._left:
                raise ValueError("more bytes than announced")
            while size:  # a literal may be as long as the page
                piece = _exactly(self._stream, min(size, PIECE))
                self._output += piece
                size, self._left = size - len(piece), self._left - len(piece)
                if size and len(self._output) - self._given > HISTORY:
                    raise ValueError("a literal of more than a megabyte")
            return
        offset = size >> 3 << 8 | _little(self._stream, 1) if kind == 1 else _little(self._stream, 2 if kind == 2 else 4)
        size = (size & 7) + 4 if kind == 1 else size + 1
        if not 0 < offset <= len(self._output) or size > self._left:
            raise ValueError("a copy from beyond what is known")
        start = len(self._output) - offset
        repeated = self._output[start : start + size]
        self._output += (repeated * (size // len(repeated) + 1))[:size]
        self._left -= size


def _stream(file: BinaryIO, start: int, size: int, codec: str) -> IO[bytes]:
    window = io.BufferedReader(_Window(file, start, size), PIECE)
    if codec == "SNAPPY":
        return io.BufferedReader(_Snappy(window), PIECE)
    if codec == "GZIP":
        return gzip.GzipFile(fileobj=window)  # type: ignore[return-value]
    return pa.CompressedInputStream(window, "zstd") if codec == "ZSTD" else window


_CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "ZSTD")


def _copy(stream: IO[bytes], out: Any, size: int | None) -> int:
    """Copy `size` bytes, or all that are left, to `out`, if there is one. Returns how many there were."""
    copied = 0
    while piece := stream.read(PIECE if size is None else min(PIECE, size - copied)):
        copied += len(piece)
        if out is not None:
            out.write(piece)
    if size is not None and copied < size:
        raise EOFError("the page ends too early")
    return copied


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError("the page ends too early")
    return content


def _little(stream: IO[bytes], size: int) -> int:
    return int.from_bytes(_exactly(stream, size), "little")


def _varint(stream: IO[bytes]) -> int:
    number = shift = 0
    while shift < 70:
        byte = _little(stream, 1)
        number |= (byte & 127) << shift
        if byte < 128:
            return number
        shift += 7
    raise ValueError("a number of more than 64 bits")


def _bounded(size: int) -> int:
    if not 0 <= size <= MOST_LEVELS:
        raise ValueError("levels of more than 16 megabytes")
    return size


def _number(fields: dict[int, Any], field: int) -> int:
    number = fields.get(field)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError("a page's header lacks a number")
    return number
