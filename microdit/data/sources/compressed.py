"""Read compressed files as streams, as long as they do not expand without bounds.

A few kilobytes of bzip2 or Zstandard can expand to terabytes of zeros, which would take hours even to skip.
"""

import bz2
import gzip
from collections.abc import Callable
from typing import IO, Any, BinaryIO, Literal

import pyarrow as pa

from microdit.data.sources.untrusted_files import LARGEST_FILE, Refused

FREE_EXPANSION = 10 * LARGEST_FILE  # bytes that any file may expand to
MAX_EXPANSION = 200  # beyond that, times the bytes read; flat drawings, stored as plain pixels, expand to about 100 times their size
EXPANDS = f"compressed file expands to more than {MAX_EXPANSION} times its size: unpack it first"

_UNPACK: dict[str, Callable[[BinaryIO], Any]] = {
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "bzip2": bz2.BZ2File,
    "zstd": lambda file: pa.CompressedInputStream(file, "zstd"),
}


class CompressedStream:
    """The unpacked content of a compressed file."""

    def __init__(self, file: BinaryIO, compression: Literal["gzip", "bzip2", "zstd"]):
        self._file, self._unpacked = file, _UNPACK[compression](file)
        self._size = 0

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes. Raises Refused if the file has expanded to more than `max_unpacked`."""
        content: bytes = self._unpacked.read(size)
        self._size += len(content)
        if self._size > max_unpacked(self._file.tell()):
            raise Refused(EXPANDS)
        return content


Stream = IO[bytes] | CompressedStream


def max_unpacked(packed: int) -> int:
    """Return the number of bytes to which so many compressed bytes may expand."""
    return FREE_EXPANSION + MAX_EXPANSION * packed
