"""Pictures to tensors and back."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """Resize so that the short side is `size` (antialiased), cut the centre square: (3, size, size) in [-1, 1]."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    square = np.asarray(image.convert("RGB").crop((left, top, left + size, top + size)))
    return torch.from_numpy(square.copy()).permute(2, 0, 1).float() / 127.5 - 1


def to_image(pixels_CHW: Tensor) -> Image.Image:
    """(3, height, width) in [-1, 1], values outside clipped -> an 8-bit picture."""
    bytes_CHW = ((pixels_CHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(bytes_CHW.permute(1, 2, 0).cpu().numpy())
