"""The index of a shard, and the Arrow stream from which it is built.

The index holds the position of everything that training reads of a shard: some kilobytes for thousands of rows, read at once and kept in
memory. It follows the Arrow stream of the shard, column by column, compressed with zlib. All numbers are little-endian:

    rows                        one uint32
    buckets                     an int16 per row
    captions                    an int32 per row: their number
    weights                     a float32 per caption
    text, latents_256, ...      an int64 per blob: bytes between the previous blob and this one; then an int32 per blob: its length
    features_256, ...           the same, in sets that have features

`ArrowStream` reads the columns of a stream without its blobs. Arrow's own readers load a whole stream, or map its file, but then the system
fetches all of it, and a file that shrinks while it is mapped kills the process (SIGBUS). Here a record batch is backed by memory that costs
nothing until it is written to, and only the requested buffers are read from the file.
"""

import mmap
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

LATENTS, FEATURES = "latents_", "features_"  # prefixes of a column's name, before the resolution

Numbers = NDArray[Any]


def image_columns(resolutions: list[int], features: bool) -> list[str]:
    """Return the columns of latents, such as `latents_256`, and those of features in sets that have them: one per resolution."""
    prefixes = (LATENTS, FEATURES) if features else (LATENTS,)
    return [f"{prefix}{resolution}" for prefix in prefixes for resolution in resolutions]


def schema(resolutions: list[int], features: bool = False) -> pa.Schema:
    """Return the columns of a shard."""
    columns = [
        ("key", pa.string()),
        ("bucket", pa.int16()),
        ("captions", pa.list_(pa.string())),
        ("weights", pa.list_(pa.float32())),
        ("text", pa.list_(pa.binary())),
    ]
    return pa.schema(columns + [(name, pa.binary()) for name in image_columns(resolutions, features)])


def holds_blobs(column: str) -> bool:
    """Return whether a column holds the bytes of latents, features or caption vectors."""
    return column == "text" or column.startswith((LATENTS, FEATURES))


def read_at(file: int, position: int, size: int) -> bytes:
    """Read exactly `size` bytes of an open file. Raises EOFError if it ends before."""
    content = os.pread(file, size, position)
    while len(content) < size:  # the system may return fewer bytes than there are
        more = os.pread(file, size - len(content), position + len(content))
        if not more:
            raise EOFError(f"it ends at byte {os.fstat(file).st_size}, where more was written")
        content += more
    return content


@dataclass(frozen=True)
class Blobs:
    """The positions and lengths of the blobs of a column."""

    positions: Numbers
    lengths: Numbers


@dataclass(frozen=True)
class ShardIndex:
    """The bucket and first caption of each row, the weight of each caption, and the blobs of each column.

    `first_captions` has one number more than there are rows: the total number of captions.
    """

    buckets: Numbers
    first_captions: Numbers
    weights: Numbers
    blobs: dict[str, Blobs]

    def __len__(self) -> int:
        return len(self.buckets)

    @classmethod
    def of(cls, stream: "ArrowStream") -> "ShardIndex":
        """Build the index of a stream. Raises the errors of ArrowStream."""
        table = stream.load(stream.number_columns())
        counts = [np.diff(batch.column("text").offsets.to_numpy()) for batch in stream.batches]
        weights = [batch.column("weights").values.to_numpy() for batch in stream.batches]
        return cls(
            _compact(table.column("bucket").to_numpy()),
            _compact(np.cumsum(_joined([np.zeros(1, np.int64), *counts], np.int64))),
            _compact(_joined(weights, np.float32)),
            {name: _blobs_of(stream, name) for name in table.column_names if holds_blobs(name)},
        )

    def to_bytes(self) -> bytes:
        """Serialise the index as described at the top of this module."""
        columns = [np.asarray([len(self)], "<u4"), self.buckets.astype("<i2"), np.diff(self.first_captions.astype("<i4"))]
        columns.append(self.weights.astype("<f4"))
        for blobs in self.blobs.values():
            starts, lengths = blobs.positions.astype("<i8"), blobs.lengths.astype("<i4")
            columns += [starts - np.concatenate([[0], (starts + lengths)[:-1]])[: len(starts)], lengths]
        return zlib.compress(b"".join(column.tobytes() for column in columns))

    @classmethod
    def from_bytes(cls, content: bytes, resolutions: list[int], features: bool = False) -> "ShardIndex":
        """Read a serialised index. Raises ValueError or zlib.error if it is damaged, or has other columns."""
        source = _Reader(zlib.decompress(content))
        rows = int(source.take(1, "<u4")[0])
        buckets, counts = source.take(rows, "<i2"), source.take(rows, "<i4")
        captions = int(counts.sum())
        weights, blobs = source.take(captions, "<f4"), {}
        for name, count in [("text", captions), *((name, rows) for name in image_columns(resolutions, features))]:
            gaps, lengths = source.take(count, "<i8"), source.take(count, "<i4")
            blobs[name] = Blobs(_compact(np.cumsum(gaps + lengths) - lengths), _compact(lengths))
        if source.left:
            raise ValueError("the index has other columns")
        firsts = np.concatenate([[0], np.cumsum(counts)])
        return cls(_compact(buckets), _compact(firsts), _compact(weights), blobs)

    @cached_property
    def rows_by_bucket(self) -> dict[int, Numbers]:
        """The numbers of the rows in each bucket."""
        return {int(bucket): _compact(np.flatnonzero(self.buckets == bucket)) for bucket in np.unique(self.buckets)}


