"""One shard of an encoded set: an Arrow stream written row by row, and behind it an index by which training reads single rows.

Arrow notices a file that was cut off, not one in which a block was changed. So whatever is read is compared with a checksum (XXH3):

- every blob of latents or text ends in one of its content, its row and its bucket, compared whenever the blob is read;
- `Checksums`, which lie in the set's card, cover the rest: the index is compared when the shard is opened, what only Arrow reads (keys and
  captions) when it is read.

Opening reads the index, some kilobytes, and a row its own blobs, by their positions: no file is mapped, so one that shrinks or vanishes
while it is open is named, and does not kill the process. And every file has a SHA-256, which `microdit data verify` compares.
"""

import errno
import os
import resource
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from microdit.data.shard_index import LATENTS, ArrowStream, ShardIndex, read_at, schema
from microdit.errors import UserError

BATCH_ROWS = 256  # of a record batch: what is held in memory while writing
CHECKSUM_BYTES = 8
MOST_OPEN = 16_000  # shards at once, each with a descriptor and about 50 kB of index


class DamagedShard(UserError):  # noqa: N818
    """A shard, or a row of it, is not what was written. The message names the file."""


class Checksums(NamedTuple):
    """What covers a shard beside its blobs' own checksums: the messages of the Arrow stream (columns, lengths, positions), the numbers
    beside the blobs (their offsets, buckets and weights), keys, captions, and the index, the last `row_index_bytes` of the file.

    Format 3 has no index: it is looked up in the stream at opening.
    """

    messages: str
    numbers: str
    key: str
    captions: str
    row_index: str = ""
    row_index_bytes: int = 0


def checksums_of(path: Path) -> Checksums:
    """Of a shard that has just been written."""
    with path.open("rb", buffering=0) as file:
        stream = ArrowStream(file.fileno())
        numbers, key, captions = (stream.columns_checksum(names) for names in (stream.number_columns(), ["key"], ["captions"]))
        file.seek(stream.end)
        index = file.read()
    return Checksums(stream.checksum, numbers, key, captions, xxhash.xxh3_128_hexdigest(index), len(index))


