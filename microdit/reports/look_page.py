"""`microdit data look --html`: the preview of a source as a single self-contained HTML page, which shows captions in any script."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from microdit.errors import UserError
from microdit.io.files import write_aside
from microdit.reports.grids import png_bytes
from microdit.reports.html import image_data_url, load_template

SIDE = 512  # pixels; larger pictures are shrunk


def write_look_page(
    title: str,
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    numbers: dict[str, Any],
    out: Path,
    reconstructions: Image.Image | None = None,
) -> None:
    """Write the page of these pictures with their captions and of the statistics of `look`. Raises UserError if that fails."""
    shown = [{"address": _address(image), "caption": caption} for image, caption in zip(pictures, captions, strict=True)]
    rebuilt = image_data_url("png", png_bytes(reconstructions)) if reconstructions else None
    page = load_template("look.html.jinja").render(title=title, pictures=shown, numbers=numbers, reconstructions=rebuilt)
    try:
        write_aside(out, page.encode())
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}. Choose another --html.") from error


def _address(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    image.save(content, "WEBP", quality=85)
    return image_data_url("webp", content.getvalue())
