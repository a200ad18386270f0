"""Checkpoints of Flax (`flax.serialization.msgpack_serialize`), read as nested dictionaries of tensors. Nothing in the file is run.

Such a file is MessagePack (github.com/msgpack/msgpack, spec.md) with three extension types: 1 an array as [shape, dtype, bytes], 2 a
complex number, 3 a scalar of NumPy, written as an array is. An array above 1 GiB is a map that holds its parts.
"""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microdit.errors import UserError

MOST_LEVELS = 64
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint32": torch.uint32,
}
_ARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
# By the first byte of a number.
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_LENGTHS = {1: ">B", 2: ">H", 4: ">I"}


def read_flax(path: Path) -> dict[str, Any]:
    """Return the file's nested dictionaries, with arrays as tensors. Raises UserError if it is damaged, or something else."""
    content = bytearray(path.stat().st_size)
    with path.open("rb") as file:
        file.readinto(content)
    reader = _Reader(memoryview(content))
    try:
        tree = reader.value(0)
        if not isinstance(tree, dict) or reader.at != len(content):
            raise ValueError("it is not a map alone")
    except (ValueError, struct.error, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is no checkpoint of Flax, or it is damaged ({error}): download it again.") from error
    return tree


class _Reader:
    """A position in the bytes of a file. Lengths that the file states are compared with what is left of it before anything is made."""

    def __init__(self, content: memoryview):
        self._content, self.at = content, 0

    def value(self, level: int) -> Any:
        """Read the value at the position."""
        if level > MOST_LEVELS:
            raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")
        first = self._take(1)[0]
        if first < 0x80:
            return first
        if first >= 0xE0:
            return first - 0x100
        if first < 0x90:
            return self._map(first & 0x0F, level)
        if first < 0xA0:
            return self._list(first & 0x0F, level)
        if first < 0xC0:
            return self._text(first & 0x1F)
        if first in _NUMBERS:
            return self._number(_NUMBERS[first])
        if first in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[first]
        if 0xD4 <= first <= 0xD8:
            return self._extension(1 << (first - 0xD4), level)
        kinds: dict[int, tuple[int, Callable[[int], Any]]] = {  # bytes of the length, and what follows it
            **{0xC4 + i: (1 << i, self._bytes) for i in range(3)},
            **{0xC7 + i: (1 << i, lambda size: self._extension(size, level)) for i in range(3)},
            **{0xD9 + i: (1 << i, self._text) for i in range(3)},
            **{0xDC + i: (2 << i, lambda size: self._list(size, level)) for i in range(2)},
            **{0xDE + i: (2 << i, lambda size: self._map(size, level)) for i in range(2)},
        }
        if first not in kinds:
            raise ValueError(f"byte {first:#x} begins no value")
        width, read = kinds[first]
        return read(int(self._number(_LENGTHS[width])))

    def _take(self, size: int) -> memoryview:
        if size > len(self._content) - self.at:
            raise ValueError(f"it ends {size - len(self._content) + self.at} bytes too early")
        self.at += size
        return self._content[self.at - size : self.at]

    def _number(self, form: str) -> int | float:
        number: int | float = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return number

    def _bytes(self, size: int) -> memoryview:
        return self._take(size)

    def _text(self, size: int) -> str:
        return bytes(self._take(size)).decode()

    def _list(self, size: int, level: int) -> list[Any]:
        self._check_count(size)
        return [self.value(level + 1) for _ in range(size)]

    def _map(self, size: int, level: int) -> Any:
        self._check_count(2 * size)
        found = {}
        for _ in range(size):
            key = self.value(level + 1)
            if not isinstance(key, str) or key in found:
                raise ValueError(f"a name is {key!r}, or it comes twice")
            found[key] = self.value(level + 1)
        return _joined(found) if _CHUNKED in found else found

    def _check_count(self, values: int) -> None:
        """A value takes at least one byte."""
        if values > len(self._content) - self.at:
            raise ValueError(f"it states {values} values and has {len(self._content) - self.at} bytes left")

    def _extension(self, size: int, level: int) -> Any:
        kind = int(self._number(">b"))
        if kind not in (_ARRAY, _SCALAR):
            self._take(size)
            return None  # a complex number, of which networks have none
        inside = _Reader(self._take(size))
        shape, dtype, data = inside.value(level + 1)
        if isinstance(dtype, memoryview):
            dtype = bytes(dtype).decode()
        if dtype not in _DTYPES or not all(isinstance(side, int) and side >= 0 for side in shape):
            raise ValueError(f"an array has dtype {dtype} and shape {shape}")
        numbers = math.prod(shape)
        if numbers * _DTYPES[dtype].itemsize != len(data):
            raise ValueError(f"an array of shape {shape} and dtype {dtype} has {len(data)} bytes")
        flat = torch.frombuffer(bytearray(data), dtype=_DTYPES[dtype]) if numbers else torch.empty(0, dtype=_DTYPES[dtype])
        return flat.view(shape)


def _joined(chunked: dict[str, Any]) -> Tensor:
    """Return the array whose parts a map holds, as `{"0": part, "1": part, ...}`."""
    shape, chunks = chunked.get("shape"), chunked.get("chunks")
    if not isinstance(shape, dict) or not isinstance(chunks, dict):
        raise ValueError("an array in parts has no shape, or no parts")
    parts, sides = (_numbered(values) for values in (chunks, shape))
    if not all(isinstance(part, Tensor) for part in parts) or not all(isinstance(side, int) for side in sides):
        raise ValueError("an array in parts lacks one of them")
    return torch.cat([part.flatten() for part in parts]).view(sides)


def _numbered(values: dict[str, Any]) -> list[Any]:
    """Return the values of the names "0", "1", ...; None where one is missing."""
    return [values.get(str(number)) for number in range(len(values))]
