"""One shard of an encoded set: an Arrow stream that is written row by row, memory-mapped to be read, and checked at both ends.

Arrow notices a file that was cut off, not one in which a block was changed. So whatever is read is compared with a checksum (XXH3):

- every blob of latents or text ends in one of its content, its row and its bucket, compared whenever the blob is read;
- `Checksums`, which lie in the set's card, cover the rest. What a blob is found by is compared when the shard is opened, keys and captions
  when they are read: opening looks at some tens of bytes of a row, never at the blobs.

And every file has a SHA-256, which `microdit data verify` compares.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from microdit.errors import UserError

BATCH_ROWS = 256  # of a record batch: what is held in memory while writing
CHECKSUM_BYTES = 8


class DamagedShard(UserError):  # noqa: N818
    """A shard, or a row of it, is not what was written. The message names the file."""


class Checksums(NamedTuple):
    """Of all of a shard but its blobs: the messages of the Arrow stream (columns, lengths, positions), the numbers beside the blobs (their
    offsets, buckets and weights), keys, captions.
    """

    messages: str
    numbers: str
    key: str
    captions: str


def checksums_of(path: Path) -> Checksums:
    """Of a shard that has just been written."""
    mapped = _map(path)
    table = _read_table(mapped)
    return Checksums(
        _messages_checksum(mapped), *(_columns_checksum(table, columns) for columns in (_number_columns(table), ["key"], ["captions"]))
    )


@dataclass(frozen=True)
class Row:
    """An encoded sample. `latents` has one blob a resolution, `text` one a caption, in the order of `captions` and their `weights`."""

    key: str
    bucket: int
    captions: list[str]
    weights: list[float]
    text: list[bytes]
    latents: dict[int, bytes]


def schema(resolutions: list[int]) -> pa.Schema:
    """Of a shard; `latents_256` and so on, one column a resolution."""
    columns = [
        ("key", pa.string()),
        ("bucket", pa.int16()),
        ("captions", pa.list_(pa.string())),
        ("weights", pa.list_(pa.float32())),
        ("text", pa.list_(pa.binary())),
    ]
    return pa.schema(columns + [(_latents_column(resolution), pa.binary()) for resolution in resolutions])


@dataclass
class ShardWriter:
    """Writes rows to `path`; no more than BATCH_ROWS of them are in memory. `close` before reading."""

    path: Path
    resolutions: list[int]
    rows: int = 0
    buckets: dict[int, int] = field(default_factory=dict)
    _waiting: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file = self.path.open("wb")
        self._stream = pa.ipc.new_stream(self._file, schema(self.resolutions))

    def write(self, row: Row) -> None:
        latents = {_latents_column(resolution): _seal(row.latents[resolution], self.rows, row.bucket) for resolution in self.resolutions}
        text = [_seal(blob, self.rows, row.bucket) for blob in row.text]
        self._waiting.append(
            {"key": row.key, "bucket": row.bucket, "captions": row.captions, "weights": row.weights, "text": text, **latents}
        )
        self.rows += 1
        self.buckets[row.bucket] = self.buckets.get(row.bucket, 0) + 1
        if len(self._waiting) == BATCH_ROWS:
            self._flush()

    def close(self) -> None:
        """To the disk, all of it."""
        self._flush()
        self._stream.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._waiting:
            self._stream.write_batch(pa.RecordBatch.from_pylist(self._waiting, schema(self.resolutions)))
            self._waiting = []


class Shard:
    """A shard open for reading. Raises DamagedShard whenever something is not as it was written."""

    def __init__(self, path: Path, expected_bytes: int, expected_rows: int, resolutions: list[int], checksums: Checksums | None):
        """`checksums` are None for what an earlier version encoded: then Arrow's own validation is all that covers more than the blobs."""
        self.path, self._checksums = path, checksums
        try:
            if path.stat().st_size != expected_bytes:
                raise DamagedShard(f"{path} has {path.stat().st_size} bytes, not the {expected_bytes} that were written")
            mapped = _map(path)
            if checksums is not None and _messages_checksum(mapped) != checksums.messages:
                raise DamagedShard(f"{path} is not what was written (the checksum of its Arrow messages differs)")
            table = _read_table(mapped)
            if checksums is None:
                table.validate(full=True)  # a changed offset would make a read go anywhere
            elif _columns_checksum(table, _number_columns(table)) != checksums.numbers:
                raise DamagedShard(f"{path} is not what was written (the checksum of its offsets, buckets and weights differs)")
        except (OSError, pa.ArrowException) as error:
            raise DamagedShard(f"{path} cannot be read ({' '.join(str(error).split())})") from error
        if table.schema != schema(resolutions):
            raise DamagedShard(f"{path} has other columns than were written")
        if len(table) != expected_rows:
            raise DamagedShard(f"{path} has {len(table)} rows, not the {expected_rows} that were written")
        self._table = table
        batches = table.to_batches()
        self._starts = np.cumsum([0] + [len(batch) for batch in batches])
        self._batches = [_BatchColumns(batch) for batch in batches]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def latents(self, row: int, resolution: int, bucket: int = 0) -> memoryview:
        """Of a row that is known to be in `bucket`."""
        batch, inside = self._find(row)
        return self._unseal(batch.blob(_latents_column(resolution), inside), row, bucket)

    def text(self, row: int, draw: float, bucket: int = 0) -> memoryview:
        """One of the row's captions: `draw` in [0, 1) falls on it by its weight."""
        batch, inside = self._find(row)
        first, last = batch.captions(inside)
        if last - first > 1:
            ends = np.cumsum(batch.weights[first:last])
            first += min(int(np.searchsorted(ends, draw * ends[-1], side="right")), last - first - 1)
        return self._unseal(batch.blob("text", first), row, bucket)

    def column(self, name: str) -> list[Any]:
        """`key`, `bucket`, `captions` or `weights` of all rows."""
        written = None if self._checksums is None else {"key": self._checksums.key, "captions": self._checksums.captions}.get(name)
        if written is not None and _columns_checksum(self._table, [name]) != written:
            raise DamagedShard(f"{self.path} is not what was written (the checksum of the column {name} differs)")
        values: list[Any] = self._table.column(name).to_pylist()
        return values

    def row_in_bucket(self, bucket: int, number: int) -> int:
        """The row that is number `number` among those of a bucket."""
        rows = self._rows_by_bucket.get(bucket, np.empty(0, np.int64))
        if number >= len(rows):
            raise DamagedShard(f"{self.path} has {len(rows)} rows in bucket {bucket}, not the {number + 1} or more that were written")
        return int(rows[number])

    @cached_property
    def _rows_by_bucket(self) -> dict[int, NDArray[np.int64]]:
        buckets = self._table.column("bucket").to_numpy()
        return {int(bucket): np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)}

    def _find(self, row: int) -> tuple["_BatchColumns", int]:
        which = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[which], row - int(self._starts[which])

    def _unseal(self, blob: memoryview, row: int, bucket: int) -> memoryview:
        payload = blob[:-CHECKSUM_BYTES]
        if _checksum(payload, row, bucket) != blob[-CHECKSUM_BYTES:]:
            raise DamagedShard(f"row {row} of {self.path} is not what was written (its checksum differs)")
        return payload


