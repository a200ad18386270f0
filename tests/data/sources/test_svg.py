"""What of an SVG drawing is rendered, and what is refused. Only the tests of rendering itself need resvg."""

import io
import time

import pytest
from PIL import Image

from microdit.data.sources.svg import ViewBox, check_svg, render_svg
from microdit.data.sources.untrusted_files import Refused
from tests.data.pictures import OWL, RED_HEART, picture, write_file

VIEW = ViewBox(0, 0, 16, 16)
NESTED = "".join(f'<g id="g{n}">{f"""<use href="#g{n + 1}"/>""" * 10}</g>' for n in range(8))  # 100 million shapes
CLIPPED = "".join(f'<clipPath id="c{n}">{f"""<path clip-path="url(#c{n + 1})" d="M0 0h9v9z"/>""" * 10}</clipPath>' for n in range(8))
LADDER = "".join(f'<g id="l{n}"><use href="#l{n + 1}"/></g>' for n in reversed(range(200)))  # each step is shallow

REFUSED = {
    "drawing is not valid XML": [
        "<path",
        "</svg><svg>",
        "<path d='&file;'/>",
        "<!DOCTYPE svg [<!ENTITY a 'b'>]><path/>",
        "\0",
        "\ud800",
    ],
    "drawing has an element that is not supported": [
        '<image href="picture.png" width="16" height="16"/>',
        "<text>a</text>",
        "<style>path{fill:red}</style>",
        "<script/>",
        "<foreignObject/>",
        '<filter id="f"><feImage href="picture.png"/></filter>',
        '<pattern id="p"/>',
        '<svg viewBox="0 0 1 1"/>',
        '<path xmlns="http://other.example" d="M0 0h9v9z"/>',
    ],
    "drawing has an attribute that is not supported": [
        '<path style="fill:url(file.svg#a)"/>',
        '<path onload="x"/>',
        '<path d="M0 0h9" stroke-dasharray="1e-9"/>',
        '<path filter="url(#f)"/>',
    ],
    "drawing refers to something outside of it": [
        '<use href="other.svg#a"/>',
        '<use xlink:href="file:///etc/passwd"/>',
        '<path fill="url(other.svg#a)"/>',
        '<path clip-path="url(http://host.example/a.svg#a)"/>',
    ],
    "drawing has a number that is too large": ['<path d="M0 0L1e30 1e30"/>', '<circle r="100000000"/>', '<path transform="scale(1E+9)"/>'],
    "drawing repeats an id": ['<g id="a"/><g id="a"/>'],
    "drawing is nested too deeply, or refers to itself": [
        '<g id="a"><use href="#a"/></g>',
        '<linearGradient id="a" href="#b"/><linearGradient id="b" href="#a"/>',
        "<g>" * 60_000 + "</g>" * 60_000,
        LADDER,
    ],
    "drawing has too many shapes": [
        NESTED,
        CLIPPED,
        '<path d="M0 0h9v9z"/>' * 301,
        f'<path id="a" d="{"M0 0h9v9z" * 10_000}"/>' + '<use href="#a"/>' * 9,
    ],
    "drawing is too large": [" " * 500_001],
}


@pytest.mark.parametrize(("reason", "body"), [(reason, body) for reason, bodies in REFUSED.items() for body in bodies])
def test_a_hostile_or_broken_drawing_is_refused_with_its_reason_at_once(reason, body):
    started = time.process_time()
    with pytest.raises(Refused) as refusal:
        check_svg(body, VIEW, 64)
    assert refusal.value.reason == reason
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "body", ["", RED_HEART, OWL, '<path fill="url(#nothing)" stroke="rgb"/>', '<stop stop-color="rgba(1, 2, 3, .5)"/>']
)
def test_plain_shapes_are_kept(body):
    checked = check_svg(body, VIEW, 64)
    assert 'viewBox="0 0 16 16"' in checked
    assert check_svg(checked.partition(">")[2].removesuffix("</ns0:svg>").replace("ns0:", ""), VIEW, 64) == checked


def test_a_drawing_is_rendered_at_the_size_wanted_on_transparency():
    pytest.importorskip("resvg_py")
    image = Image.open(io.BytesIO(render_svg(RED_HEART, VIEW, 64)))
    assert (image.format, image.mode, image.size) == ("PNG", "RGBA", (64, 64))
    assert image.getpixel((32, 32)) == (0xDD, 0x2E, 0x44, 255)
    assert image.getpixel((1, 1))[3] == 0
    owl = Image.open(io.BytesIO(render_svg(OWL, VIEW, 64)))
    assert owl.getpixel((32, 32)) == (0x66, 0x21, 0x13, 255)


def test_a_drawing_that_is_not_square_is_centred():
    pytest.importorskip("resvg_py")
    image = Image.open(io.BytesIO(render_svg('<path fill="#f00" d="M0 0h16v8h-16z"/>', ViewBox(0, 0, 16, 8), 64)))
    assert image.size == (64, 64)
    assert image.getbbox() == (0, 16, 64, 48)


def test_resvg_would_read_a_file_that_the_check_keeps_out(tmp_path):
    """Without the check, a drawing could read files: this is why `image` is refused, and tells if it becomes needless."""
    resvg = pytest.importorskip("resvg_py")
    file = write_file(tmp_path / "picture.png", picture(3, "PNG"))
    body = f'<image href="{file}" width="16" height="16"/>'
    whole = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16" width="64" height="64">{body}</svg>'
    assert Image.open(io.BytesIO(resvg.svg_to_bytes(svg_string=whole, skip_system_fonts=True))).getbbox() is not None
    with pytest.raises(Refused, match="not supported"):
        render_svg(body, VIEW, 64)


@pytest.mark.parametrize("body", ['<path d="junk"/>', '<circle r="-1"/>'])
def test_a_shape_that_is_none_is_left_out(body):
    pytest.importorskip("resvg_py")
    assert Image.open(io.BytesIO(render_svg(body + RED_HEART, VIEW, 64))).getpixel((32, 32)) == (0xDD, 0x2E, 0x44, 255)


def outcome(body: str) -> tuple[int, int] | str:
    try:
        return Image.open(io.BytesIO(render_svg(body, VIEW, 64))).size
    except Refused as refused:
        return refused.reason


@pytest.mark.parametrize("scale", ["scale(9999999)" * n for n in (1, 2, 4, 9)])
def test_a_failed_assertion_inside_resvg_refuses_the_drawing(scale):
    """resvg 0.5.0 panics at two and at four of these."""
    pytest.importorskip("resvg_py")
    assert outcome(f'<path transform="{scale}" d="M0 0l1 1c1 1 1 2 3 4z" stroke="red"/>') in ((64, 64), "drawing cannot be rendered")


def test_the_costliest_shapes_take_a_fraction_of_a_second_each():
    pytest.importorskip("resvg_py")
    gradient = '<radialGradient id="a"><stop stop-color="red"/><stop offset="1" stop-opacity=".1"/></radialGradient>'
    clip = '<clipPath id="c"><path d="M0 0h16v16z"/></clipPath>'
    shape = '<path fill="url(#a)" opacity=".5" clip-path="url(#c)" d="M0 0h16v16z"/>'
    started = time.process_time()
    render_svg(gradient + clip + shape * 10, VIEW, 256)
    assert time.process_time() - started < 5
