import ast
import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from microdit.data import colours
from microdit.data.decode import FORMATS, MAX_SCANS, ImageFile, Rejected, TargetSizes, decode, fit, prepare
from tests.data.hostile import EPS, png_bomb


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def half_red(mode: str = "RGB", size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Return an image whose left half is red and whose right half is blue."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    return image.convert(mode)


def is_red(pixel: tuple[int, ...]) -> bool:
    return pixel[0] > 200 and max(pixel[1:3]) < 60


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("HEIF", "JXL")])
def test_every_usual_format(kind):
    image = decode(file_of(half_red(), kind))
    assert image.mode == "RGB"
    assert image.size == (40, 20)
    assert is_red(image.getpixel((5, 10)))


def test_alpha_is_laid_on_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    decoded = decode(file_of(image))
    assert decoded.getpixel((4, 4)) == (255, 255, 255)
    assert decoded.getpixel((0, 0)) == (255, 0, 0)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert decode(file_of(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_laid_on_white_in_bands_as_it_is_on_the_whole(mode, monkeypatch):
    monkeypatch.setattr(colours, "BAND_PIXELS", 50)  # two rows of 23 pixels at a time, and a last band of one
    values = np.random.default_rng(0).integers(0, 256, (21, 23, 4), np.uint8)
    image = Image.fromarray(values, "RGBA") if mode == "RGBA" else Image.fromarray(values[..., :2].copy(), "LA")
    if mode == "P":
        image = Image.fromarray(values[..., 0], "L").convert("P")
        image.info["transparency"] = 7
    rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
    expected = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
    found = np.asarray(decode(file_of(image, **({"transparency": 7} if mode == "P" else {}))))
    assert np.abs(found - expected).max() <= 1


def test_cmyk_grey_and_sixteen_bits_become_rgb():
    assert is_red(decode(file_of(half_red("CMYK"), "JPEG", quality=95)).getpixel((5, 10)))
    assert decode(file_of(Image.new("L", (4, 4), 77))).getpixel((0, 0)) == (77, 77, 77)
    sixteen = Image.fromarray(np.full((4, 4), 257 * 77, np.uint16))
    assert decode(file_of(sixteen)).getpixel((0, 0)) == (77, 77, 77)
    assert decode(file_of(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255, 255, 255)


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    assert is_red(decode(file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)))


@pytest.mark.parametrize(("orientation", "red_at"), [(1, (2, 10)), (3, (37, 10)), (6, (10, 2)), (8, (10, 37))])
def test_exif_rotations_are_applied(orientation, red_at):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(file_of(half_red(), "JPEG", exif=exif, quality=95))
    assert image.size == ((40, 20) if orientation in (1, 3) else (20, 40))
    assert is_red(image.getpixel(red_at))


@pytest.mark.parametrize(("orientation", "red_at"), [(1, (10, 40)), (3, (150, 40)), (6, (40, 10)), (8, (40, 150))])
def test_a_jpeg_much_larger_than_wanted_is_decoded_smaller_and_upright(orientation, red_at):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = ImageFile(file_of(half_red(size=(640, 320)), "JPEG", exif=exif, quality=95))
    assert (file.width, file.height) == ((640, 320) if orientation in (1, 3) else (320, 640))
    image = file.decode(40, 40)
    assert image.size == ((160, 80) if orientation in (1, 3) else (80, 160))
    assert is_red(image.getpixel(red_at))


@pytest.mark.parametrize(("side", "decoded"), [(50, 400), (51, 800), (101, 800), (25, 200), (1, 100)])
def test_at_least_twice_the_wanted_size_is_left_to_the_resizing(side, decoded):
    file = ImageFile(file_of(half_red(size=(800, 200)), "JPEG"))
    assert file.decode(side, side).width == decoded


def test_only_jpegs_can_be_decoded_smaller():
    for kind in ("PNG", "WEBP"):
        assert ImageFile(file_of(half_red(size=(400, 400)), kind)).decode(10, 10).size == (400, 400)
    with pytest.raises(Rejected, match="picture is damaged"):
        ImageFile(file_of(Image.effect_noise((999, 999), 50), "JPEG")[:-9000]).decode(10, 10)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "file is empty"),
        (b"<html>404</html>", "no picture of a kind that is read"),
        (file_of(Image.effect_noise((99, 99), 50), "JPEG")[:-900], "picture is damaged"),
        (file_of(Image.effect_noise((99, 99), 50))[:-900], "picture is damaged"),
        (file_of(Image.new("F", (4, 4)), "TIFF"), "pixels are floating-point numbers of unknown range"),
        (png_bomb(), "more than 100,000,000 pixels"),
    ],
)
def test_what_cannot_be_used_has_a_reason(content, reason):
    with pytest.raises(Rejected) as verdict:
        decode(content)
    assert verdict.value.reason == reason


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_damage_gives_a_picture_or_a_reason_and_nothing_else(kind):
    generator = random.Random(kind)
    content = file_of(Image.effect_noise((32, 32), 60).convert("RGB"), kind)
    outcomes = set()
    for _ in range(100):
        changed = bytearray(content)
        for _ in range(generator.randrange(1, 6)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        cut = generator.randrange(len(changed)) if generator.random() < 0.3 else None
        try:
            outcomes.add(decode(bytes(changed[:cut])).mode)
        except Rejected as verdict:
            outcomes.add(verdict.reason)
    assert "RGB" in outcomes or kind == "PNG"  # which carries checksums
    assert outcomes <= {
        "RGB",
        "file is empty",
        "picture is damaged",
        "no picture of a kind that is read",
        "more than 100,000,000 pixels",
        "one side is more than 100 times the other",
    }


def test_an_eps_under_another_name_starts_no_program(tmp_path, monkeypatch):
    """Install a fake Ghostscript that leaves a trace when it is started."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(Rejected, match="no picture of a kind that is read"):
        decode(EPS)
    assert not (tmp_path / "started").exists()
    with pytest.raises(OSError, match=r"."):  # the trap works
        Image.open(io.BytesIO(EPS), formats=["EPS"]).load()
    assert (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", ["ICO", "ICNS", "DDS", "PDF", "IM", "MSP", "SPIDER", "XBM"])
def test_the_content_says_what_is_opened_and_only_the_listed_formats_are(kind):
    assert kind not in FORMATS
    mode = {"MSP": "1", "XBM": "1", "SPIDER": "F"}.get(kind, "RGB")
    with pytest.raises(Rejected, match="no picture of a kind that is read"):
        decode(file_of(half_red(size=(64, 64)).convert(mode), kind))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"HEIC picture, which needs pip install 'microdit\[heif\]'"),
        (b"\xff\x0a\x00\x10", "JPEG XL picture, which needs pip install pillow-jxl-plugin"),
    ],
)
def test_pictures_that_need_a_plugin_are_named(content, reason):
    if "HEIF" in FORMATS or "JXL" in FORMATS:
        reason = f"{reason}|picture is damaged"
    with pytest.raises(Rejected, match=reason):
        decode(content)


def test_every_picture_is_opened_with_a_list_of_formats():
    """Check all of the package: without a list of formats, Pillow accepts any format that the content announces, even EPS."""
    root = Path(__file__).parents[2]
    without, found = [], 0
    for path in (path for room in ("microdit", "benchmarks", "examples") for path in (root / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
                without.append(f"{path.name}: imports from PIL.Image, where this test sees no 'Image.open'")
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-2:] == ["Image", "open"]:
                found += 1
                formats = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "formats"]
                without += [] if formats in (["FORMATS"], ["['PNG']"], ["[_FORMATS[packing]]"]) else [f"{path.name}:{node.lineno}"]
    assert without == []
    assert found >= 7


@given(width=st.integers(1, 60), height=st.integers(1, 60), to=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_any_picture_fits_any_shape(width, height, to):
    pixels = fit(Image.new("RGB", (width, height), (255, 0, 127)), *to)
    assert pixels.shape == (*to, 3)
    assert (pixels == (255, 0, 127)).all()


def test_the_centre_is_kept():
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    assert fit(image, 10, 10).min() == 255


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(fit(Image.fromarray(stripes), 16, 16).astype(int) - 127.5).max() < 30  # grey, not moire


def test_the_largest_picture_is_the_one_that_the_sentence_names():
    assert ImageFile(file_of(Image.new("1", (10_000, 10_000)))).height == 10_000
    for size in ((10_000, 10_001), (30_000, 30_000)):
        with pytest.raises(Rejected, match="more than 100,000,000 pixels"):
            ImageFile(file_of(Image.new("1", size)))


@pytest.mark.parametrize("size", [(3, 301), (301, 3), (3, 20_000_000), (100_000_000, 1)])
def test_a_picture_too_thin_to_be_resized_is_rejected_and_hides_no_other(size):
    thin, good = file_of(Image.new("1", size)), file_of(half_red())
    rejected, kept = prepare(TargetSizes.of((8,), 1, False, 1), [thin, good])
    assert rejected == "one side is more than 100 times the other"
    assert not isinstance(kept, str)
    with pytest.raises(Rejected, match="one side is more than 100 times the other"):
        decode(thin)


def test_a_long_picture_that_can_be_resized_is_kept():
    assert not isinstance(prepare(TargetSizes.of((8,), 1, False, 1), [file_of(Image.new("L", (3, 300)))])[0], str)


@pytest.mark.parametrize(("error", "reason"), [(MemoryError, "more memory than there is"), (OverflowError, "picture is damaged")])
def test_a_picture_that_cannot_be_resized_is_rejected(monkeypatch, error, reason):
    def fails(*_: object, **__: object) -> Image.Image:
        raise error

    monkeypatch.setattr(Image.Image, "resize", fails)
    (outcome,) = prepare(TargetSizes.of((8,), 1, False, 1), [file_of(half_red())])
    assert isinstance(outcome, str)
    assert reason in outcome


def with_scans(count: int, comment: bytes = b"") -> bytes:
    """Return a progressive JPEG of this many scans, and with a comment."""
    content = file_of(half_red(), "JPEG", progressive=True)
    last, own = content.rfind(SCAN), content.count(SCAN)
    empty = SCAN + bytes((0, 8, 1, 1, 0, 63, 63, 16, 0))  # refines the last coefficient of the first channel by nothing
    segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment if comment else b""
    return content[:2] + segment + content[2:last] + empty * (count - own) + content[last:]


SCAN = b"\xff\xda"


def test_a_jpeg_of_more_scans_than_any_encoder_writes_is_rejected():
    assert is_red(decode(with_scans(MAX_SCANS)).getpixel((2, 2)))
    for content in (with_scans(MAX_SCANS + 1), with_scans(MAX_SCANS + 1, b"\xff\xd9"), with_scans(30_000)):
        with pytest.raises(Rejected, match=f"JPEG has more than {MAX_SCANS} scans"):
            decode(content)


def test_a_comment_full_of_markers_is_no_scan():
    assert is_red(decode(with_scans(10, SCAN * 30_000)).getpixel((2, 2)))
    trailing = file_of(half_red(), "JPEG") + SCAN * 1000  # behind the end, where phones store a film
    assert is_red(decode(trailing).getpixel((2, 2)))
