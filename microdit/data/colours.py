"""Convert images to 8-bit sRGB as they were meant: by their colour profiles, on white where transparent, at any depth.

PNG files are read chunk by chunk first. Pillow refuses files whose text or colour profile is long, and it compares the colour that a file
marks as transparent with pixels of another depth.
"""

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

LARGEST_PROFILE = 4_000_000  # bytes; profiles of printing presses have about 2 MB, others a few kilobytes
BAND_PIXELS = 1_000_000  # composited on white at a time
SAME = 2  # a profile that moves no colour by more than this many of 255 levels is sRGB under another name

_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTED = b"XML:com.adobe.xmp\0\0"  # the text that may hold an orientation, uncompressed
_LONGEST_XMP = 1_000_000  # bytes


@dataclass(frozen=True)
class Stored:
    """An image file without the metadata on which Pillow could fail, the embedded colour profile, and the bits of a channel if a PNG."""

    content: bytes
    profile: bytes | None = None
    depth: int = 8


def without_metadata(content: bytes) -> Stored:
    """Take text and colour profile out of a PNG file. Other files are returned as they are."""
    if not content.startswith(_PNG):
        return Stored(content)
    profile, kept, start = None, [], 0
    for begin, end, kind in _chunks(content):
        if kind == b"iCCP":
            profile = _inflated(content[begin + 8 : end - 4].partition(b"\0")[2][1:])
        is_xmp = kind == b"iTXt" and content.startswith(_ORIENTED, begin + 8) and end - begin < _LONGEST_XMP
        if kind in (b"iCCP", b"tEXt", b"zTXt", b"iTXt") and not is_xmp:
            kept.append(content[start:begin])
            start = end
    return Stored(b"".join([*kept, content[start:]]) if kept else content, profile, content[24] if len(content) > 24 else 8)


def to_srgb(image: Image.Image, stored: Stored) -> Image.Image:
    """Convert a decoded image to RGB on white. A profile that is broken, or does not fit the pixels, is ignored."""
    profile = stored.profile or image.info.get("icc_profile")
    profile = profile if isinstance(profile, bytes) and 0 < len(profile) <= LARGEST_PROFILE else None
    if image.mode.startswith("I"):
        return _from_16_bits(image, profile)
    _scale_transparency(image, stored.depth)
    return _on_white(image, profile) if image.has_transparency_data else _converted(image, profile)


def _chunks(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield where each chunk of a PNG begins and ends, and its type, as far as they are whole."""
    begin = len(_PNG)
    while (end := begin + 12 + int.from_bytes(content[begin : begin + 4], "big")) <= len(content):
        yield begin, end, content[begin + 4 : begin + 8]
        begin = end


def _inflated(content: bytes) -> bytes | None:
    try:
        return zlib.decompressobj().decompress(content, LARGEST_PROFILE + 1)  # one byte too long is recognised as too long
    except zlib.error:
        return None


def _scale_transparency(image: Image.Image, depth: int) -> None:
    """Scale the transparent colour of a PNG, which is stored as deep as the file's pixels, to the 8 bits of the decoded ones."""
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and depth == 16 and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode == "L" and depth < 8 and isinstance(transparent, int):
        image.info["transparency"] = transparent * 255 // (2**depth - 1)


def _from_16_bits(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert 16-bit greyscale, for which Pillow has several modes."""
    values_HW = np.asarray(image).clip(0, 65535)
    rgb = _converted(Image.fromarray((values_HW / 257).round().astype(np.uint8)), profile)
    if isinstance(transparent := image.info.get("transparency"), int):
        rgb.paste("white", mask=Image.fromarray((values_HW == transparent).astype(np.uint8) * 255))
    return rgb


def _on_white(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Composite an image on white, in bands of rows: processed whole, it would be in memory four times."""
    rgb = Image.new("RGB", image.size)
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgba = band.convert("RGBA")
        if profile:
            colours = _converted(band.getchannel("L") if band.mode in ("L", "LA") else rgba.convert("RGB"), profile)
            colours.putalpha(rgba.getchannel("A"))
            rgba = colours
        rgb.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), rgba).convert("RGB"), (0, top))
    return rgb


def _converted(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode == "LAB":
        return _applied(image, ImageCms.buildTransform(ImageCms.createProfile("LAB"), _SRGB, "LAB", "RGB"))
    if profile and image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    transform = _transform(profile, image.mode) if profile else None
    return _applied(image, transform) if transform else image.convert("RGB")


def _applied(image: Image.Image, transform: Any) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # None only where it works in place
    return converted


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> Any:
    """Return the transform of such pixels to sRGB; None if there is nothing to change, or if the profile cannot be used."""
    try:
        transform = ImageCms.buildTransform(ImageCms.ImageCmsProfile(io.BytesIO(profile)), _SRGB, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.arange(0, 256, 51, dtype=np.uint8)
    probe = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    image = Image.fromarray(probe)
    moved = np.abs(np.asarray(_applied(image, transform)).astype(int) - np.asarray(image.convert("RGB")))
    return transform if moved.max() > SAME else None


_SRGB = ImageCms.createProfile("sRGB")
