"""A folder of pictures as somebody might have them, for the examples of docstrings and of docs/python.md."""

from pathlib import Path

import numpy as np
from PIL import Image


def own_pictures(folder: Path, count: int) -> None:
    """`count` PNG files of 80 x 80 pixels, each of its own colours, with its caption beside it."""
    folder.mkdir(parents=True)
    for number in range(count):
        gradient = np.asarray(Image.linear_gradient("L").resize((80, 80)).rotate(90 * number), np.int64)
        pixels = np.stack([gradient + 21 * number * channel for channel in (1, 2, 3)], axis=-1) % 256
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
