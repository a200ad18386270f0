"""How latents and caption vectors lie on the disk, as bytes.

`fp16` is two bytes a number. `int8` is one, with a float16 scale for each token of a caption and for each channel of the latents: the
largest number of a token becomes 127. `ids` keeps only a caption's token numbers, to be embedded while training. `full` is fp16 with the
padding vectors of the whole context, as the authors' models were trained.

Shape legend: C channels, H W height and width, L caption tokens, E channels of a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LatentPacking = Literal["fp16", "int8"]
CaptionPacking = Literal["fp16", "int8", "ids", "full"]
Floats = NDArray[np.float32]

SCALE_BYTES = 2  # a float16 before the numbers of an int8 row


def pack_latents(latents_CHW: Floats, form: LatentPacking) -> bytes:
    return _pack(latents_CHW.reshape(len(latents_CHW), -1), form)


def pack_text(text_LE: Floats, form: CaptionPacking) -> bytes:
    """Of all forms but `ids`."""
    return _pack(text_LE, "int8" if form == "int8" else "fp16")


@dataclass(frozen=True)
class StoredRows:
    """Rows of numbers as they are stored, (B, R, V): int8 with a float16 scale for each row, (B, R, 1), or floats without. Zeros behind the
    rows of each."""

    numbers_BRV: Tensor
    scale_BR1: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> "StoredRows":
        return StoredRows(change(self.numbers_BRV), None if self.scale_BR1 is None else change(self.scale_BR1))

    def expand(self) -> Tensor:
        """(B, R, V) float32, on the device where they are."""
        numbers_BRV = self.numbers_BRV.float()
        return numbers_BRV if self.scale_BR1 is None else numbers_BRV * self.scale_BR1.float()


def stack(blobs: list[memoryview], values: int, form: LatentPacking | CaptionPacking, multiple: int = 1) -> tuple[StoredRows, Tensor]:
    """Put packed arrays of rows of `values` numbers together, of any form but `ids`, with room for a `multiple` of rows.

    Also returns how many rows each has, (B,). The rows are a caption's tokens, or the channels of latents.
    """
    dtype, row_bytes = (np.int8, values + SCALE_BYTES) if form == "int8" else (np.float16, 2 * values)
    rows_B = [len(blob) // row_bytes for blob in blobs]
    room = -(-max(rows_B) // multiple) * multiple
    stored_BRV = np.zeros((len(blobs), room, values), dtype)
    scale_BR1 = np.zeros((len(blobs), room, 1), np.float16) if form == "int8" else None
    for index, (blob, rows) in enumerate(zip(blobs, rows_B, strict=True)):
        start = 0
        if scale_BR1 is not None:
            scale_BR1[index, :rows, 0] = np.frombuffer(blob, np.float16, rows)
            start = SCALE_BYTES * rows
        stored_BRV[index, :rows] = np.frombuffer(blob, dtype, offset=start).reshape(rows, values)
    scale = None if scale_BR1 is None else torch.from_numpy(scale_BR1)
    return StoredRows(torch.from_numpy(stored_BRV), scale), torch.tensor(rows_B)


def unpack(blobs: list[memoryview], values: int, form: LatentPacking | CaptionPacking) -> tuple[Tensor, Tensor]:
    """`stack`, expanded: (B, R, values) float32, and how many rows each has, (B,)."""
    stored, rows_B = stack(blobs, values, form)
    return stored.expand(), rows_B


def pack_ids(ids: list[int]) -> bytes:
    return np.asarray(ids, np.uint32).tobytes()


def unpack_ids(blob: memoryview) -> list[int]:
    ids: list[int] = np.frombuffer(blob, np.uint32).tolist()
    return ids


def bytes_of_row(values: int, form: LatentPacking | CaptionPacking) -> int:
    """Bytes of one row of `values` numbers: a caption's token, or a channel of the latents."""
    return {"fp16": 2 * values, "full": 2 * values, "int8": values + SCALE_BYTES, "ids": 4}[form]


def _pack(rows_RV: Floats, form: Literal["fp16", "int8"]) -> bytes:
    if form == "fp16":
        return rows_RV.astype(np.float16).tobytes()
    scale_R1 = (np.abs(rows_RV).max(axis=1, keepdims=True) / 127).astype(np.float16)
    divisor_R1 = np.where(scale_R1 > 0, scale_R1, 1).astype(np.float32)  # a row of zeros stays one
    steps_RV = np.clip(np.rint(rows_RV / divisor_R1), -127, 127).astype(np.int8)
    return scale_R1.tobytes() + steps_RV.tobytes()
