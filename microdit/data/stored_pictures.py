"""Pictures kept in shards as JPEG or WebP, and decoded again while training: a tenth of the bytes of exact pixels, or less.

Only models of pixels store pictures; their latents are the pixels. JPEG keeps the colours at full resolution (4:4:4), because at a half
they would blur edges that the network learns to draw; WebP always halves them. Bytes in a shard may come from anywhere: only the one format
that the manifest names is tried, and nothing is decoded that has not exactly the expected size.
"""

import io
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PicturePacking = Literal["jpeg", "webp"]
PICTURES: tuple[PicturePacking, ...] = get_args(PicturePacking)
QUALITY = 90  # of 100, by default

_FORMATS = {"jpeg": "JPEG", "webp": "WEBP"}
_OPTIONS = {"jpeg": {"subsampling": 0}, "webp": {"method": 4}}
_HEADERS = 4096  # bytes that even the smallest picture may take


class DamagedPicture(Exception):  # noqa: N818
    """Raised for bytes that are not a picture of the expected format and size."""


def pack_picture(pixels_CHW: NDArray[np.float32], packing: PicturePacking, quality: int = QUALITY) -> bytes:
    """Compress pixels in [-1, 1], which are rounded to 8 bits first. `quality` is between 1 and 100."""
    bytes_HWC = np.rint((np.clip(pixels_CHW, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(bytes_HWC)).save(file, _FORMATS[packing], quality=quality, **_OPTIONS[packing])
    return file.getvalue()


def unpack_picture(blob: memoryview, height: int, width: int, packing: PicturePacking) -> memoryview:
    """Return the pixels of a stored picture as bytes, (3, height, width). Raises DamagedPicture."""
    if len(blob) > 2 * 3 * height * width + _HEADERS:  # no picture of that size is so large; it could take any time to decode
        raise DamagedPicture(f"{len(blob):,} bytes for {width} x {height} pixels")
    try:
        image = Image.open(io.BytesIO(blob), formats=[_FORMATS[packing]])
        if image.size != (width, height) or image.mode != "RGB":
            raise DamagedPicture(f"{image.width} x {image.height} pixels in {image.mode}, not {width} x {height} in RGB")
        pixels_HWC = np.asarray(image)
    except DamagedPicture:
        raise
    except Exception as error:  # Pillow's decoders raise exceptions of many types
        raise DamagedPicture(f"no whole {packing.upper()} picture") from error.with_traceback(None)
    return memoryview(pixels_HWC.transpose(2, 0, 1).tobytes())
