"""Image grids for people: captioned grids, labelled sheets, and denoising trajectories as filmstrips (PNG) or animations (GIF).

Shape legend: B batch, C channels, H W height and width.
"""

import io
import json
import textwrap
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from microdit.diffusion.samplers import Step
from microdit.errors import UserError
from microdit.io.files import aside_of, write_aside
from microdit.io.untrusted_text import one_line

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
JPEG_QUALITY = 95
CELL = 128  # side of an image in a grid, in pixels
LINES = 3  # per caption
LINE_HEIGHT = 15
LONGEST = 1000  # characters of a caption or title that are considered at all
GAP = 8
FRAME_MS, LAST_FRAME_MS = 120, 2000  # duration of an animation's frames
STRIP, FILM = 10, 60  # largest number of frames of a filmstrip and an animation, spread evenly over the steps


def draw_grid(images: list[Image.Image], captions: list[str], columns: int = 8, title: str | None = None) -> Image.Image:
    """Draw `images` row by row on white with `captions` below them. Small images are enlarged without smoothing."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    top = GAP + (LINE_HEIGHT + GAP if title else 0)
    cell_width, cell_height = CELL + GAP, CELL + LINES * LINE_HEIGHT + GAP
    canvas = Image.new("RGB", (GAP + columns * cell_width, top + rows * cell_height), "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        _draw_line(draw, _drawable(title), GAP, GAP)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = GAP + index % columns * cell_width
        y = top + index // columns * cell_height
        _paste(canvas, image, left, y)
        _write(draw, caption, left, y + CELL + 2)
    return canvas


def draw_sheet(rows: list[list[Image.Image]], row_labels: list[str], column_labels: list[str], title: str | None = None) -> Image.Image:
    """Draw a table of images with column labels above and row labels, if any, to the left."""
    left = GAP + (CELL if any(row_labels) else 0)
    top = GAP + (LINE_HEIGHT + GAP if title else 0) + LINES * LINE_HEIGHT
    step = CELL + GAP
    canvas = Image.new("RGB", (left + len(column_labels) * step, top + len(rows) * step), "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        _draw_line(draw, _drawable(title), GAP, GAP)
    for index, label in enumerate(column_labels):
        _write(draw, label, left + index * step, top - LINES * LINE_HEIGHT)
    for number, (images, label) in enumerate(zip(rows, row_labels, strict=True)):
        _write(draw, label, GAP, top + number * step)
        for index, image in enumerate(images):
            _paste(canvas, image, left + index * step, top + number * step)
    return canvas


def _paste(canvas: Image.Image, image: Image.Image, left: int, top: int) -> None:
    """Paste the image into the centre of the cell at (left, top)."""
    cell = _to_cell(image)
    canvas.paste(cell, (left + (CELL - cell.width) // 2, top + (CELL - cell.height) // 2))


def _write(draw: ImageDraw.ImageDraw, text: str, left: int, top: int) -> None:
    """Write as many lines as fit into a cell."""
    for number, line in enumerate(textwrap.wrap(_drawable(text), 20)[:LINES]):
        _draw_line(draw, line, left, top + number * LINE_HEIGHT)


def _draw_line(draw: ImageDraw.ImageDraw, line: str, left: int, top: int) -> None:
    """Draw ASCII in Pillow's own font, and anything else in DejaVu Sans, which comes with Matplotlib."""
    font = ImageFont.load_default(12) if line.isascii() else ImageFont.truetype(str(_dejavu()), 11)
    draw.text((left, top), line, "black", font)


def _to_cell(image: Image.Image) -> Image.Image:
    """Resize to fit a cell. Images are enlarged without smoothing, so that people see the model's own pixels."""
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)


def _drawable(caption: str) -> str:
    """Return a caption as one printable line, with a replacement character for what DejaVu Sans lacks, such as Chinese."""
    line = unicodedata.normalize("NFC", one_line(caption, LONGEST).replace("\u2019", "'"))
    return line if line.isascii() else "".join(c if c in _glyphs() else "\ufffd" for c in line)


