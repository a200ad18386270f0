"""Read untrusted files safely, and list the images below a folder.

Only regular files that lie within the source are read, and only up to a size limit: a name may belong to a pipe that nobody writes to, an
endless device, or a link to a file outside the source. A list of images takes as much memory as their names and 8 bytes each, because
there may be millions.
"""

import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from microdit.io.files import open_regular

LARGEST_FILE = 200_000_000  # bytes of an image file
LARGEST_TEXT = 4_000_000  # bytes of a caption file, or of a line of a list
CAN_DRAW = find_spec("resvg_py") is not None  # the extra `svg` is installed

# The usual suffixes of the formats that `decode.py` recognises by content, with or without a plugin.
IMAGE_SUFFIXES = (
    *((".svg",) if CAN_DRAW else ()),
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"),
    *(".jp2", ".j2k", ".jpf", ".jpx", ".jxl", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi", ".pcx", ".sgi"),
)
# What an image of any name begins with. TIFF is missing: cameras' raw files begin like it.
_BEGINNINGS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM....\0\0\0\0|RIFF....WEBP|....ftyp(?:avif|avis|heic|heix)|\0\0\0\x0cjP  |qoif", re.DOTALL
)
BEGINNING = 16  # bytes that are enough to recognise any of them
# Files of these names are never opened to see whether they are images: there may be one beside each image.
_OTHER_SUFFIXES = (
    *(b".txt", b".caption", b".json", b".jsonl", b".ndjson", b".csv", b".tsv", b".parquet", b".md", b".yaml"),
    *(b".tar", b".tgz", b".zip", b".gz", b".zst", b".bz2"),
)
BLOCK = 10_000  # names that are held as Python objects at a time

NO_FILE = "no such file"
UNREADABLE = "file cannot be read"
NOT_REGULAR = "not a regular file"
TOO_LARGE = "file is too large"
OUTSIDE = "link leads out of the source"
LOCKED = "folder cannot be read"

# Kinds of files that are passed over; all other kinds are suffixes.
HIDDEN_FILE = "hidden file"
HIDDEN_FOLDER = "hidden folder"
LINKED_FOLDER = "linked folder"
NO_SUFFIX = "without a suffix"
OTHER_KINDS = "of other kinds"
MOST_KINDS = 100  # counted separately; hostile sources have any number

Roots = tuple[Path, ...]  # the folders in which files may lie, with all links resolved


class Refused(Exception):  # noqa: N818
    """Raised for a file that is not read. Equal problems have the same `reason`, so that they can be counted."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def roots_of(folder: Path) -> Roots:
    """Return the folders in which the files of a source may lie: its own, and `blobs` for a snapshot in the cache of Hugging Face."""
    real = _real_folder(folder.absolute())
    snapshot = next((place for place in (real, *real.parents) if place.parent.name == "snapshots"), None)
    return (real, snapshot.parent.parent / "blobs") if snapshot else (real,)


def lies_in(path: Path, roots: Roots) -> bool:
    """Return whether the file, with links resolved, lies in one of these folders."""
    return any(_real(path).is_relative_to(root) for root in roots)


def open_file(path: Path, roots: Roots | None) -> BinaryIO:
    """Open a regular file for reading, without ever waiting for a writer. Without `roots` it may lie anywhere. Raises Refused."""
    try:
        if roots is not None and not lies_in(path, roots):
            raise Refused(OUTSIDE)
        return open_regular(path)
    except FileNotFoundError:
        raise Refused(NO_FILE) from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise Refused(NOT_REGULAR if getattr(error, "errno", None) == errno.EINVAL else UNREADABLE) from error


def read_file(path: Path, roots: Roots | None, most: int = LARGEST_FILE) -> tuple[bytes, str]:
    """Return the content and "", or b"" and the reason why the file was not read. `most` is the size limit in bytes."""
    try:
        with open_file(path, roots) as file:
            size = os.fstat(file.fileno()).st_size
            return (b"", TOO_LARGE) if size > most else (file.read(size), "")
    except Refused as refused:
        return b"", refused.reason
    except OSError:
        return b"", UNREADABLE


def bounded_lines(file: IO[AnyStr], most: int = LARGEST_TEXT) -> Iterator[AnyStr | None]:
    """Yield the lines of a file with their line ends, and None in place of a line of more than `most` bytes (or characters)."""
    while line := file.readline(most + 1):
        if len(line) <= most:
            yield line
            continue
        while line and not _ends(line):
            line = file.readline(most)
        yield None


@dataclass(frozen=True)
class ListedImage:
    """An image that is known but not yet read: its key, its `file` relative to the folder, its captions or its problem, and its address."""

    key: str
    file: str
    captions: dict[str, str] = field(default_factory=dict)
    problem: str = ""
    url: str = ""


@dataclass(frozen=True)
class ImageList:
    """The images of a folder, as concatenated file names: number i is `names[offsets[i]:offsets[i + 1]]`.

    The arrays may be slices of a file. `problems` maps names to problems; all other images have the problem `otherwise`.
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
        """Return the chosen images."""
        buffers = [None, pa.py_buffer(self.offsets), pa.py_buffer(self.names)]
        array = pa.LargeBinaryArray.from_buffers(pa.large_binary(), self.count, buffers)
        return type(self)(*_arrays_of(array.filter(pa.array(chosen))), self.problems, otherwise)


@dataclass(frozen=True)
class FoundFiles:
    """The files below a folder: its `images`, and the names of its `others`, an Arrow array of bytes, both sorted.

    `passed_over` counts what was not searched: hidden files and folders, and linked folders whose files are met at their own place.
    """

    images: ImageList
    others: Any
    passed_over: dict[str, int]


