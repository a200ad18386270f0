"""Colours, transparency and orientation as the files mean them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from microdit.data.colours import LARGEST_PROFILE, without_metadata
from microdit.data.decode import Rejected, decode
from tests.data.test_decode_images import file_of, half_red, is_red

LINEAR = [value**2.0 for value in np.linspace(0, 1, 256)]


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(primaries: list[tuple[float, float, float]] | None, gamma: float) -> bytes:
    """Return an ICC profile of RGB with these primaries, in XYZ of D50, or of grey, with a power as its curve."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    xyz = lambda values: b"XYZ " + bytes(4) + b"".join(map(fixed, values))  # noqa: E731
    white = xyz((0.9642, 1.0, 0.8249))
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {b"desc": text, b"wtpt": white}
    if primaries:
        tags |= dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, primaries), strict=True)) | {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    else:
        tags |= {b"kTRC": curve}
    body, table, offset = b"", struct.pack(">I", len(tags)), 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"test", 0x02100000, b"mntr", b"RGB " if primaries else b"GRAY", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642) + fixed(1.0) + fixed(0.8249) + bytes(48)
    return head + table + body


P3 = profile([(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)], 2.2)
GREY_LINEAR = profile(None, 1.0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def colour(content: bytes, at: tuple[int, int] = (3, 3)) -> tuple[int, int, int]:
    return decode(content).getpixel(at)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_a_colour_of_another_space_becomes_that_of_srgb(kind):
    """A red of (0.8, 0.25, 0.25) in Display P3 is a stronger red in sRGB."""
    image = Image.new("RGB", (16, 16), (204, 64, 64))
    options = {"quality": 100} if kind in ("JPEG", "WEBP", "AVIF") else {}
    plain, wide = (colour(file_of(image, kind, **options, **more)) for more in ({}, {"icc_profile": P3}))
    assert np.abs(np.subtract(plain, (204, 64, 64))).max() <= 4
    assert wide[0] - plain[0] > 10
    assert wide[1] < plain[1]


def test_transparent_and_palette_pictures_follow_their_profile_too():
    wide = colour(file_of(Image.new("RGB", (8, 8), (204, 64, 64)), icc_profile=P3))
    alpha = Image.new("RGBA", (8, 8), (204, 64, 64, 255))
    alpha.putpixel((0, 0), (0, 0, 0, 0))
    assert np.abs(np.subtract(colour(file_of(alpha, icc_profile=P3)), wide)).max() <= 1
    assert colour(file_of(alpha, icc_profile=P3), (0, 0)) == (255, 255, 255)
    palette = Image.new("RGB", (8, 8), (204, 64, 64)).quantize(4)
    assert np.abs(np.subtract(colour(file_of(palette, icc_profile=P3)), wide)).max() <= 1


def test_grey_and_cmyk_follow_theirs():
    assert colour(file_of(Image.new("L", (8, 8), 55), icc_profile=GREY_LINEAR))[0] == pytest.approx(128, abs=3)  # 0.216 is half of sRGB
    sixteen = Image.fromarray(np.full((8, 8), 55 * 257, np.uint16))
    assert colour(file_of(sixteen, icc_profile=GREY_LINEAR))[0] == pytest.approx(128, abs=3)
    assert colour(file_of(Image.new("LA", (8, 8), (55, 255)), icc_profile=GREY_LINEAR))[0] == pytest.approx(128, abs=3)


def test_srgb_by_name_changes_no_pixel():
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    assert decode(file_of(image, icc_profile=SRGB)).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "broken", [b"x", b"not a profile" * 50, P3[:100], SRGB[:200] + bytes(3000), GREY_LINEAR, bytes(LARGEST_PROFILE + 1)]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_broken_profile_is_no_damage(kind, broken):
    if kind == "JPEG":
        broken = broken[:200_000]
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    assert is_red(colour(file_of(half_red(), kind, icc_profile=broken, **options)))


def test_a_profile_that_expands_beyond_bounds_is_not_expanded():
    chunk = b"iCCP" + b"bomb\0\0" + zlib.compress(bytes(500_000_000), 9)
    content = file_of(half_red())
    content = content[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]
    assert len(without_metadata(content).profile) == LARGEST_PROFILE + 1
    assert is_red(colour(content))


def add_text(info: PngInfo, kind: str, text: str) -> None:
    if kind == "iTXt":
        info.add_itxt("workflow", text, zip=True)
    else:
        info.add_text("workflow", text, zip=kind == "zTXt")


@pytest.mark.parametrize(("kind", "size"), [("zTXt", 2), ("iTXt", 2), ("tEXt", 70)])
@pytest.mark.parametrize("after", [False, True])
def test_a_long_text_in_a_png_is_no_damage(kind, size, after):
    info = PngInfo()
    add_text(info, kind, "a" * size * 1_000_000)
    content = file_of(Image.new("RGB", (8, 8), "red"), pnginfo=info)
    if after:  # behind the pixels
        end, place = content.index(b"IEND") - 4, content.index(kind.encode()) - 4
        stop = place + 12 + int.from_bytes(content[place : place + 4], "big")
        content = content[:place] + content[stop:end] + content[place:stop] + content[end:]
    assert colour(content) == (255, 0, 0)


def test_text_that_turns_a_picture_is_read():
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    assert decode(file_of(half_red(), pnginfo=info)).size == (20, 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(("orientation", "red_at"), [(3, (37, 10)), (6, (10, 2)), (8, (10, 37))])
def test_every_container_is_turned_upright(kind, orientation, red_at):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(file_of(half_red(), kind, exif=exif))
    assert image.size == ((40, 20) if orientation == 3 else (20, 40))
    assert is_red(image.getpixel(red_at))


def png(depth: int, kind: int, row: bytes, transparent: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, depth, kind, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"tRNS", transparent) + chunk(b"IDAT", zlib.compress((b"\0" + row) * 16)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("depth", "kind", "row", "transparent", "other"),
    [
        (16, 0, b"\x80\x80" * 16, b"\x80\x80", b"\x80\x81"),
        (16, 2, b"\xff\xff\x80\x80\x00\xc0" * 16, b"\xff\xff\x80\x80\x00\xc0", b"\xff\xff\x80\x80\xff\xc0"),
        (8, 0, b"\x33" * 16, b"\x00\x33", b"\x00\x34"),
        (8, 2, b"\x33\x44\x55" * 16, b"\x00\x33\x00\x44\x00\x55", b"\x00\x33\x00\x44\x00\x56"),
        (4, 0, b"\x55" * 8, b"\x00\x05", b"\x00\x06"),
        (2, 0, b"\x55" * 4, b"\x00\x01", b"\x00\x02"),
        (1, 0, b"\x00" * 2, b"\x00\x00", b"\x00\x01"),
    ],
)
def test_a_colour_marked_transparent_is_white_at_any_depth(depth, kind, row, transparent, other):
    assert colour(png(depth, kind, row, transparent)) == (255, 255, 255)
    assert colour(png(depth, kind, row, other)) != (255, 255, 255)


def test_integers_of_unknown_range_are_refused_as_floats_are():
    with pytest.raises(Rejected, match="pixels are 32-bit numbers of unknown range"):
        decode(file_of(Image.fromarray(np.full((16, 16), 200, "i4")), "TIFF"))


def test_deep_pictures_of_a_known_range_are_read():
    pgm = b"P5 4 4 65535\n" + b"\x80\x00" * 16
    assert colour(pgm)[0] == 128


def test_what_names_a_wrong_kind_is_read_by_its_content():
    for kind in ("AVIF", "JPEG2000", "TGA", "QOI"):
        assert is_red(colour(file_of(half_red(size=(64, 64)), kind)))


def test_heic_is_read_with_its_plugin():
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(half_red(size=(64, 64))).save(buffer, quality=95)
    assert is_red(colour(buffer.getvalue(), (5, 5)))
