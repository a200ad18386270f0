"""How latents and caption vectors lie on the disk, as bytes.

`fp16` is two bytes a number. `int8` is one, with a float16 scale for each token of a caption and for each channel of the latents: the
largest number of a token becomes 127. `ids` keeps only a caption's token numbers, to be embedded while training. `full` is fp16 with the
padding vectors of the whole context, as the authors' models were trained.

Shape legend: C channels, H W height and width, L caption tokens, E channels of a token.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

LatentForm = Literal["fp16", "int8"]
CaptionForm = Literal["fp16", "int8", "ids", "full"]
Floats = NDArray[np.float32]


def pack_latents(latents_CHW: Floats, form: LatentForm) -> bytes:
    return _pack(latents_CHW.reshape(len(latents_CHW), -1), form)


def unpack_latents(blob: bytes, shape: tuple[int, int, int], form: LatentForm) -> Floats:
    """(C, H, W) float32."""
    return _unpack(blob, shape[1] * shape[2], form).reshape(shape)


def pack_text(text_LE: Floats, form: CaptionForm) -> bytes:
    """Of all forms but `ids`."""
    return _pack(text_LE, "int8" if form == "int8" else "fp16")


def unpack_text(blob: bytes, channels: int, form: CaptionForm) -> Floats:
    """(L, E) float32."""
    return _unpack(blob, channels, "int8" if form == "int8" else "fp16")


def pack_ids(ids: list[int]) -> bytes:
    return np.asarray(ids, np.uint32).tobytes()


def unpack_ids(blob: bytes) -> list[int]:
    ids: list[int] = np.frombuffer(blob, np.uint32).tolist()
    return ids


def bytes_of_row(values: int, form: LatentForm | CaptionForm) -> int:
    """Bytes of one row of `values` numbers: a caption's token, or a channel of the latents."""
    return {"fp16": 2 * values, "full": 2 * values, "int8": values + 2, "ids": 4}[form]


def _pack(rows_RV: Floats, form: Literal["fp16", "int8"]) -> bytes:
    if form == "fp16":
        return rows_RV.astype(np.float16).tobytes()
    scale_R1 = (np.abs(rows_RV).max(axis=1, keepdims=True) / 127).astype(np.float16)
    divisor_R1 = np.where(scale_R1 > 0, scale_R1, 1).astype(np.float32)  # a row of zeros stays one
    steps_RV = np.clip(np.rint(rows_RV / divisor_R1), -127, 127).astype(np.int8)
    return scale_R1.tobytes() + steps_RV.tobytes()


def _unpack(blob: bytes, values: int, form: Literal["fp16", "int8"]) -> Floats:
    if form == "fp16":
        return np.frombuffer(blob, np.float16).reshape(-1, values).astype(np.float32)
    rows = len(blob) // (values + 2)
    scale_R1 = np.frombuffer(blob, np.float16, rows).astype(np.float32)[:, None]
    return np.frombuffer(blob, np.int8, offset=2 * rows).reshape(rows, values) * scale_R1
