"""Positions of tokens: fixed sine-cosine tables that are added to tokens, and rotary ones that turn queries and keys.

Shape legend: T tokens (row by row for images), D dim, H head dim, B batch, K kept tokens.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

BASE = 10000


@lru_cache(maxsize=64)
def sincos_positions(rows: int, columns: int, dim: int, scale: float = 1.0) -> Tensor:
    """Return fixed two-dimensional sine-cosine positions, (rows * columns, dim) in float32.

    The first half of `dim` encodes the column, the second the row, each as [sin | cos] over dim/4 frequencies.
    Positions are divided by `scale`: 2 for a model of 256 px that continues at 512 px, so that it meets no positions outside of the range
    that it knows (2407.15811, section 3, "positional interpolation"). Raises ValueError if `dim` is not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"two-dimensional sine-cosine positions need a dim divisible by 4, got {dim}")
    column_R_C, row_R_C = np.meshgrid(np.arange(columns, dtype=np.float32), np.arange(rows, dtype=np.float32))
    frequencies = 1.0 / BASE ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))
    halves = []
    for position in (column_R_C, row_R_C):
        # the authors divide in float32 before the product in float64; so do we, and the tables agree to the last bit
        angle = np.outer((position / np.float32(scale)).reshape(-1), frequencies)
        halves += [np.sin(angle), np.cos(angle)]
    return torch.from_numpy(np.concatenate(halves, axis=1)).float()


@lru_cache(maxsize=64)
def positions_on(device: torch.device, dtype: torch.dtype, rows: int, columns: int, dim: int, scale: float) -> Tensor:
    """Return `sincos_positions` on a device, cached there: a copy in every forward pass would synchronise with the GPU."""
    with torch.inference_mode(False):  # sampling may come first, and training cannot use inference tensors
        return sincos_positions(rows, columns, dim, scale).to(device, dtype)


@dataclass(frozen=True)
class Rotary:
    """The cosine and sine of each token's angles, (1 or B, T, 1, H), for `elementwise.rotated`. The axis of 1 stands for all heads.

    A dataclass and no tuple, because FSDP rounds the tensors in a block's arguments to bfloat16, and would round these too.
    """

    cos: Tensor
    sin: Tensor

    def take(self, ids_BK: Tensor) -> "Rotary":
        """Return the angles of the tokens `ids_BK`."""
        return Rotary(self.cos[0, ids_BK], self.sin[0, ids_BK])


def rotary_of_image(device: torch.device, dtype: torch.dtype, rows: int, columns: int, head_dim: int, scale: float = 1.0) -> Rotary:
    """Return the angles of image tokens: half of each head's channels turn by the row, half by the column (2403.13298, axial).

    Channel pairs i and i + H/2 share an angle: those of the first half of i turn by the row. Positions are divided by `scale`, as in
    `sincos_positions`. Raises ValueError if `head_dim` is not divisible by 4.
    """
    if head_dim % 4:
        raise ValueError(f"two-dimensional rotary positions need heads of a width divisible by 4, got {head_dim}")
    return _rotary(device, dtype, (rows, columns), head_dim, scale)


def rotary_of_text(device: torch.device, dtype: torch.dtype, tokens: int, head_dim: int) -> Rotary:
    """Return the angles of caption tokens 0, 1, 2, ... Raises ValueError if `head_dim` is odd."""
    if head_dim % 2:
        raise ValueError(f"rotary positions need heads of an even width, got {head_dim}")
    return _rotary(device, dtype, (tokens,), head_dim, 1.0)


@lru_cache(maxsize=64)
def _rotary(device: torch.device, dtype: torch.dtype, sides: tuple[int, ...], head_dim: int, scale: float) -> Rotary:
    """Divide the frequencies of a head evenly among the axes of the grid `sides`. Cached on the device, like `positions_on`."""
    channels = head_dim // len(sides)
    frequencies = 1.0 / BASE ** (np.arange(0, channels, 2, dtype=np.float64) / channels)
    axes = [np.outer(position.reshape(-1) / scale, frequencies) for position in np.indices(sides)]
    angles_TH = np.concatenate([*axes, *axes], axis=1)
    with torch.inference_mode(False):
        cos, sin = (torch.from_numpy(table).to(device, dtype)[None, :, None] for table in (np.cos(angles_TH), np.sin(angles_TH)))
    return Rotary(cos, sin)
