"""How pictures come about: what the denoiser takes them for after each step, as a filmstrip or a film.

Shape legend: B batch, C channels, H W height and width.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from microdit.diffusion.steps import Step
from microdit.errors import UserError
from microdit.grids import draw_grid, draw_sheet, save_gif, save_png

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


def refuse_other_endings(path: Path | None) -> None:
    """Before anything is drawn. Raises UserError."""
    if path is not None and path.suffix.lower() not in (".png", ".gif"):
        raise UserError(f"--trajectory {path} must end in .png, for a filmstrip, or in .gif, for a film.")


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers from 0 to count - 1, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