def _dejavu() -> Path:
    import matplotlib  # late: grids are also drawn where it is not needed for anything else

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _glyphs() -> frozenset[str]:
    """Return the characters that DejaVu Sans has."""
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]  # comes with Matplotlib

    with TTFont(_dejavu()) as font:
        return frozenset(map(chr, font.getBestCmap()))


def png_bytes(image: Image.Image, about: dict[str, str] | None = None) -> bytes:
    """Encode as PNG. The entries of `about` become iTXt chunks, which `Image.info` returns."""
    buffer, text = io.BytesIO(), PngInfo()
    for key, value in (about or {}).items():
        text.add_itxt(key, value)
    image.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def save_png(image: Image.Image, path: Path, about: dict[str, str] | None = None) -> None:
    """Write a PNG file atomically, with text entries `about` as in `png_bytes`."""
    write_aside(path, png_bytes(image, about))


def save_picture(image: Image.Image, path: Path, about: dict[str, str]) -> None:
    """Write a PNG or, if `path` ends in .jpg or .jpeg, a JPEG, atomically; `about` is the PNG's text, or JSON in the JPEG's comment."""
    if path.suffix.lower() == ".png":
        save_png(image, path, about)
        return
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY, comment=json.dumps(about).encode())
    write_aside(path, buffer.getvalue())


def save_gif(frames: list[Image.Image], path: Path) -> None:
    """Write a looping animation atomically."""
    buffer = io.BytesIO()
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    write_aside(path, buffer.getvalue())


class Trajectory:
    """Collects the denoised estimates D(x; sigma) of all steps. Pass `add` as the pipeline's `on_denoised`; batches are concatenated."""

    def __init__(self) -> None:
        self._latents: dict[int, list[Tensor]] = {}
        self._sigmas: dict[int, float] = {}

    def add(self, step: Step) -> None:
        self._latents.setdefault(step.index, []).append(step.denoised_BCHW.cpu())
        self._sigmas[step.index] = step.sigma

    def save(self, path: Path, prompts: list[str], decode: Callable[[Tensor], list[Image.Image]], about: dict[str, str]) -> None:
        """Write a filmstrip with a row per prompt, or an animated grid if `path` ends in .gif. `about` becomes the PNG's text."""
        film = path.suffix.lower() == ".gif"
        shown = _spread(len(self._latents), FILM if film else STRIP)
        frames = [decode(torch.cat(self._latents[index])) for index in shown]
        names = [f"step {index + 1}, noise {self._sigmas[index]:.3g}" for index in shown]
        if film:
            save_gif([draw_grid(frame, prompts, title=name) for frame, name in zip(frames, names, strict=True)], path)
        else:
            save_png(draw_sheet([list(row) for row in zip(*frames, strict=True)], prompts, names), path, about)


def picture_name(number: int) -> str:
    """Return the file name of picture `number` of a folder."""
    return f"{number:04}.png"


def check_trajectory_path(path: Path | None) -> None:
    """Raise UserError, before any image is generated, if the path's suffix is neither .png nor .gif, or it cannot be written."""
    if path is not None and path.suffix.lower() not in (".png", ".gif"):
        raise UserError(f"--trajectory {path} must end in .png for a filmstrip, or in .gif for an animation.")
    if path is not None:
        _check_writable(path, "--trajectory")


def check_picture_path(path: Path, or_folder: str = "") -> None:
    """Raise UserError, before any image is generated, if no picture can be written to `path`. `or_folder` says what else it may name."""
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"--out {path} must end in .png, or in .jpg for a JPEG{or_folder}.")
    _check_writable(path, "--out")


def _check_writable(path: Path, option: str) -> None:
    """Create and remove a file beside `path`, and its folder if that is missing."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: name a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = aside_of(path)
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written ({error.strerror}): choose another place.") from error


def _spread(count: int, most: int) -> list[int]:
    """Return at most `most` numbers spread evenly from 0 to count - 1, including both ends."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
