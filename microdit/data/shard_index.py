"""The Arrow stream of a shard, read without its blobs: the messages, and of each column what is asked for.

Arrow's own readers take all of a stream into memory, or map the file: then they have the system fetch all of it, and a file that shrinks
while it is mapped kills the process (SIGBUS). Here the content of a record batch is memory that costs nothing until something is put into
it, and only the buffers that are asked for are read from the file.

Where everything that training reads of a shard lies in its file: some kilobytes for thousands of rows, read at once and kept in memory.

The index follows a shard's Arrow stream, column by column, compressed with zlib. All numbers are little-endian:

    rows                        one uint32
    buckets                     an int16 a row
    captions                    how many, an int32 a row
    weights                     a float32 a caption
    text, latents_256, ...      an int64 a blob: bytes between the one before and this one; then an int32 a blob: its length
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

LATENTS = "latents_"  # and the resolution, the name of a column


def schema(resolutions: list[int]) -> pa.Schema:
    """Columns of a shard; `latents_256` and so on, one column a resolution."""
    columns = [
        ("key", pa.string()),
        ("bucket", pa.int16()),
        ("captions", pa.list_(pa.string())),
        ("weights", pa.list_(pa.float32())),
        ("text", pa.list_(pa.binary())),
    ]
    return pa.schema(columns + [(f"{LATENTS}{resolution}", pa.binary()) for resolution in resolutions])


def holds_blobs(column: str) -> bool:
    return column == "text" or column.startswith(LATENTS)


def read_at(file: int, position: int, size: int) -> bytes:
    """Read exactly `size` bytes of an open file. Raises EOFError if it ends before."""
    content = os.pread(file, size, position)
    while len(content) < size:  # the system may return less than it has
        more = os.pread(file, size - len(content), position + len(content))
        if not more:
            raise EOFError(f"it ends at byte {os.fstat(file).st_size}, where more was written")
        content += more
    return content


class ArrowStream:
    """The stream at the start of an open file. Raises OSError, EOFError or pa.ArrowException if it is none.

    `checksum` (XXH3) covers its messages, `end` is the position behind it. Nothing of its columns is touched before `load`.
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
        """The record batches. What has not been loaded of them is zero."""
        return [pa.ipc.read_record_batch(message, self.schema) for message in self._messages[1:]]

    def load(self, columns: Iterable[str]) -> pa.Table:
        """Read these columns, but no blobs."""
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
        """XXH3 of all buffers of these columns, without the blobs."""
        names, digest = list(columns), xxhash.xxh3_128()
        self.load(names)
        for name in names:
            for batch in self.batches:
                for buffer in _buffers(batch, name):
                    digest.update(buffer)
        return digest.hexdigest()

    def number_columns(self) -> list[str]:
        """All columns but keys and captions: of blobs their offsets."""
        return [name for name in self.schema.names if name not in ("key", "captions")]

    def position(self, batch: int, buffer: pa.Buffer | None) -> int:
        """Where a record batch's buffer lies in the file."""
        body = self._bodies[batch]
        return body.position + (buffer.address - body.address if buffer else 0)


class _Body(NamedTuple):
    """The content of a record batch: where it lies in the file, and the memory that stands for it."""

    position: int
    memory: mmap.mmap
    address: int


class _WithoutBodies:
    """A file as Arrow reads a stream from it: for each message 4 bytes that never differ, 4 for its length, the message, then its body."""

    closed = False

    def __init__(self, file: int):
        self.position, self.bodies = 0, list[_Body]()
        self._file, self._size = file, os.fstat(file).st_size
        self._message = 0  # bytes of the message that comes next

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


def _buffers(batch: pa.RecordBatch, column: str) -> list[pa.Buffer]:
    buffers = batch.column(column).buffers()
    return [buffer for buffer in (buffers[:-1] if holds_blobs(column) else buffers) if buffer]  # an empty one lies anywhere


Numbers = NDArray[Any]


@dataclass(frozen=True)
class Blobs:
    """The position and the length of each blob of a column."""

    positions: Numbers
    lengths: Numbers


@dataclass(frozen=True)
class ShardIndex:
    """Each row's bucket and first caption (with the end of the last one's, one number more), each caption's weight, each column's blobs."""

    buckets: Numbers
    first_captions: Numbers
    weights: Numbers
    blobs: dict[str, Blobs]

    def __len__(self) -> int:
        return len(self.buckets)

    @classmethod
    def of(cls, stream: ArrowStream) -> "ShardIndex":
        """Look everything up in a stream. Raises what it raises."""
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
        columns = [np.asarray([len(self)], "<u4"), self.buckets.astype("<i2"), np.diff(self.first_captions.astype("<i4"))]
        columns.append(self.weights.astype("<f4"))
        for blobs in self.blobs.values():
            starts, lengths = blobs.positions.astype("<i8"), blobs.lengths.astype("<i4")
            columns += [starts - np.concatenate([[0], (starts + lengths)[:-1]])[: len(starts)], lengths]
        return zlib.compress(b"".join(column.tobytes() for column in columns))

    @classmethod
    def from_bytes(cls, content: bytes, resolutions: list[int]) -> "ShardIndex":
        """Raises ValueError or zlib.error if it is none, or one of other columns."""
        source = _Source(zlib.decompress(content))
        rows = int(source.take(1, "<u4")[0])
        buckets, counts = source.take(rows, "<i2"), source.take(rows, "<i4")
        captions = int(counts.sum())
        weights, blobs = source.take(captions, "<f4"), {}
        for name, count in [("text", captions), *((f"{LATENTS}{resolution}", rows) for resolution in resolutions)]:
            gaps, lengths = source.take(count, "<i8"), source.take(count, "<i4")
            blobs[name] = Blobs(_compact(np.cumsum(gaps + lengths) - lengths), _compact(lengths))
        if source.left:
            raise ValueError("it is one of other columns")
        firsts = np.concatenate([[0], np.cumsum(counts)])
        return cls(_compact(buckets), _compact(firsts), _compact(weights), blobs)

    @cached_property
    def rows_by_bucket(self) -> dict[int, Numbers]:
        return {int(bucket): _compact(np.flatnonzero(self.buckets == bucket)) for bucket in np.unique(self.buckets)}


class _Source:
    """Bytes, taken from the front."""

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
    """The same in less memory: thousands of shards are open at once. Numbers that are all equal take the room of one."""
    if len(numbers) and (numbers == numbers[0]).all():
        return np.broadcast_to(numbers[:1].copy(), numbers.shape)
    if numbers.dtype.kind == "f" or not len(numbers) or numbers.min() < 0:
        return numbers.copy()
    return numbers.astype(np.min_scalar_type(numbers.max()))
