"""Shards of an encoded data set: Arrow streams written row by row, each followed by an index through which training reads single rows.

Arrow notices a truncated file, but not a changed block. So everything that is read is compared with a checksum (XXH3):

- Every blob of latents, features or text ends with a checksum of its content, its row and its bucket, which is compared whenever the blob
  is read.
- `Checksums`, which are stored in the manifest, cover the rest: the index is compared when the shard is opened; keys and captions, which
  only Arrow reads, are compared when they are read.

Opening a shard reads the index, some kilobytes; reading a row reads only its blobs, by position. No file is mapped, so a file that shrinks
or vanishes while it is open raises an error that names it, and does not kill the process. Every file also has a SHA-256, which
`microdit data verify` compares.
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

from microdit.data.shard_index import FEATURES, LATENTS, ArrowStream, Numbers, ShardIndex, read_at, schema
from microdit.errors import UserError
from microdit.io.untrusted_text import one_line

BATCH_ROWS = 256  # rows of a record batch, which is held in memory while writing
CHECKSUM_BYTES = 8
MOST_OPEN = 16_000  # shards open at once, each with a file descriptor and about 50 kB of index


_READ_ERRORS = (OSError, EOFError, MemoryError, ValueError, zlib.error, pa.ArrowException)


class DamagedShard(UserError):  # noqa: N818
    """Raised when a shard, or a row of it, is not what was written. The message names the file."""


class Checksums(NamedTuple):
    """The checksums of everything in a shard but its blobs, which have their own.

    `messages` covers the messages of the Arrow stream (columns, lengths, positions), `numbers` the offsets of blobs, buckets and weights,
    and `row_index` the index, the last `row_index_bytes` of the file. Shards of format 3 have no index: it is built when they are opened.
    """

    messages: str
    numbers: str
    key: str
    captions: str
    row_index: str = ""
    row_index_bytes: int = 0


def checksums_of(path: Path) -> Checksums:
    """Compute the checksums of a shard that has just been written."""
    with path.open("rb", buffering=0) as file:
        stream = ArrowStream(file.fileno())
        numbers, key, captions = (stream.columns_checksum(names) for names in (stream.number_columns(), ["key"], ["captions"]))
        file.seek(stream.end)
        index = file.read()
    return Checksums(stream.checksum, numbers, key, captions, xxhash.xxh3_128_hexdigest(index), len(index))


def most_open(sets: int = 1) -> int:
    """Return how many shards each of several data sets may have open. Together they use half of this process's file descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_OPEN if soft == resource.RLIM_INFINITY else min(MOST_OPEN, soft // 2)
    return max(1, most // sets)


@dataclass(frozen=True)
class EncodedRow:
    """An encoded sample.

    `latents` and, in sets that have them, `features` have one blob per resolution; `text` has one per caption, in the order of `captions`
    and `weights`.
    """

    key: str
    bucket: int
    captions: list[str]
    weights: list[float]
    text: list[bytes]
    latents: dict[int, bytes]
    features: dict[int, bytes] = field(default_factory=dict)


@dataclass
class ShardWriter:
    """Writes rows to `path` and keeps no more than BATCH_ROWS of them in memory. `close` adds the index."""

    path: Path
    resolutions: list[int]
    features: bool = False
    rows: int = 0
    buckets: dict[int, int] = field(default_factory=dict)
    _waiting: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file = self.path.open("w+b")
        self._schema = schema(self.resolutions, self.features)
        self._stream = pa.ipc.new_stream(self._file, self._schema)

    def write(self, row: EncodedRow) -> None:
        """Append a row."""
        kinds = {LATENTS: row.latents, **({FEATURES: row.features} if self.features else {})}
        images = {
            f"{prefix}{resolution}": seal(blobs[resolution], self.rows, row.bucket)
            for prefix, blobs in kinds.items()
            for resolution in self.resolutions
        }
        text = [seal(blob, self.rows, row.bucket) for blob in row.text]
        self._waiting.append(
            {"key": row.key, "bucket": row.bucket, "captions": row.captions, "weights": row.weights, "text": text, **images}
        )
        self.rows += 1
        self.buckets[row.bucket] = self.buckets.get(row.bucket, 0) + 1
        if len(self._waiting) == BATCH_ROWS:
            self._flush()

    def close(self) -> None:
        """Write the remaining rows and the index, and flush the file to the disk."""
        self._flush()
        self._stream.close()
        self._file.flush()
        self._file.write(ShardIndex.of(ArrowStream(self._file.fileno())).to_bytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close and remove the unfinished file."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._waiting:
            self._stream.write_batch(pa.RecordBatch.from_pylist(self._waiting, self._schema))
            self._waiting = []


class Shard:
    """A shard that is open for reading.

    Every method raises DamagedShard if anything is not as it was written, and another UserError if memory or file descriptors run out.
    """

    def __init__(
        self,
        path: Path,
        expected_bytes: int,
        expected_rows: int,
        resolutions: list[int],
        checksums: Checksums | None,
        features: bool = False,
    ):
        """Open a shard. `checksums` is None for format 2: then only Arrow's own validation covers anything but the blobs."""
        self.path, self._checksums, self._columns = path, checksums, (resolutions, features)
        try:
            self._file = path.open("rb", buffering=0)
            if hasattr(os, "posix_fadvise"):  # missing on macOS
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # rows are read in random order
            self._index = self._read_index(expected_bytes)
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
        """Return the latents of a row, which must be in `bucket`."""
        return self._blob(f"{LATENTS}{resolution}", row, row, bucket)

    def features(self, row: int, resolution: int, bucket: int = 0) -> memoryview:
        """Return the features of a row, which must be in `bucket`, of a set that has features."""
        return self._blob(f"{FEATURES}{resolution}", row, row, bucket)

    def text(self, row: int, draw: float, bucket: int = 0, first_sentence: float = 0.0) -> memoryview:
        """Return one of the row's captions, chosen by weight with `draw` in [0, 1).

        `first_sentence` is the share in which its first sentence, if it is stored, takes the place of a caption.
        """
        first, last = self._index.first_captions[row : row + 2].tolist()
        if last - first > 1:
            ends = np.cumsum(_shared(self._index.weights[first:last], first_sentence))
            first += min(int(np.searchsorted(ends, draw * ends[-1], side="right")), last - first - 1)
        return self._blob("text", first, row, bucket)

    def column(self, name: str) -> list[Any]:
        """Return the column `key`, `bucket`, `captions` or `weights` of all rows."""
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
        """Return the row that is number `number` among the rows of a bucket."""
        rows = self._index.rows_by_bucket.get(bucket, ())
        if number >= len(rows):
            raise DamagedShard(f"{self.path} has {len(rows)} rows in bucket {bucket}, not the {number + 1} or more that were written")
        return int(rows[number])

    def _read_index(self, expected_bytes: int) -> ShardIndex:
        """Read the index, or build it from the stream of a shard that has none."""
        file, size = self._file.fileno(), os.fstat(self._file.fileno()).st_size
        if size != expected_bytes:
            raise DamagedShard(f"{self.path} has {size} bytes, not the {expected_bytes} that were written")
        if self._checksums is not None and self._checksums.row_index:
            content = read_at(file, size - self._checksums.row_index_bytes, self._checksums.row_index_bytes)
            if xxhash.xxh3_128_hexdigest(content) != self._checksums.row_index:
                raise self._differs("its index")
            return ShardIndex.from_bytes(content, *self._columns)
        stream = ArrowStream(file)
        if self._checksums is not None:
            self._compare(stream, "bucket")
        if stream.schema != schema(*self._columns):
            raise DamagedShard(f"{self.path} has other columns than were written")
        if self._checksums is None:
            stream.load(stream.schema.names).validate(full=True)  # a changed offset could point anywhere
        return ShardIndex.of(stream)

    def _compare(self, stream: ArrowStream, column: str) -> None:
        """Compare the messages of a stream and one of its columns with the checksums."""
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


def _shared(weights: Numbers, first_sentence: float) -> Numbers:
    """Return the weights of a row's captions with that share of each caption's weight moved to its first sentence.

    A first sentence follows its caption, and is stored with a weight of 0, which no caption has.
    """
    short = np.flatnonzero(weights == 0)
    if not len(short):
        return weights
    shared = weights.astype(np.float64)
    shared[short] = first_sentence * shared[short - 1]
    shared[short - 1] *= 1 - first_sentence
    return shared


def seal(payload: bytes, row: int, bucket: int) -> bytes:
    """Return a blob as it is stored: its content, followed by the checksum of the content, the row and the bucket."""
    return payload + _checksum(payload, row, bucket)


def _explained(path: Path, error: Exception) -> UserError:
    """Return DamagedShard, or another UserError for a limit of the system, which must not count as damage."""
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or code == errno.ENOMEM:
        return UserError(f"There is no memory left to read {path}: give the process more memory, or run fewer processes on this machine.")
    if code == errno.EMFILE:
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        return UserError(
            f"{path} cannot be opened: this process has reached its limit of {limit} open files. Raise that limit (ulimit -n; "
            f"up to {'any number' if most == resource.RLIM_INFINITY else most} without an administrator)."
        )
    if code == errno.ENFILE:
        return UserError(
            f"{path} cannot be opened: all processes together have reached the system's limit of open files (sysctl fs.file-max)."
        )
    return DamagedShard(f"{path} cannot be read ({one_line(str(error))})")


def _checksum(payload: bytes | memoryview, row: int, bucket: int) -> bytes:
    return xxhash.xxh3_64_digest(payload, seed=row << 16 | bucket)