class _BatchColumns:
    """A record batch's blobs by number, straight from Arrow's buffers: through pyarrow's scalars it would take ten times as long."""

    def __init__(self, batch: pa.RecordBatch):
        text = batch.column("text")
        self._text_starts = text.offsets.to_numpy()
        self.weights = batch.column("weights").values.to_numpy()
        names = [name for name in batch.schema.names if _holds_blobs(name) and name != "text"]
        self._blobs = {"text": _offsets_and_data(text.values), **{name: _offsets_and_data(batch.column(name)) for name in names}}

    def captions(self, row: int) -> tuple[int, int]:
        """The numbers of the row's first caption and of the next row's."""
        return int(self._text_starts[row]), int(self._text_starts[row + 1])

    def blob(self, column: str, number: int) -> memoryview:
        offsets, data = self._blobs[column]
        return data[offsets[number] : offsets[number + 1]]


def _offsets_and_data(blobs: pa.BinaryArray) -> tuple[NDArray[np.int32], memoryview]:
    _, offsets, data = blobs.buffers()
    return np.frombuffer(offsets, np.int32)[blobs.offset : blobs.offset + len(blobs) + 1], memoryview(data or b"").cast("B")


def _map(path: Path) -> pa.Buffer:
    """A file's content, mapped. Its descriptor is free again for other shards.

    An Arrow reader of a mapped file asks the system for all that it passes over, which would be the whole shard; one of a buffer does not.
    """
    with pa.memory_map(str(path)) as mapped:
        return mapped.read_buffer(1).parent


def _read_table(mapped: pa.Buffer) -> pa.Table:
    """Nothing is copied, and only the messages are looked at."""
    return pa.ipc.open_stream(mapped).read_all()


def _messages_checksum(mapped: pa.Buffer) -> str:
    digest = xxhash.xxh3_128()
    for message in pa.ipc.MessageReader.open_stream(mapped):
        digest.update(message.metadata)
    return digest.hexdigest()


def _columns_checksum(table: pa.Table, names: Iterable[str]) -> str:
    """Of all buffers of these columns, without the blobs."""
    digest = xxhash.xxh3_128()
    for name in names:
        for chunk in table.column(name).chunks:
            buffers = chunk.buffers()
            for buffer in buffers[:-1] if _holds_blobs(name) else buffers:  # the last one holds the content
                if buffer is not None:
                    digest.update(buffer)
    return digest.hexdigest()


def _number_columns(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name not in ("key", "captions")]


def _holds_blobs(column: str) -> bool:
    return column == "text" or column.startswith(_latents_column(""))


def _seal(payload: bytes, row: int, bucket: int) -> bytes:
    return payload + _checksum(payload, row, bucket)


def _checksum(payload: bytes | memoryview, row: int, bucket: int) -> bytes:
    return xxhash.xxh3_64_digest(payload, seed=row << 16 | bucket)


def _latents_column(resolution: int | str) -> str:
    return f"latents_{resolution}"
