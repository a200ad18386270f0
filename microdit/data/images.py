"""A file's bytes to an RGB picture of a wanted size, and every way in which that can fail, in words. Knows no torch: workers import it.

Alpha is laid on white, EXIF rotations are applied, 16 bits become 8, CMYK becomes RGB, of an animation the first frame is taken.
"""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # 10,000 x 10,000; beyond lie decompression bombs
EXIF_ORIENTATION = 0x0112


class Rejected(Exception):  # noqa: N818
    """This picture cannot be used. `reason` is the same sentence for all pictures with the same trouble, so that it can be counted."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def decode(content: bytes) -> Image.Image:
    """The file's picture, RGB, 8 bits, upright. Raises Rejected."""
    if not content:
        raise Rejected("file is empty")
    try:
        image = _open(content)
        upright = ImageOps.exif_transpose(image) if image.getexif().get(EXIF_ORIENTATION, 1) != 1 else image
        return _to_rgb(upright)
    except Rejected:
        raise
    except UnidentifiedImageError as error:
        raise Rejected("not a picture that Pillow knows") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Rejected(f"more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # Pillow's decoders raise whatever their format's parser stumbles over
        raise Rejected("picture is damaged") from error


def fit(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Resize (bicubic, antialiased) until the picture just covers height x width, cut the middle: (height, width, 3)."""
    scale = max(width / image.width, height / image.height)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if covering != image.size:
        image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def _open(content: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > MAX_PIXELS:
            raise Rejected(f"more than {MAX_PIXELS:,} pixels")
        image.load()
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, in one of Pillow's several ways
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Rejected("pixels are floating-point numbers of unknown range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
