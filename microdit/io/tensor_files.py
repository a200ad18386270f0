"""The files shards/*.safetensors of a checkpoint: rows of tensors, written by the process that holds them, read by any other.

Each is a safetensors file whose header gives the first row of each tensor in the format of torch.distributed.checkpoint, so PyTorch can
read it too. Processes write without planning or communication. A reader must know where all rows are, and the headers of a thousand
processes are 400 MB of JSON: each header is read by one process, which sends it to the others as `PIECE`s of 24 bytes.
"""

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from microdit.io.files import open_regular
from microdit.io.untrusted_text import parse_json

PIECE = np.dtype([("tensor", "<i4"), ("file", "<i4"), ("first", "<i4"), ("rows", "<i4"), ("at", "<i8")])
"""`rows` rows of a tensor from row `first` on, stored in a file from byte `at` on. Tensors and files are indices into lists of names."""
Pieces = NDArray[np.void]
NO_PIECES: Pieces = np.empty(0, PIECE)

MOST_AT_ONCE = 1000  # buffers in one preadv call: systems allow 1,024
MOST_HEADER = 100_000_000  # bytes: the limit of safetensors itself
LENGTH = struct.Struct("<Q")
SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # as torch.distributed.checkpoint writes them
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Rows(NamedTuple):
    """Some rows of a tensor, from row `first` on. A scalar is one row."""

    first: int
    values: Tensor

    @property
    def length(self) -> int:
        return len(self.values) if self.values.dim() else 1


class Entry(NamedTuple):
    """One tensor in a header: the shape of the stored rows, which begin at row `first` of the tensor and byte `at` of the file."""

    first: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    at: int

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1