def find_files(folder: Path) -> FoundFiles:
    """List the files below `folder`. Those without the suffix of an image are images if they begin like one.

    Folders that are not searched, because they cannot be read or are links that lead out of the source, are listed with a problem.
    """
    images, others = _Names(), _Names()
    problems: dict[bytes, str] = {}
    passed_over: Counter[str] = Counter()
    top, roots = os.fsencode(folder), roots_of(folder)
    suffixes = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)
    waiting = [b""]  # folders to search, each with a trailing slash
    while waiting:
        inside = waiting.pop()
        try:
            with os.scandir(os.path.join(top, inside)) as entries:
                for entry in entries:
                    name, hidden = inside + entry.name, entry.name.startswith(b".")
                    if is_folder(entry):
                        if hidden:
                            passed_over[HIDDEN_FOLDER] += 1
                        elif not entry.is_symlink():
                            waiting.append(name + b"/")
                        elif lies_in(folder / os.fsdecode(name), roots):
                            passed_over[LINKED_FOLDER] += 1
                        else:
                            problems[name] = OUTSIDE
                    elif hidden:
                        passed_over[HIDDEN_FILE] += 1
                    else:
                        is_image = name.lower().endswith(suffixes) or _begins_as_image(folder / os.fsdecode(name), roots)
                        (images if is_image else others).add(name)
        except OSError:
            problems[inside.rstrip(b"/") or b"."] = LOCKED
    listed = ImageList(*_arrays_of(images.sorted([*problems])), {os.fsdecode(name): problem for name, problem in problems.items()})
    return FoundFiles(listed, others.sorted(), dict(passed_over))


def has_images(folder: Path) -> bool:
    """Return whether there is an image below `folder`."""
    roots = roots_of(folder)
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        seen = [name for name in files if not name.startswith(".")]
        if any(name.lower().endswith(IMAGE_SUFFIXES) for name in seen) or any(_begins_as_image(Path(place, name), roots) for name in seen):
            return True
    return False


def begins_as_image(name: str, read: Callable[[int], bytes]) -> bool:
    """Return whether a file without the suffix of an image is one by its first bytes; `read(size)` returns them, if they are needed."""
    return not os.fsencode(name).lower().endswith(_OTHER_SUFFIXES) and _BEGINNINGS.match(read(BEGINNING)) is not None


def _begins_as_image(path: Path, roots: Roots) -> bool:
    def read(size: int) -> bytes:
        with open_file(path, roots) as file:
            return file.read(size)

    try:
        return begins_as_image(path.name, read)
    except (Refused, OSError):  # it is passed over, whatever it is
        return False


def is_hidden(path: str) -> bool:
    """Return whether the file or a folder in its path has a name that begins with a dot."""
    return (path.startswith(".") or "/." in path) and any(part.strip(".") and part.startswith(".") for part in path.split("/"))


def kind_of(path: str) -> str:
    """Return the kind as which a file is counted where it is passed over: its suffix, if it has a short one."""
    suffix = _SUFFIX.search(path)
    return HIDDEN_FILE if is_hidden(path) else suffix[0].lower() if suffix else NO_SUFFIX


def count_kind(counts: Counter[str], kind: str, times: int = 1) -> None:
    """Count files of a kind. Beyond `MOST_KINDS`, further kinds are counted together."""
    counts[kind if kind in counts or len(counts) < MOST_KINDS else OTHER_KINDS] += times


def sum_of_kinds(*counts: Mapping[str, int]) -> dict[str, int]:
    """Return the sum of several counts, by kind, the most frequent first."""
    total: Counter[str] = Counter()
    for some in counts:
        for kind, times in some.items():
            count_kind(total, kind, times)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def is_folder(entry: os.DirEntry[Any]) -> bool:
    """Return whether an entry is a folder or a link to one. A circular link is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


_SUFFIX = re.compile(r"(?<=[^/])\.[A-Za-z0-9]{1,9}$")


class _Names:
    """A growing list of names, most of them in Arrow arrays instead of Python objects."""

    def __init__(self) -> None:
        self._blocks: list[pa.LargeBinaryArray] = []
        self._names: list[bytes] = []

    def add(self, name: bytes) -> None:
        self._names.append(name)
        if len(self._names) >= BLOCK:
            self._blocks.append(pa.array(self._names, pa.large_binary()))
            self._names = []

    def sorted(self, more: Sequence[bytes] = ()) -> Any:
        """Return all names and `more` as one sorted array. The list is empty afterwards."""
        array = pa.chunked_array([*self._blocks, pa.array([*self._names, *more], pa.large_binary())]).combine_chunks()
        self._blocks, self._names = [], []
        return array.take(pc.sort_indices(array))


def _real(path: Path) -> Path:
    """Resolve links. Fast for the usual case: the file itself is no link, and its folder has been resolved before."""
    if path.is_symlink() or path.name == "..":
        return Path(os.path.realpath(path))
    return _real_folder(path.parent.absolute()) / path.name


@lru_cache(maxsize=1024)
def _real_folder(folder: Path) -> Path:
    return Path(os.path.realpath(folder))


def _ends(line: str | bytes) -> bool:
    return line.endswith(("\n", "\r")) if isinstance(line, str) else line.endswith(b"\n")


def _arrays_of(array: Any) -> tuple[int, NDArray[np.int64], NDArray[np.uint8]]:
    """Return the length, offsets and bytes of an Arrow array of strings."""
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    _, offsets, names = array.buffers()
    offsets_N1 = np.frombuffer(offsets, np.int64, len(array) + 1) if offsets is not None and len(array) else np.zeros(1, np.int64)
    return len(array), offsets_N1, np.frombuffer(names, np.uint8, int(offsets_N1[-1])) if names is not None else np.zeros(0, np.uint8)
