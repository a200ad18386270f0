"""Where everything that training reads of a shard lies in its file: some kilobytes for thousands of rows, read at once and kept in memory.

The index follows a shard's Arrow stream, column by column, compressed with zlib. All numbers are little-endian:

    rows                        one uint32
    buckets                     an int16 a row
    captions                    how many, an int32 a row
    weights                     a float32 a caption
    text, latents_256, ...      an int64 a blob: bytes between the one before and this one; then an int32 a blob: its length
"""

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from microdit.data.arrow_stream import LATENTS, ArrowStream, holds_blobs

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
