"""The pictures below a folder, listed in as many bytes as their names have, and 8 more each: there may be millions."""

import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from microdit.data.untrusted import OUTSIDE, lies_in, roots_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_ENDS = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)
BLOCK = 10_000  # names that are Python objects at a time
LOCKED = "folder cannot be read"


@dataclass(frozen=True)
class Listed:
    """What is known of a picture before its file is opened. `file` is relative to the folder."""

    key: str
    file: str
    captions: dict[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Pictures:
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

    def __getitem__(self, which: slice) -> list[Listed]:
        start, stop, _ = which.indices(self.count)
        if stop <= start:
            return []
        offsets = self.offsets[start : stop + 1]
        names = self.names[int(offsets[0]) : int(offsets[-1])].tobytes()
        listed = [os.fsdecode(names[first:last]) for first, last in pairwise((offsets - offsets[0]).tolist())]
        return [Listed(name, name, problem=self.problems.get(name, self.otherwise)) for name in listed]

    def only(self, chosen: NDArray[np.bool_], otherwise: str) -> Self:
        buffers = [None, pa.py_buffer(self.offsets), pa.py_buffer(self.names)]
        array = pa.LargeBinaryArray.from_buffers(pa.large_binary(), self.count, buffers)
        return type(self)(*_arrays_of(array.filter(pa.array(chosen))), self.problems, otherwise)


def find_images(folder: Path) -> Pictures:
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
    return Pictures(*_arrays_of(array.take(pc.sort_indices(array))), {os.fsdecode(name): problem for name, problem in problems.items()})


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