def write_rows(path: Path, held: Mapping[str, Rows]) -> dict[str, Entry]:
    """Write a file of rows, which must be in CPU memory. Returns its header."""
    order = sorted(held, key=lambda name: (-held[name].values.dtype.itemsize, name))  # aligns every number to its size
    header: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "DCP_VERSION": "1.0",
            SHARDING: json.dumps({name: {OFFSETS: _offsets(*held[name])} for name in order}),
        }
    }
    entries: dict[str, Entry] = {}
    end = 0
    for name in order:
        first, values = held[name]
        entries[name] = Entry(first, tuple(values.shape), values.dtype, end)
        header[name] = {"dtype": NAMES[values.dtype], "shape": list(values.shape), "data_offsets": [end, end := end + values.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(LENGTH.pack(len(text)) + text)
        for name in order:
            file.write(_bytes_of(held[name].values))
    return {name: entry._replace(at=LENGTH.size + len(text) + entry.at) for name, entry in entries.items()}


def read_header(path: Path) -> dict[str, Entry]:
    """Return the entries of a file by tensor name. Raises OSError if it cannot be read, ValueError if it is not such a file."""
    with open_regular(path) as file:
        start = file.read(LENGTH.size)
        length = LENGTH.unpack(start)[0] if len(start) == LENGTH.size else 0
        if not 2 <= length <= MOST_HEADER:
            raise ValueError(f"{path} is no safetensors file")
        text, size = file.read(length), file.seek(0, os.SEEK_END)
    try:
        header = parse_json(text)
        info = header.pop("__metadata__", {}).get(SHARDING)
        offsets = {} if info is None else parse_json(info)
        return {name: _entry(about, offsets.get(name), LENGTH.size + length, size) for name, about in header.items()}
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"the header of {path} cannot be understood ({type(error).__name__}: {error})") from None


def pieces_of(header: Mapping[str, Entry], file: int, tensors: Mapping[str, int]) -> Pieces:
    """Return the pieces of the given tensors in file number `file`. `tensors` maps names to numbers."""
    found = [(tensors[name], file, entry.first, entry.rows, entry.at) for name, entry in header.items() if name in tensors]
    return np.array(found, PIECE)


def within(pieces: Pieces, spans: NDArray[np.int64]) -> Pieces:
    """Return the pieces that overlap the `spans`, one (first, end) of rows for each tensor."""
    first, end = spans[pieces["tensor"]].T
    return pieces[(pieces["first"] < end) & (pieces["first"] + pieces["rows"] > first)]


def fill(wanted: Sequence[Rows], pieces: Pieces, files: Sequence[Path]) -> None:
    """Read all `wanted` rows, one `Rows` for each tensor, in place. Each file is opened once and read in order.

    Raises OSError if a file cannot be read, ValueError if it is too short, or if rows are missing or stored twice.
    """
    _check_contiguous(pieces)
    missing = [rows.length for rows in wanted]
    landing = [_Landing(rows) for rows in wanted]
    pieces = pieces[np.lexsort((pieces["at"], pieces["file"]))]
    for of_file in np.split(pieces, np.flatnonzero(np.diff(pieces["file"])) + 1) if len(pieces) else []:
        path = files[of_file["file"][0]]
        with path.open("rb", buffering=0) as stream:
            run: list[memoryview] = []
            begin = position = 0
            for tensor, _, first, rows, at in of_file.tolist():
                place = landing[tensor]
                low, high = max(first, place.first), min(first + rows, place.end)
                start = at + (low - first) * place.row
                if start != position or len(run) == MOST_AT_ONCE:
                    _read(stream.fileno(), run, begin, path)
                    run, begin = [], start
                run.append(place.memory[(low - place.first) * place.row : (high - place.first) * place.row])
                position = start + len(run[-1])
                missing[tensor] -= high - low
            _read(stream.fileno(), run, begin, path)
    if any(missing):
        raise ValueError("some rows are in no file")
    for place in landing:
        place.arrive()


def _read(file: int, run: list[memoryview], at: int, path: Path) -> None:
    """Fill buffers, one after the other, from byte `at` of a file, in one call if possible. The call releases Python's global lock."""
    while run:
        count = os.preadv(file, run, at)
        if not count and any(map(len, run)):
            raise ValueError(f"{path} is shorter than its header says")
        at += count
        while run and len(run[0]) <= count:
            count -= len(run.pop(0))
        if count:
            run[0] = run[0][count:]


def assembled(paths: Sequence[Path], part: str) -> dict[str, Tensor]:
    """Assemble the tensors of one part of a training state (model, ema ...) from all shards of a checkpoint.

    Raises OSError and ValueError, as `read_header` and `fill` do.
    """
    headers = [{name: entry for name, entry in read_header(path).items() if name.partition("/")[0] == part} for path in paths]
    held: dict[str, list[Entry]] = {}
    for header in headers:
        for name, entry in header.items():
            held.setdefault(name, []).append(entry)
    whole = {name: _empty(name, entries) for name, entries in held.items()}
    numbers = {name: number for number, name in enumerate(whole)}
    pieces = [pieces_of(header, number, numbers) for number, header in enumerate(headers)]
    fill([Rows(0, tensor) for tensor in whole.values()], np.concatenate([*pieces, NO_PIECES]), paths)
    return {name.partition("/")[2]: tensor for name, tensor in whole.items()}


def _empty(name: str, entries: list[Entry]) -> Tensor:
    """Allocate a tensor with as many rows as the files hold together. Raises ValueError if their shapes or dtypes differ."""
    (row, dtype), *others = {(entry.shape[1:], entry.dtype) for entry in entries}
    if others:
        raise ValueError(f"the rows of {name} are not alike")
    return torch.empty((sum(entry.rows for entry in entries), *row) if entries[0].shape else (), dtype=dtype)


def _check_contiguous(pieces: Pieces) -> None:
    """Raise ValueError if pieces of a tensor overlap, or leave a gap."""
    pieces = pieces[np.lexsort((pieces["first"], pieces["tensor"]))]
    neighbours = np.diff(pieces["tensor"]) == 0
    if (pieces["first"][:-1] + pieces["rows"][:-1] != pieces["first"][1:])[neighbours].any():
        raise ValueError("some rows are in no file, or in two")


class _Landing:
    """The buffer that rows are read into: the tensor's own memory if it is contiguous and on the CPU, else a copy. `row`: bytes per row."""

    def __init__(self, rows: Rows):
        self.first, self.end = rows.first, rows.first + rows.length
        self._target = rows.values.detach()
        direct = self._target.device.type == "cpu" and self._target.is_contiguous()
        self._values = self._target if direct else torch.empty(self._target.shape, dtype=self._target.dtype)
        self.memory = _bytes_of(self._values)
        self.row = len(self.memory) // max(1, rows.length)

    def arrive(self) -> None:
        if self._values is not self._target:
            self._target.copy_(self._values)


def _bytes_of(values: Tensor) -> memoryview:
    array: Any = values.detach().reshape(-1).view(torch.uint8).numpy()  # numpy's types do not say that it is a buffer
    return memoryview(array)


def _entry(about: Mapping[str, Any], sharding: Mapping[str, Any] | None, data: int, size: int) -> Entry:
    """Parse one entry. `data` is the byte that offsets count from, `size` the file's size. Raises ValueError, KeyError or TypeError."""
    shape, (begin, end) = _counts(about["shape"]), _counts(about["data_offsets"], 2**62)
    first = [0] * len(shape) if sharding is None else _counts(sharding[OFFSETS])
    if len(first) != len(shape) or any(first[1:]):
        raise ValueError(f"rows of shape {shape} from {first} on")
    dtype = DTYPES[about["dtype"]]
    if end - begin != math.prod(shape) * dtype.itemsize or data + end > size:
        raise ValueError(f"bytes {begin} to {end} for the shape {shape}")
    return Entry(first[0] if first else 0, tuple(shape), dtype, data + begin)


def _counts(numbers: Any, limit: int = 2**30) -> list[int]:
    """Return a list of sizes. Raises ValueError unless all are integers from 0 to below `limit`, so that they fit a `PIECE`."""
    if not isinstance(numbers, list) or not all(isinstance(number, int) and 0 <= number < limit for number in numbers):
        raise ValueError(f"{str(numbers)[:60]} are no sizes")
    return numbers


def _offsets(first: int, values: Tensor) -> list[int]:
    return [first, *[0] * (values.dim() - 1)] if values.dim() else []
