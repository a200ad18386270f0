"""Conversion between 8-bit images and float tensors in [-1, 1].

This is a module of its own because `decode.py`, which worker processes import, must not load torch.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from microdit.data.decode import fit


def to_tensor(image: Image.Image, height: int, width: int | None = None) -> Tensor:
    """Resize and crop an RGB image to height x width (square without a width): (3, height, width) in [-1, 1]."""
    return normalise(fit(image, height, width or height)[None])[0]


def normalise(pixels_BHWC: NDArray[np.uint8] | Tensor) -> Tensor:
    """Convert bytes (B, H, W, 3) to floats (B, 3, H, W) in [-1, 1], channels last in memory, on the device of the bytes."""
    bytes_BHWC = pixels_BHWC if isinstance(pixels_BHWC, Tensor) else torch.tensor(pixels_BHWC)
    return bytes_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_image(pixels_CHW: Tensor) -> Image.Image:
    """Convert (3, height, width) in [-1, 1], with values outside clipped, to an 8-bit RGB image."""
    bytes_CHW = ((pixels_CHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(bytes_CHW.permute(1, 2, 0).cpu().numpy())
