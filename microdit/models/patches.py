"""Patches: cutting latents into tokens, and putting them together again.

Shape legend: B batch, C channels, H W height and width, T tokens (T = H/p * W/p, row by row), P values in a patch.
"""

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
