"""Files that somebody else made, read within bounds: regular files that lie in the source, and never more than so many bytes.

A picture's name may stand for a pipe that nobody writes to, a device without an end, or a link to a file that is none of the source's.
"""

import os
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, AnyStr, BinaryIO

LARGEST_FILE = 200_000_000  # bytes of a picture's file
LARGEST_TEXT = 4_000_000  # bytes of a caption's file, or of a line in a list

NO_FILE = "no such file"
UNREADABLE = "file cannot be read"
NOT_REGULAR = "not a regular file"
TOO_LARGE = "file is too large"
OUTSIDE = "link leads out of the source"

Roots = tuple[Path, ...]  # folders, without links in their paths: files may lie in any of them


class Refused(Exception):  # noqa: N818
    """This file is not read. `reason` is the same for all files with the same trouble, so that it can be counted."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def roots_of(folder: Path) -> Roots:
    """Where the files of a source may lie: in its folder. A snapshot in Hugging Face's cache is full of links to its `blobs`."""
    real = _real_folder(folder.absolute())
    snapshot = next((place for place in (real, *real.parents) if place.parent.name == "snapshots"), None)
    return (real, snapshot.parent.parent / "blobs") if snapshot else (real,)


def lies_in(path: Path, roots: Roots) -> bool:
    """Whether the file, or what it links to, is in one of these folders."""
    return any(_real(path).is_relative_to(root) for root in roots)


def open_file(path: Path, roots: Roots | None) -> BinaryIO:
    """The file, open for reading. Without `roots` it may lie anywhere. Raises Refused, and never waits for a writer."""
    try:
        if roots is not None and not lies_in(path, roots):
            raise Refused(OUTSIDE)
        # The opener returns at once for a pipe that nobody writes to.
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except FileNotFoundError:
        raise Refused(NO_FILE) from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise Refused(UNREADABLE) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise Refused(NOT_REGULAR)
    return file


def read_file(path: Path, roots: Roots | None, most: int = LARGEST_FILE) -> tuple[bytes, str]:
    """The content, or why there is none."""
    try:
        with open_file(path, roots) as file:
            size = os.fstat(file.fileno()).st_size
            return (b"", TOO_LARGE) if size > most else (file.read(size), "")
    except Refused as refused:
        return b"", refused.reason
    except OSError:
        return b"", UNREADABLE


def bounded_lines(file: IO[AnyStr], most: int = LARGEST_TEXT) -> Iterator[AnyStr | None]:
    """The lines of a file with their ends. A line of more than `most` bytes, or characters, is passed over, and None given for it."""
    while line := file.readline(most + 1):
        if len(line) <= most:
            yield line
            continue
        while line and not _ends(line):
            line = file.readline(most)
        yield None


def _real(path: Path) -> Path:
    """Without links. Most files are none, and lie in folders that were met before."""
    if path.is_symlink() or path.name == "..":
        return Path(os.path.realpath(path))
    return _real_folder(path.parent.absolute()) / path.name


@lru_cache(maxsize=1024)
def _real_folder(folder: Path) -> Path:
    return Path(os.path.realpath(folder))


def _ends(line: str | bytes) -> bool:
    return line.endswith(("\n", "\r")) if isinstance(line, str) else line.endswith(b"\n")