class ArrowStream:
    """The Arrow stream at the start of an open file. Raises OSError, EOFError or pa.ArrowException if there is none.

    `checksum` (XXH3) covers its messages; `end` is the position behind it. The columns are not read before `load`.
    """

    def __init__(self, file: int):
        source = _WithoutBodies(file)
        digest = xxhash.xxh3_128()
        self._file = file
        self._messages = []
        for message in pa.ipc.MessageReader.open_stream(pa.PythonFile(source, mode="r")):
            digest.update(message.metadata)
            self._messages.append(message)
        self.checksum, self.end = digest.hexdigest(), source.position
        self._bodies = source.bodies
        self._loaded: set[str] = set()

    @cached_property
    def schema(self) -> pa.Schema:
        if not self._messages:
            raise pa.ArrowInvalid("it holds no Arrow stream")
        return pa.ipc.read_schema(self._messages[0])

    @cached_property
    def batches(self) -> list[pa.RecordBatch]:
        """The record batches. Columns that have not been loaded are zero."""
        return [pa.ipc.read_record_batch(message, self.schema) for message in self._messages[1:]]

    def load(self, columns: Iterable[str]) -> pa.Table:
        """Read these columns without their blobs."""
        names = list(columns)
        for name in names:
            if name not in self._loaded:
                for batch, body in zip(self.batches, self._bodies, strict=True):
                    for buffer in _buffers(batch, name):
                        start = buffer.address - body.address
                        body.memory[start : start + buffer.size] = read_at(self._file, body.position + start, buffer.size)
                self._loaded.add(name)
        return pa.Table.from_batches(self.batches, self.schema).select(names)

    def columns_checksum(self, columns: Iterable[str]) -> str:
        """Return the XXH3 of all buffers of these columns, without the blobs."""
        names, digest = list(columns), xxhash.xxh3_128()
        self.load(names)
        for name in names:
            for batch in self.batches:
                for buffer in _buffers(batch, name):
                    digest.update(buffer)
        return digest.hexdigest()

    def number_columns(self) -> list[str]:
        """Return all columns but `key` and `captions`. Columns of blobs count with their offsets."""
        return [name for name in self.schema.names if name not in ("key", "captions")]

    def position(self, batch: int, buffer: pa.Buffer | None) -> int:
        """Return the position in the file of a buffer of a record batch."""
        body = self._bodies[batch]
        return body.position + (buffer.address - body.address if buffer else 0)


def _buffers(batch: pa.RecordBatch, column: str) -> list[pa.Buffer]:
    buffers = batch.column(column).buffers()
    return [buffer for buffer in (buffers[:-1] if holds_blobs(column) else buffers) if buffer]  # an empty buffer has no defined address


class _Body(NamedTuple):
    """The content of a record batch: its position in the file, and the memory that represents it."""

    position: int
    memory: mmap.mmap
    address: int


class _WithoutBodies:
    """A file from which Arrow reads a stream without the bodies of its messages, which become empty memory.

    Each message consists of 4 constant bytes, 4 bytes of length, the message itself, and its body.
    """

    closed = False

    def __init__(self, file: int):
        self.position, self.bodies = 0, list[_Body]()
        self._file, self._size = file, os.fstat(file).st_size
        self._message = 0  # size of the next message in bytes

    def read(self, size: int) -> Any:
        start, self.position = self.position, self.position + size
        if self.position > self._size:
            raise EOFError(f"it ends at byte {self._size}, where more was written")
        if size == 4 or size == self._message:
            content = read_at(self._file, start, size)
            self._message = int.from_bytes(content, "little") if size == 4 else 0
            return content
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bodies.append(_Body(start, memory, pa.py_buffer(memory).address))
        return memory


class _Reader:
    """Reads arrays from bytes, one after the other."""

    def __init__(self, content: bytes):
        self._content, self._at = content, 0

    @property
    def left(self) -> int:
        return len(self._content) - self._at

    def take(self, count: int, dtype: str) -> Numbers:
        numbers = np.frombuffer(self._content, dtype, count, self._at)
        self._at += numbers.nbytes
        return numbers


def _blobs_of(stream: ArrowStream, column: str) -> Blobs:
    positions, lengths = [], []
    for number, batch in enumerate(stream.batches):
        blobs = batch.column(column)
        blobs = blobs.values if pa.types.is_list(blobs.type) else blobs
        _, offsets, data = blobs.buffers()
        starts = np.frombuffer(offsets, np.int32)[blobs.offset : blobs.offset + len(blobs) + 1].astype(np.int64)
        positions.append(stream.position(number, data) + starts[:-1])
        lengths.append(np.diff(starts))
    return Blobs(_compact(_joined(positions, np.int64)), _compact(_joined(lengths, np.int64)))


def _joined(arrays: list[Numbers], dtype: type) -> Numbers:
    return np.concatenate(arrays or [np.empty(0)]).astype(dtype)


def _compact(numbers: Numbers) -> Numbers:
    """Return equal numbers that take less memory, because thousands of shards are open at once.

    Numbers that are all equal take the memory of one.
    """
    if len(numbers) and (numbers == numbers[0]).all():
        return np.broadcast_to(numbers[:1].copy(), numbers.shape)
    if numbers.dtype.kind == "f" or not len(numbers) or numbers.min() < 0:
        return numbers.copy()
    return numbers.astype(np.min_scalar_type(numbers.max()))
