"""A new data source: coloured discs, squares and crosses, drawn while they are read.

A source is a list of parts, and a part yields records: a key, captions, and the bytes of an image file. Each part becomes one shard.

    python examples/extend/data_source.py data/shapes
    microdit train my-pictures data.path=data/shapes phases.0.steps=100 phases.1.steps=100 --out runs/shapes
    microdit sample runs/shapes "a red disc" "a blue cross"
"""

import io
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product

from PIL import Image, ImageDraw

import microdit
from microdit.data.sources.base import Part, Record, Source

COLOURS, SHAPES, SIDES = ("red", "green", "blue", "orange", "black"), ("disc", "square", "cross"), range(24, 61, 2)


def draw(colour: str, shape: str, side: int) -> bytes:
    """Return a PNG of 64 x 64 pixels with the shape in its middle, `side` pixels wide, on white."""
    image = Image.new("RGB", (64, 64), "white")
    near, far = 32 - side // 2, 31 + side // 2
    pen = ImageDraw.Draw(image)
    if shape == "cross":
        pen.line((near, near, far, far), colour, 8)
        pen.line((near, far, far, near), colour, 8)
    else:
        (pen.ellipse if shape == "disc" else pen.rectangle)((near, near, far, far), colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def records(shape: str) -> Iterator[Record]:
    for colour, side in product(COLOURS, SIDES):
        yield Record(f"{shape}-{colour}-{side}", {"caption": f"a {colour} {shape}"}, draw(colour, shape, side))


def shapes_source() -> Source:
    """A part for each shape. `known` is whatever determines its records: what has changed is encoded again."""
    parts = [Part(shape, partial(records, shape), known=lambda: f"{COLOURS} {SIDES}") for shape in SHAPES]
    return Source("shapes", parts, license="CC0")


if __name__ == "__main__":
    encoded = microdit.encode_dataset(shapes_source(), sys.argv[1])
    print(f"{len(encoded)} pictures, latents of {encoded.latent_shape()}")
