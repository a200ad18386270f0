"""Pictures for people: a grid of images with their captions under them."""

import io
import textwrap
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from microdit.files import write_aside

CELL = 128  # pixels of a picture in a grid
LINES = 3  # of a caption
LINE_HEIGHT = 15
GAP = 8


def draw_grid(images: list[Image.Image], captions: list[str], columns: int = 8, title: str | None = None) -> Image.Image:
    """`images` row by row with `captions` under them, on white. Small pictures are enlarged, pixels kept."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    top = GAP + (LINE_HEIGHT + GAP if title else 0)
    cell_width, cell_height = CELL + GAP, CELL + LINES * LINE_HEIGHT + GAP
    canvas = Image.new("RGB", (GAP + columns * cell_width, top + rows * cell_height), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(12)
    if title:
        draw.text((GAP, GAP), _drawable(title), "black", font)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = GAP + index % columns * cell_width
        y = top + index // columns * cell_height
        cell = _to_cell(image)
        canvas.paste(cell, (left + (CELL - cell.width) // 2, y + (CELL - cell.height) // 2))
        lines = textwrap.wrap(_drawable(caption), 20)[:LINES]
        for number, line in enumerate(lines):
            draw.text((left, y + CELL + 2 + number * LINE_HEIGHT), line, "black", font)
    return canvas


def _to_cell(image: Image.Image) -> Image.Image:
    """As large as a cell allows. Enlarged without smoothing, so that people see the model's own pixels."""
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)


def _drawable(caption: str) -> str:
    """Pillow's built-in font has no accented letters: draw the plain ones, and a question mark where there is none."""
    plain = unicodedata.normalize("NFKD", caption.replace("\u2019", "'"))
    return "".join(c for c in plain if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def save_png(image: Image.Image, path: Path) -> None:
    """Whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_aside(path, buffer.getvalue())
