"""Render SVG drawings that come from elsewhere.

Only plain shapes are rendered: a drawing with any element or attribute outside of two short lists, or with a reference to anything but its
own elements, is refused. A drawing can therefore read no file and no address, and needs no font. Its work is bounded too: references are
counted as if each were written out, because a few lines of nested `use` elements can draw a billion shapes.

What is rendered is the checked tree, written out again, so that a second parser cannot understand the text differently.
"""

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass

from microdit.data.sources.untrusted_files import Refused
from microdit.errors import optional_package

LARGEST_DRAWING = 500_000  # characters; the largest drawing of the emoji sets has 170,000
MOST_SHAPES = 300  # with every reference written out; one takes up to about 40 ms at 256 px. The emoji sets have up to 219
MOST_CHARACTERS = 500_000  # with every reference written out
DEEPEST = 20  # elements inside each other, references included

SVG = "{http://www.w3.org/2000/svg}"
HREFS = ("href", "{http://www.w3.org/1999/xlink}href")
PAINTS = ("fill", "stroke", "clip-path")  # may be url(#id)
SHAPES = {"circle", "ellipse", "g", "path", "rect", "use"}
ELEMENTS = SHAPES | {"clipPath", "defs", "linearGradient", "radialGradient", "stop", "svg"}
# fmt: off
WORDS = {
    *HREFS, *PAINTS, "id", "color", "stop-color", "fill-rule", "clip-rule", "clipPathUnits", "gradientUnits",
    "paint-order", "stroke-linecap", "stroke-linejoin", "viewBox",
}
NUMBERS = {
    "d", "x", "y", "width", "height", "cx", "cy", "r", "rx", "ry", "fx", "fy", "x1", "x2", "y1", "y2", "offset", "transform",
    "gradientTransform", "opacity", "fill-opacity", "stop-opacity", "stroke-opacity", "stroke-width", "stroke-miterlimit",
}
# fmt: on

LARGEST_BOX = 1_000_000.0  # width and height of a drawing, in its own units
MOST_ASPECT = 20.0  # width / height, or the other way round
_ROOT = re.compile(r"<svg\b([^<>]{0,4000})>")
_ATTRIBUTE = re.compile(r"""([\w:.-]+)\s*=\s*("[^"]*"|'[^']*')""")
_NOTES = ("title", "desc", "metadata")  # elements for readers, which are not drawn
_OF_ROOT = {"id", "x", "y", "width", "height", "viewBox"}
_HREF = re.compile(r"#(\S+)")
_URL = re.compile(r"url\(#([^\s()'\"]+)\)")
_HUGE = re.compile(r"(?<![\d.])\d{8}|\d[eE]\+?\d")  # ten million or more, or a positive exponent


