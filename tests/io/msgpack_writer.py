"""A small writer of Flax's msgpack, after MessagePack's specification, for tests of the reader."""

import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def packed(value: Any) -> bytes:
    """Return a value in the longest form that there is for its kind, except for small numbers and texts."""
    if value is None or isinstance(value, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return bytes([value]) if 0 <= value < 128 else b"\xd3" + struct.pack(">q", value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode()
        return (bytes([0xA0 + len(text)]) if len(text) < 32 else b"\xdb" + struct.pack(">I", len(text))) + text
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, Tensor):
        content = (
            value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            if value.dim()
            else value[None].view(torch.uint8).numpy().tobytes()
        )
        inside = packed((list(value.shape), str(value.dtype).removeprefix("torch."), content))
        return b"\xc9" + struct.pack(">Ib", len(inside), 1) + inside
    if isinstance(value, Mapping):
        return b"\xdf" + struct.pack(">I", len(value)) + b"".join(packed(key) + packed(item) for key, item in value.items())
    return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(packed, value))


def nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return tensors with dots in their names as nested dictionaries."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = tensor
    return tree
