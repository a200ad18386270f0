"""Patches: cutting latents into tokens, putting them together again, and their positional embedding.

Shape legend: B batch, C channels, H W height and width, T tokens (T = H/p * W/p, row by row), P values in a patch, D dim.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def patchify(latents_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cut latents into patches: (B, C, H, W) -> (B, T, P) with P = p * p * C, channels varying fastest.

    Height and width need not be equal. Raises ValueError if they are not multiples of `patch_size`.
    """
    B, C, H, W = latents_BCHW.shape
    if H % patch_size or W % patch_size:
        raise ValueError(f"latents of {H} x {W} cannot be cut into patches of {patch_size} x {patch_size}")
    h, w = H // patch_size, W // patch_size
    split = latents_BCHW.reshape(B, C, h, patch_size, w, patch_size)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(B, h * w, patch_size * patch_size * C)


def unpatchify(patches_BTP: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Put patches together: (B, T, P) -> (B, C, height, width), the inverse of `patchify`. Raises ValueError if T does not fit."""
    B, T, P = patches_BTP.shape
    h, w = height // patch_size, width // patch_size
    if T != h * w:
        raise ValueError(f"{T} patches do not fill {height} x {width} latents at patch size {patch_size}: needs {h * w}")
    C = P // (patch_size * patch_size)
    split = patches_BTP.reshape(B, h, w, patch_size, patch_size, C)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(B, C, height, width)


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
    frequencies = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))
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
