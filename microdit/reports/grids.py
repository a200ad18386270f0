"""Pictures for people: a grid of images with their captions under them, a labelled sheet of rows and columns, a film.

How pictures come about: what the denoiser takes them for after each step, as a filmstrip or a film.

Shape legend: B batch, C channels, H W height and width.
"""

import io
import textwrap
import unicodedata
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from microdit.diffusion.samplers import Step
from microdit.errors import UserError
from microdit.io.files import write_aside
from microdit.io.text import one_line

CELL = 128  # pixels of a picture in a grid
LINES = 3  # of a caption
LINE_HEIGHT = 15
LONGEST = 1000  # characters of a caption or title, of which few are seen
GAP = 8
FRAME_MS, LAST_FRAME_MS = 120, 2000  # how long a film shows them


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
        _paste(canvas, image, left, y)
        _write(draw, caption, left, y + CELL + 2)
    return canvas


def draw_sheet(rows: list[list[Image.Image]], row_labels: list[str], column_labels: list[str], title: str | None = None) -> Image.Image:
    """A table of images: labels of columns above, of rows to the left, if there are any."""
    left = GAP + (CELL if any(row_labels) else 0)
    top = GAP + (LINE_HEIGHT + GAP if title else 0) + LINES * LINE_HEIGHT
    step = CELL + GAP
    canvas = Image.new("RGB", (left + len(column_labels) * step, top + len(rows) * step), "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((GAP, GAP), _drawable(title), "black", ImageFont.load_default(12))
    for index, label in enumerate(column_labels):
        _write(draw, label, left + index * step, top - LINES * LINE_HEIGHT)
    for number, (images, label) in enumerate(zip(rows, row_labels, strict=True)):
        _write(draw, label, GAP, top + number * step)
        for index, image in enumerate(images):
            _paste(canvas, image, left + index * step, top + number * step)
    return canvas


def _paste(canvas: Image.Image, image: Image.Image, left: int, top: int) -> None:
    """In the middle of the cell that begins there."""
    cell = _to_cell(image)
    canvas.paste(cell, (left + (CELL - cell.width) // 2, top + (CELL - cell.height) // 2))


def _write(draw: ImageDraw.ImageDraw, text: str, left: int, top: int) -> None:
    """As many lines as there is room for."""
    for number, line in enumerate(textwrap.wrap(_drawable(text), 20)[:LINES]):
        draw.text((left, top + number * LINE_HEIGHT), line, "black", ImageFont.load_default(12))


def _to_cell(image: Image.Image) -> Image.Image:
    """As large as a cell allows. Enlarged without smoothing, so that people see the model's own pixels."""
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)


def _drawable(caption: str) -> str:
    """Pillow's built-in font has no accented letters: draw the plain ones, and a question mark where there is none."""
    plain = unicodedata.normalize("NFKD", one_line(caption, LONGEST).replace("\u2019", "'"))
    return "".join(c for c in plain if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def png_bytes(image: Image.Image, about: dict[str, str] | None = None) -> bytes:
    """A PNG file. `about` becomes text in it (iTXt), which `Image.info` shows."""
    buffer, text = io.BytesIO(), PngInfo()
    for key, value in (about or {}).items():
        text.add_itxt(key, value)
    image.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def save_png(image: Image.Image, path: Path, about: dict[str, str] | None = None) -> None:
    """Whole or not at all. For `about` see `png_bytes`."""
    write_aside(path, png_bytes(image, about))


def save_gif(frames: list[Image.Image], path: Path) -> None:
    """A film that begins anew after a while. Whole or not at all."""
    buffer = io.BytesIO()
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    write_aside(path, buffer.getvalue())


STRIP, FILM = 10, 60  # frames at most, spread evenly over the steps


class Trajectory:
    """`add` is for `on_denoised` of a pipeline. Pictures of several batches are put together."""

    def __init__(self) -> None:
        self._latents: dict[int, list[Tensor]] = {}
        self._sigmas: dict[int, float] = {}

    def add(self, step: Step) -> None:
        self._latents.setdefault(step.index, []).append(step.denoised_BCHW.cpu())
        self._sigmas[step.index] = step.sigma

    def save(self, path: Path, prompts: list[str], decode: Callable[[Tensor], list[Image.Image]], about: dict[str, str]) -> None:
        """A row of frames for each prompt, or, if the name ends in .gif, one picture of all that moves. `about` is for the PNG's text."""
        film = path.suffix.lower() == ".gif"
        shown = _spread(len(self._latents), FILM if film else STRIP)
        frames = [decode(torch.cat(self._latents[index])) for index in shown]
        names = [f"step {index + 1}, noise {self._sigmas[index]:.3g}" for index in shown]
        if film:
            save_gif([draw_grid(frame, prompts, title=name) for frame, name in zip(frames, names, strict=True)], path)
        else:
            save_png(draw_sheet([list(row) for row in zip(*frames, strict=True)], prompts, names), path, about)


def check_trajectory_path(path: Path | None) -> None:
    """Before anything is drawn. Raises UserError."""
    if path is not None and path.suffix.lower() not in (".png", ".gif"):
        raise UserError(f"--trajectory {path} must end in .png, for a filmstrip, or in .gif, for a film.")


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers from 0 to count - 1, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
