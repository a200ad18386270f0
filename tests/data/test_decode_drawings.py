"""SVG files as pictures: read by their content, rendered at the size that is asked for, refused where they are not plain."""

import time
from contextlib import suppress

import pytest

from microdit.data import decode as decoding
from microdit.data.decode import Rejected, TargetSizes, decode, prepare
from microdit.data.sources.archives import archive_source
from microdit.data.sources.svg import is_svg, read_svg
from microdit.data.sources.untrusted_files import CAN_DRAW, Refused, sum_of_kinds
from tests.data.pictures import picture, problems_of, records_of, write_tar

FLAG = (
    b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a flag -->\n<svg xmlns="http://www.w3.org/2000/svg" viewBox="10 10 200 100" fill="#ff0000" '
    b'data-name="x"><title>a flag</title><rect x="10" y="10" width="100" height="100"/>'
    b'<circle fill="#0000ff" cx="160" cy="60" r="40"/></svg>'
)
needs_resvg = pytest.mark.skipif(not CAN_DRAW, reason="needs the extra svg")


def test_drawings_are_recognised_by_their_beginning():
    assert is_svg(FLAG)
    assert is_svg(b"  <svg></svg>")
    assert not is_svg(b"<html><svg></svg></html>")
    assert not is_svg(picture())


def test_the_view_and_what_holds_for_all_shapes_are_read():
    body, view = read_svg(FLAG)
    assert (view.left, view.top, view.width, view.height) == (10, 10, 200, 100)
    assert body.startswith('<g fill="#ff0000"><rect')
    assert "title" not in body
    assert read_svg(b'<svg width="24px" height="12px"><path d="M0 0"/></svg>')[1].width == 24


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<svg/>", "drawing is not valid XML"),
        (b"<svg>", "drawing is not valid XML"),
        (b"<svg><path/></svg>", "drawing does not say its size"),
        (b'<svg viewBox="0 0 0 5"></svg>', "drawing has an impossible size"),
        (b'<svg viewBox="0 0 1 9999"></svg>', "drawing has an impossible size"),
        (b'<svg viewBox="0 0 nan nan"></svg>', "drawing has an impossible size"),
        (b"<svg " + b" " * 600_000, "drawing is too large"),
    ],
)
def test_what_is_no_drawing_of_a_size_is_named(content, reason):
    with pytest.raises(Refused) as refused:
        read_svg(content)
    assert refused.value.reason == reason


@pytest.mark.parametrize("piece", [b"<svg", b"<svg a='", b"<title>", b"<title", b"aaaa", b"a=''", b"<!--"])
def test_reading_takes_time_in_proportion_to_the_file(piece):
    started = time.process_time()
    for content in (b"<svg " + piece * (400_000 // len(piece)), b'<svg viewBox="0 0 9 9">' + piece * (400_000 // len(piece)) + b"</svg>"):
        with suppress(Refused):
            read_svg(content)
    assert time.process_time() - started < 5


def test_without_the_extra_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(decoding, "CAN_DRAW", False)
    with pytest.raises(Rejected) as rejected:
        decode(FLAG)
    assert rejected.value.reason == "SVG drawing, which needs pip install 'microdit[svg]'"


@needs_resvg
def test_a_drawing_has_the_size_that_is_asked_for_and_no_least_side():
    image = decode(FLAG)
    assert (image.mode, image.size) == ("RGB", (1024, 512))
    pixels = [image.getpixel(place) for place in ((100, 100), (768, 256), (1000, 20))]
    assert pixels == [(255, 0, 0), (0, 0, 255), (255, 255, 255)]
    for side in (16, 300):
        ((bucket, (pixels,)),) = prepare(TargetSizes.of((side,), 2000, False, 1), [FLAG])
        assert (bucket, pixels.shape) == (0, (side, side, 3))
        assert pixels[side // 2, 1].tolist() == [255, 0, 0]


@needs_resvg
def test_a_drawing_that_is_not_plain_is_rejected_by_name():
    texts = FLAG.replace(b"<rect", b"<text>a</text><rect")
    (outcome,) = prepare(TargetSizes.of((16,), 0, False, 1), [texts])
    assert outcome == "drawing has an element that is not supported"


@needs_resvg
def test_a_drawing_beside_its_picture_in_an_archive_is_passed_over(tmp_path):
    files = [("0.png", picture()), ("0.svg", FLAG), ("0.txt", b"a flag"), ("1.svg", FLAG), ("1.txt", b"another")]
    first, second = records_of(archive_source([write_tar(tmp_path / "a.tar", files)]))
    assert problems_of([first, second]) == {"0": "", "1": ""}
    assert (first.image, second.image) == (picture(), FLAG)
    assert sum_of_kinds(first.passed_over, second.passed_over) == {".svg": 1}