@dataclass(frozen=True)
class ViewBox:
    """The rectangle of the drawing's own coordinates that becomes the picture."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class _Cost:
    """The number of shapes and characters of an element, and its depth, with every reference written out."""

    shapes: int
    characters: int
    depth: int


def is_svg(content: bytes) -> bool:
    """Return whether a file is an SVG drawing, by its beginning."""
    start = content[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith((b"<svg", b"<?xml", b"<!")) and b"<svg" in start


def read_svg(content: bytes) -> tuple[str, ViewBox]:
    """Return the body of an SVG file and its view box. What its first element says of all shapes becomes a group. Raises Refused."""
    if len(content) > LARGEST_DRAWING:
        raise Refused("drawing is too large")
    text = content.decode("utf-8-sig", "replace")
    root = _ROOT.search(text)
    end = text.rfind("</svg>")
    if root is None or end < root.end():
        raise Refused("drawing is not valid XML")
    attributes = {name: value[1:-1] for name, value in _ATTRIBUTE.findall(root[1])}
    box = attributes.get("viewBox") or f"0 0 {attributes.get('width', '')} {attributes.get('height', '')}".replace("px", "")
    try:
        left, top, width, height = map(float, re.split(r"[\s,]+", box.strip()))
    except ValueError:
        raise Refused("drawing does not say its size") from None
    if not (0 < width <= LARGEST_BOX and 0 < height <= LARGEST_BOX and max(width, height) <= MOST_ASPECT * min(width, height)):
        raise Refused("drawing has an impossible size")
    of_shapes = {name: value for name, value in attributes.items() if (name in WORDS or name in NUMBERS or name == "style")}
    kept = " ".join(f'{name}="{value}"' for name, value in of_shapes.items() if name not in _OF_ROOT and '"' not in value)
    return f"<g {kept}>{_without_notes(text[root.end() : end])}</g>", ViewBox(left, top, width, height)


def _without_notes(body: str) -> str:
    for name in _NOTES:
        kept, place = [], 0
        while (begin := body.find(f"<{name}", place)) >= 0 and (end := body.find(f"</{name}>", begin)) >= 0:
            kept.append(body[place:begin])
            place = end + len(name) + 3
        body = "".join([*kept, body[place:]])
    return body


def render_svg(body: str, view: ViewBox, side: int) -> bytes:
    """Render the body of an SVG drawing as a PNG of `side` x `side` pixels with transparency. Raises Refused."""
    with optional_package("Rendering SVG drawings", "svg"):
        import resvg_py

    checked = check_svg(body, view, side)
    try:
        return resvg_py.svg_to_bytes(svg_string=checked, skip_system_fonts=True)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # a failed assertion of resvg, no `Exception`
            raise Refused("drawing cannot be rendered") from None
        raise


def check_svg(body: str, view: ViewBox, side: int) -> str:
    """Return the drawing as a whole SVG document of `side` x `side` pixels. Raises Refused."""
    if len(body) > LARGEST_DRAWING:
        raise Refused("drawing is too large")
    box = f"{view.left} {view.top} {view.width} {view.height}"
    start = f'<svg xmlns="{SVG[1:-1]}" xmlns:xlink="{HREFS[1][1:-5]}" viewBox="{box}" width="{side}" height="{side}">'
    try:
        root = ET.fromstring(f"{start}{body}</svg>")
    except (ET.ParseError, ValueError):  # ValueError: text that is no Unicode
        raise Refused("drawing is not valid XML") from None
    _check_names(root)
    _check_cost(root)
    return ET.tostring(root, encoding="unicode")


def _check_names(root: ET.Element) -> None:
    for element in root.iter():
        name = str(element.tag).removeprefix(SVG)
        if name not in ELEMENTS or (name == "svg" and element is not root):
            raise Refused("drawing has an element that is not supported")
        for attribute, value in element.attrib.items():
            if attribute not in WORDS and attribute not in NUMBERS:
                raise Refused("drawing has an attribute that is not supported")
            if attribute in NUMBERS and _HUGE.search(value):
                raise Refused("drawing has a number that is too large")


def _check_cost(root: ET.Element) -> None:
    named = [element for element in root.iter() if "id" in element.attrib]
    by_id = {element.attrib["id"]: element for element in named}
    if len(by_id) < len(named):
        raise Refused("drawing repeats an id")
    known: dict[ET.Element, _Cost] = {}

    def cost_of(element: ET.Element, depth: int) -> _Cost:
        if depth > DEEPEST:
            raise Refused("drawing is nested too deeply, or refers to itself")
        if element not in known:
            inside = [*element, *(by_id[name] for name in _references(element) if name in by_id)]
            costs = [cost_of(child, depth + 1) for child in inside]
            own = sum(len(value) for value in element.attrib.values())
            known[element] = _Cost(
                shapes=(element.tag.removeprefix(SVG) in SHAPES) + sum(cost.shapes for cost in costs),
                characters=own + sum(cost.characters for cost in costs),
                depth=1 + max((cost.depth for cost in costs), default=0),
            )
        return known[element]

    cost = cost_of(root, 0)
    if cost.depth > DEEPEST:
        raise Refused("drawing is nested too deeply, or refers to itself")
    if cost.shapes > MOST_SHAPES or cost.characters > MOST_CHARACTERS:
        raise Refused("drawing has too many shapes")


def _references(element: ET.Element) -> list[str]:
    """Return the ids that an element refers to. Raises Refused if it refers to anything else."""
    found = []
    for attribute, value in element.attrib.items():
        if attribute in HREFS or (attribute in PAINTS and "(" in value):
            reference = (_HREF if attribute in HREFS else _URL).fullmatch(value)
            if reference is None:
                raise Refused("drawing refers to something outside of it")
            found.append(reference[1])
    return found
