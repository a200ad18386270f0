"""Pack latents, caption vectors and features of images into bytes, and unpack them.

- `fp16` stores two bytes per number.
- `int8` stores one byte per number, and a float16 scale for each token of a caption and each channel of the latents, whose largest absolute
  value becomes 127.
- `ids` stores only the token ids of a caption, which are embedded during training.
- `full` is `fp16` for the whole context of the text encoder, padding included, as the authors of 2407.15811 train.
- `jpeg` and `webp` are pictures (`stored_pictures.py`), for models of pixels.

Features are always `fp16`, one row for each cell of their grid.

Shape legend: C channels, H W height and width, L caption tokens, E channels of a token or a feature, Y X rows and columns of features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from microdit.data.stored_pictures import PICTURES, QUALITY, pack_picture

NumberPacking = Literal["fp16", "int8"]
LatentPacking = Literal["fp16", "int8", "jpeg", "webp"]
CaptionPacking = Literal["fp16", "int8", "ids", "full"]
Floats = NDArray[np.float32]

SCALE_BYTES = 2  # a float16 before the numbers of an int8 row
_STORED: dict[str, type[np.int8] | type[np.uint8]] = {"int8": np.int8, **dict.fromkeys(PICTURES, np.uint8)}  # others: float16


def pack_latents(latents_CHW: Floats, packing: LatentPacking, quality: int = QUALITY) -> bytes:
    """Pack latents, one row per channel, or pixels as a picture of this `quality`."""
    if packing == "jpeg" or packing == "webp":
        return pack_picture(latents_CHW, packing, quality)
    return _pack(latents_CHW.reshape(len(latents_CHW), -1), packing)


def pack_text(text_LE: Floats, packing: CaptionPacking) -> bytes:
    """Pack caption vectors, one row per token. `packing` must not be `ids`."""
    return _pack(text_LE, "int8" if packing == "int8" else "fp16")


def pack_features(features_EYX: Floats) -> bytes:
    """Pack the features of an image, one row per cell of the grid."""
    return _pack(features_EYX.reshape(len(features_EYX), -1).T, "fp16")


@dataclass(frozen=True)
class StoredRows:
    """A batch of rows of numbers as they are stored, (B, R, V): int8 with a float16 scale for each row, (B, R, 1), or floats without.
    Bytes without a scale are 8-bit pixels.

    Samples with fewer than R rows are padded with zeros.
    """

    numbers_BRV: Tensor
    scale_BR1: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> "StoredRows":
        """Apply a function to both tensors."""
        return StoredRows(change(self.numbers_BRV), None if self.scale_BR1 is None else change(self.scale_BR1))

    def expand(self) -> Tensor:
        """Return the numbers as float32, (B, R, V), on the device of the stored ones."""
        numbers_BRV = self.numbers_BRV.float()
        if self.numbers_BRV.dtype == torch.uint8:
            return numbers_BRV / 127.5 - 1  # as in pixels.py
        return numbers_BRV if self.scale_BR1 is None else numbers_BRV * self.scale_BR1.float()


def stack(blobs: list[memoryview], values: int, packing: LatentPacking | CaptionPacking, multiple: int = 1) -> tuple[StoredRows, Tensor]:
    """Combine packed samples, whose rows hold `values` numbers each, into a batch. `packing` must not be `ids`.

    The number of rows is padded to a multiple of `multiple`. Also returns how many rows each sample has, (B,). Rows are the tokens of a
    caption, or the channels of latents. Pictures must be decoded already, to a byte for each pixel and channel.
    """
    dtype, row_bytes = _STORED.get(packing, np.float16), bytes_of_row(values, packing)
    rows_B = [len(blob) // row_bytes for blob in blobs]
    room = -(-max(rows_B) // multiple) * multiple
    stored_BRV = np.zeros((len(blobs), room, values), dtype)
    scale_BR1 = np.zeros((len(blobs), room, 1), np.float16) if packing == "int8" else None
    for index, (blob, rows) in enumerate(zip(blobs, rows_B, strict=True)):
        start = 0
        if scale_BR1 is not None:
            scale_BR1[index, :rows, 0] = np.frombuffer(blob, np.float16, rows)
            start = SCALE_BYTES * rows
        stored_BRV[index, :rows] = np.frombuffer(blob, dtype, offset=start).reshape(rows, values)
    scale = None if scale_BR1 is None else torch.from_numpy(scale_BR1)
    return StoredRows(torch.from_numpy(stored_BRV), scale), torch.tensor(rows_B)


def unpack(blobs: list[memoryview], values: int, packing: LatentPacking | CaptionPacking) -> tuple[Tensor, Tensor]:
    """Return packed samples as float32, (B, R, values), and how many rows each has, (B,)."""
    stored, rows_B = stack(blobs, values, packing)
    return stored.expand(), rows_B


def pack_ids(ids: list[int]) -> bytes:
    """Pack the token ids of a caption."""
    return np.asarray(ids, np.uint32).tobytes()


def unpack_ids(blob: memoryview) -> list[int]:
    """Return the token ids of a caption."""
    ids: list[int] = np.frombuffer(blob, np.uint32).tolist()
    return ids


def bytes_of_row(values: int, packing: LatentPacking | CaptionPacking) -> int:
    """Return the size of one row of `values` numbers: a token of a caption, or a channel of the latents (of a picture: decoded)."""
    sizes = {"fp16": 2 * values, "full": 2 * values, "int8": values + SCALE_BYTES, "ids": 4}
    return values if packing in PICTURES else sizes[packing]


def _pack(rows_RV: Floats, packing: NumberPacking) -> bytes:
    if packing == "fp16":
        return rows_RV.astype(np.float16).tobytes()
    scale_R1 = (np.abs(rows_RV).max(axis=1, keepdims=True) / 127).astype(np.float16)
    divisor_R1 = np.where(scale_R1 > 0, scale_R1, 1).astype(np.float32)  # a row of zeros remains zero
    steps_RV = np.clip(np.rint(rows_RV / divisor_R1), -127, 127).astype(np.int8)
    return scale_R1.tobytes() + steps_RV.tobytes()
