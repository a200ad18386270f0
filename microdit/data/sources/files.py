"""Files that somebody else made, read within bounds: regular files that lie in the source, and never more than so many bytes.

A picture's name may stand for a pipe that nobody writes to, a device without an end, or a link to a file that is none of the source's.

The pictures below a folder, listed in as many bytes as their names have, and 8 more each: there may be millions.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

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


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_ENDS = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)
BLOCK = 10_000  # names that are Python objects at a time
LOCKED = "folder cannot be read"


@dataclass(frozen=True)
class ListedImage:
    """What is known of a picture before its file is opened. `file` is relative to the folder."""

    key: str
    file: str
    captions: dict[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class ImageList:
    """Names one behind the other in `names`, number i from `offsets[i]` to `offsets[i + 1]`: arrays, or such that lie in a file.

    `problems` are those of some; the others have the problem `otherwise`.
    """

    count: int
    offsets: Any  # int64, (count + 1,)
    names: Any  # uint8
    problems: dict[str, str]
    otherwise: str = ""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, which: slice) -> list[ListedImage]:
        start, stop, _ = which.indices(self.count)
        if stop <= start:
            return []
        offsets = self.offsets[start : stop + 1]
        names = self.names[int(offsets[0]) : int(offsets[-1])].tobytes()
        listed = [os.fsdecode(names[first:last]) for first, last in pairwise((offsets - offsets[0]).tolist())]
        return [ListedImage(name, name, problem=self.problems.get(name, self.otherwise)) for name in listed]

    def only(self, chosen: NDArray[np.bool_], otherwise: str) -> Self:
        buffers = [None, pa.py_buffer(self.offsets), pa.py_buffer(self.names)]
        array = pa.LargeBinaryArray.from_buffers(pa.large_binary(), self.count, buffers)
        return type(self)(*_arrays_of(array.filter(pa.array(chosen))), self.problems, otherwise)


def find_images(folder: Path) -> ImageList:
    """The pictures below `folder`, sorted; also the folders that are not looked into: behind links that lead out, or locked."""
    blocks: list[pa.LargeBinaryArray] = []
    names: list[bytes] = []
    problems: dict[bytes, str] = {}
    top, roots = os.fsencode(folder), roots_of(folder)
    waiting = [b""]  # folders below, each with a slash behind it
    while waiting:
        inside = waiting.pop()
        try:
            with os.scandir(os.path.join(top, inside)) as entries:
                for entry in entries:
                    name = inside + entry.name
                    if is_folder(entry):
                        if not entry.is_symlink():
                            waiting.append(name + b"/")
                        elif not lies_in(folder / os.fsdecode(name), roots):
                            problems[name] = OUTSIDE
                    elif name.lower().endswith(IMAGE_ENDS) and not entry.name.startswith(b"."):
                        names.append(name)
                    if len(names) >= BLOCK:
                        blocks.append(pa.array(names, pa.large_binary()))
                        names = []
        except OSError:
            problems[inside.rstrip(b"/") or b"."] = LOCKED
    array = pa.chunked_array([*blocks, pa.array([*names, *problems], pa.large_binary())]).combine_chunks()
    del blocks, names
    return ImageList(*_arrays_of(array.take(pc.sort_indices(array))), {os.fsdecode(name): problem for name, problem in problems.items()})


def is_folder(entry: os.DirEntry[Any]) -> bool:
    """Also a link to one; a link that leads round in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _arrays_of(array: Any) -> tuple[int, NDArray[np.int64], NDArray[np.uint8]]:
    """The count, offsets and bytes of an array that begins at its first byte."""
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    _, offsets, names = array.buffers()
    offsets_N1 = np.frombuffer(offsets, np.int64, len(array) + 1) if offsets is not None and len(array) else np.zeros(1, np.int64)
    return len(array), offsets_N1, np.frombuffer(names, np.uint8, int(offsets_N1[-1])) if names is not None else np.zeros(0, np.uint8)