def most_open(sets: int = 1) -> int:
    """How many shards each of several sets may have open: half of the files that this process may open, together."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_OPEN if soft == resource.RLIM_INFINITY else min(MOST_OPEN, soft // 2)
    return max(1, most // sets)


@dataclass(frozen=True)
class EncodedRow:
    """An encoded sample. `latents` has one blob a resolution, `text` one a caption, in the order of `captions` and their `weights`."""

    key: str
    bucket: int
    captions: list[str]
    weights: list[float]
    text: list[bytes]
    latents: dict[int, bytes]


@dataclass
class ShardWriter:
    """Writes rows to `path`; no more than BATCH_ROWS of them are in memory. `close` adds the index."""

    path: Path
    resolutions: list[int]
    rows: int = 0
    buckets: dict[int, int] = field(default_factory=dict)
    _waiting: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file = self.path.open("w+b")
        self._stream = pa.ipc.new_stream(self._file, schema(self.resolutions))

    def write(self, row: EncodedRow) -> None:
        latents = {f"{LATENTS}{resolution}": seal(row.latents[resolution], self.rows, row.bucket) for resolution in self.resolutions}
        text = [seal(blob, self.rows, row.bucket) for blob in row.text]
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
        self._file.write(ShardIndex.of(ArrowStream(self._file.fileno())).to_bytes())
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
    """A shard open for reading. Raises DamagedShard whenever something is not as it was written, another UserError for want of memory or
    descriptors."""

    def __init__(self, path: Path, expected_bytes: int, expected_rows: int, resolutions: list[int], checksums: Checksums | None):
        """`checksums` are None for what format 2 encoded: then Arrow's own validation is all that covers more than the blobs."""
        self.path, self._checksums, self._resolutions = path, checksums, resolutions
        try:
            self._file = path.open("rb", buffering=0)
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # rows lie anywhere: nothing is to be read ahead
            self._index = self._find_all(expected_bytes)
        except _READ_ERRORS as error:
            raise _explained(path, error) from error
        if len(self._index) != expected_rows:
            raise DamagedShard(f"{path} has {len(self._index)} rows, not the {expected_rows} that were written")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def __len__(self) -> int:
        return len(self._index)

    def latents(self, row: int, resolution: int, bucket: int = 0) -> memoryview:
        """Of a row that is known to be in `bucket`."""
        return self._blob(f"{LATENTS}{resolution}", row, row, bucket)

    def text(self, row: int, draw: float, bucket: int = 0) -> memoryview:
        """One of the row's captions: `draw` in [0, 1) falls on it by its weight."""
        first, last = self._index.first_captions[row : row + 2].tolist()
        if last - first > 1:
            ends = np.cumsum(self._index.weights[first:last])
            first += min(int(np.searchsorted(ends, draw * ends[-1], side="right")), last - first - 1)
        return self._blob("text", first, row, bucket)

    def column(self, name: str) -> list[Any]:
        """`key`, `bucket`, `captions` or `weights` of all rows."""
        try:
            stream = ArrowStream(self._file.fileno())
            if self._checksums is None:
                table = stream.load([name])
                table.validate(full=True)
            else:
                self._compare(stream, name)
                table = stream.load([name])
            values: list[Any] = table.column(name).to_pylist()
            return values
        except _READ_ERRORS as error:
            raise _explained(self.path, error) from error

    def row_in_bucket(self, bucket: int, number: int) -> int:
        """The row that is number `number` among those of a bucket."""
        rows = self._index.rows_by_bucket.get(bucket, ())
        if number >= len(rows):
            raise DamagedShard(f"{self.path} has {len(rows)} rows in bucket {bucket}, not the {number + 1} or more that were written")
        return int(rows[number])

    def _find_all(self, expected_bytes: int) -> ShardIndex:
        """The index, or what it would be for a shard that has none."""
        file, size = self._file.fileno(), os.fstat(self._file.fileno()).st_size
        if size != expected_bytes:
            raise DamagedShard(f"{self.path} has {size} bytes, not the {expected_bytes} that were written")
        if self._checksums is not None and self._checksums.row_index:
            content = read_at(file, size - self._checksums.row_index_bytes, self._checksums.row_index_bytes)
            if xxhash.xxh3_128_hexdigest(content) != self._checksums.row_index:
                raise self._differs("its index")
            return ShardIndex.from_bytes(content, self._resolutions)
        stream = ArrowStream(file)
        if self._checksums is not None:
            self._compare(stream, "bucket")
        if stream.schema != schema(self._resolutions):
            raise DamagedShard(f"{self.path} has other columns than were written")
        if self._checksums is None:
            stream.load(stream.schema.names).validate(full=True)  # a changed offset would make a read go anywhere
        return ShardIndex.of(stream)

    def _compare(self, stream: ArrowStream, column: str) -> None:
        """A stream's messages and what covers one of its columns, with the checksums."""
        assert self._checksums is not None
        if stream.checksum != self._checksums.messages:
            raise self._differs("its Arrow messages")
        if column not in ("key", "captions"):
            if stream.columns_checksum(stream.number_columns()) != self._checksums.numbers:
                raise self._differs("its offsets, buckets and weights")
        elif stream.columns_checksum([column]) != getattr(self._checksums, column):
            raise self._differs(f"the column {column}")

    def _differs(self, what: str) -> DamagedShard:
        return DamagedShard(f"{self.path} is not what was written (the checksum of {what} differs)")

    def _blob(self, column: str, number: int, row: int, bucket: int) -> memoryview:
        blobs = self._index.blobs[column]
        try:
            blob = memoryview(read_at(self._file.fileno(), int(blobs.positions[number]), int(blobs.lengths[number])))
        except _READ_ERRORS as error:
            raise _explained(self.path, error) from error
        payload = blob[:-CHECKSUM_BYTES]
        if _checksum(payload, row, bucket) != blob[-CHECKSUM_BYTES:]:
            raise DamagedShard(f"row {row} of {self.path} is not what was written (its checksum differs)")
        return payload


_READ_ERRORS = (OSError, EOFError, MemoryError, ValueError, zlib.error, pa.ArrowException)


def _explained(path: Path, error: Exception) -> UserError:
    """Damage, or a limit of the system, which says nothing of the shard: that is never to be counted as damage."""
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or code == errno.ENOMEM:
        return UserError(f"There is no memory left to read {path}: give the process more, or let fewer run on this machine.")
    if code == errno.EMFILE:
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        return UserError(
            f"{path} cannot be opened: this process has as many files open as it may, {limit}. Raise that limit (ulimit -n; "
            f"up to {'any number' if most == resource.RLIM_INFINITY else most} without an administrator)."
        )
    if code == errno.ENFILE:
        return UserError(
            f"{path} cannot be opened: all processes together have as many files open as this system allows (sysctl fs.file-max)."
        )
    return DamagedShard(f"{path} cannot be read ({' '.join(str(error).split())})")


def seal(payload: bytes, row: int, bucket: int) -> bytes:
    """A blob as it is stored: its content and the checksum of it, its row and its bucket."""
    return payload + _checksum(payload, row, bucket)


def _checksum(payload: bytes | memoryview, row: int, bucket: int) -> bytes:
    return xxhash.xxh3_64_digest(payload, seed=row << 16 | bucket)
