"""A file's bytes to an RGB picture of a wanted size, and every way in which that can fail, in words. Knows no torch: workers import it.

Alpha is laid on white, EXIF rotations are applied, 16 bits become 8, CMYK becomes RGB, of an animation the first frame is taken.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

# Told by content, whatever a file is called. Pillow knows more: EPS starts a program, and others are no pictures of pixels, or seldom seen.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 100_000_000  # 10,000 x 10,000; beyond lie decompression bombs
BAND_PIXELS = 1_000_000  # that are laid on white at a time
EXIF_ORIENTATION = 0x0112
ON_ITS_SIDE = (5, 6, 7, 8)  # orientations in which height and width change places
DRAFT_MARGIN = 2  # a JPEG is decoded smaller as long as it stays this many times as large as what is wanted


class Rejected(Exception):  # noqa: N818
    """This picture cannot be used. `reason` is the same sentence for all pictures with the same trouble, so that it can be counted."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class PictureFile:
    """A file's picture, before it is decoded. `height` and `width` are those of the whole picture, upright. Raises Rejected."""

    def __init__(self, content: bytes):
        with _troubles_named():
            self._image = _open(content)
            self._orientation = self._image.getexif().get(EXIF_ORIENTATION, 1)
        self._on_its_side = self._orientation in ON_ITS_SIDE
        self.width, self.height = self._image.size[::-1] if self._on_its_side else self._image.size

    def decode(self, height: int | None = None, width: int | None = None) -> Image.Image:
        """The picture, RGB, 8 bits, upright. Raises Rejected.

        For what will be shrunk to `height` x `width`, a JPEG is decoded to a half, a quarter or an eighth of its size by the decoder's own
        scaling, which takes a fraction of the time. At least DRAFT_MARGIN times the wanted size is left to the antialiased resizing: the
        result is within 4 of 255 of what the whole picture would give.
        """
        with _troubles_named():
            if height and width:
                self._draft(DRAFT_MARGIN * height, DRAFT_MARGIN * width)
            self._image.load()
            return _to_rgb(ImageOps.exif_transpose(self._image) if self._orientation != 1 else self._image)

    def _draft(self, height: int, width: int) -> None:
        least = (height, width) if self._on_its_side else (width, height)
        if min(self._image.width // least[0], self._image.height // least[1]) >= 2:
            self._image.draft(None, least)


def decode(content: bytes) -> Image.Image:
    """The file's picture, RGB, 8 bits, upright. Raises Rejected."""
    return PictureFile(content).decode()


def fit(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Resize (bicubic, antialiased) until the picture just covers height x width, cut the middle: (height, width, 3)."""
    scale = max(width / image.width, height / image.height)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if covering != image.size:
        image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


@contextmanager
def _troubles_named() -> Iterator[None]:
    """Whatever Pillow raises becomes a Rejected, without the traceback: its frames hold the file, in a cycle from Python 3.12 on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, and sizes that Pillow finds suspicious: `_open` knows its own bound
            yield
    except Rejected:
        raise
    except UnidentifiedImageError as error:
        raise Rejected(f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture") from error.with_traceback(None)
    except Image.DecompressionBombError as error:  # twice as large
        raise Rejected(f"more than {MAX_PIXELS:,} pixels") from error.with_traceback(None)
    except Exception as error:  # Pillow's decoders raise whatever their format's parser stumbles over
        raise Rejected("picture is damaged") from error.with_traceback(None)


def _open(content: bytes) -> Image.Image:
    if not content:
        raise Rejected("file is empty")
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Rejected(f"more than {MAX_PIXELS:,} pixels")
    if image.format not in ("JPEG", "MPO"):
        image.load()  # others say only then how large they are, and which way up
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, in one of Pillow's several ways
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Rejected("pixels are floating-point numbers of unknown range")
    return _on_white(image) if image.has_transparency_data else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Of a picture that may be transparent, in bands of some rows: whole, it would be in memory four times."""
    rgb = Image.new("RGB", image.size)
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        rgb.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB"), (0, top))
    return rgb
