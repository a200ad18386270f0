"""What an autoencoder makes of pictures: reconstructions, their PSNR and perceptual distance, and a warning where they are poor.

Reconstructions are the ceiling of a training: a denoiser of latents learns to make what the autoencoder decodes, and nothing better.

The perceptual distance is LPIPS (Zhang et al. 2018, arXiv 1801.03924, section 3) with the features of EfficientNet-Lite0 and without
learned weights: squared differences of features of unit length, averaged over places and over five depths. It is comparable with no
published figures.

Shape legend: B images of a batch, D features, H W height and width, N images.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from microdit.data.look import look
from microdit.data.pixels import to_image, to_tensor
from microdit.data.sources.base import Source
from microdit.encoders.autoencoder import Autoencoder
from microdit.encoders.vision import load_efficientnet, normalise_for_imagenet
from microdit.errors import UserError
from microdit.io.console import QUIET, Reporter
from microdit.reports.grids import draw_grid, save_png
from microdit.reports.run_folder import RECONSTRUCTIONS

SHOWN = 16  # pictures
SEARCHED = 64  # records among which they are spread
COLUMNS = 8
# A reconstruction is poor beyond these. Measured at 64 px with the icon autoencoder: 5% of emoji and 1% of scenes are that far away, and
# 84 to 98% of crops of three photographs. A JPEG of quality 20 is at 0.3, and one of quality 5, or a quarter of the resolution, at 0.5 to
# 0.65.
POOR_DISTANCE = 0.5
POOR_PSNR = 19.0  # dB; used only without features, since it finds fewer: 8% of emoji and 9 to 80% of the crops are below
POOR_SHARE = 0.25  # share of poor reconstructions from which on a warning is due: by chance, 4 of 16 emoji are poor once in a hundred times


class PerceptualDistance:
    """The distance of images from others, 0 if they are equal. Gradients flow through it."""

    def __init__(self, device: torch.device | str = "cpu"):
        """Load the features. Raises UserError if their package is not installed."""
        self._network = load_efficientnet(device)

    def __call__(self, images_BCHW: Tensor, others_BCHW: Tensor) -> Tensor:
        """Return the distances, (B,), of images (B, 3, H, W) in [-1, 1]."""
        pairs = zip(self._features(images_BCHW), self._features(others_BCHW), strict=True)
        return torch.stack([(a_BDHW - b_BDHW).square().sum(dim=1).mean(dim=(1, 2)) for a_BDHW, b_BDHW in pairs]).mean(dim=0)

    def _features(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return features of unit length at the last block of each resolution, from a half to a thirty-second of the image's."""
        network = self._network
        x_BDHW = network._swish(network._bn0(network._conv_stem(normalise_for_imagenet(images_BCHW))))
        found = []
        for block in network._blocks:
            before_BDHW, x_BDHW = x_BDHW, block(x_BDHW)
            if x_BDHW.shape[-1] < before_BDHW.shape[-1]:
                found.append(before_BDHW)
        return [x_BDHW / x_BDHW.norm(dim=1, keepdim=True).clamp(min=1e-10) for x_BDHW in (*found, x_BDHW)]


@dataclass(frozen=True)
class Reconstructions:
    """Pictures, `side` pixels square, with what an autoencoder makes of them. `distances` is None without a feature network."""

    autoencoder: str
    side: int
    originals: list[Image.Image]
    rebuilt: list[Image.Image]
    psnrs: list[float]  # dB
    distances: list[float] | None

    @property
    def poor(self) -> int:
        """The number of poor reconstructions."""
        if self.distances is not None:
            return sum(distance > POOR_DISTANCE for distance in self.distances)
        return sum(psnr < POOR_PSNR for psnr in self.psnrs)

    def figures(self) -> dict[str, Any]:
        """Return the means and the number of poor reconstructions."""
        distance = None if self.distances is None else round(sum(self.distances) / len(self.distances), 3)
        psnr = round(sum(self.psnrs) / len(self.psnrs), 2)
        shown = {"autoencoder": self.autoencoder, "side": self.side, "pictures": len(self.psnrs), "poor": self.poor}
        return {**shown, "psnr_db": psnr, "perceptual_distance": distance}

    def describe(self) -> str:
        """Return the figures as a sentence."""
        figures = self.figures()
        distance = (
            "no perceptual distance, which needs the package efficientnet-lite-pytorch (microdit[demo])"
            if self.distances is None
            else f"perceptual distance {figures['perceptual_distance']:.2f} (0 is equal, beyond {POOR_DISTANCE} is poor)"
        )
        return f"{len(self.psnrs)} pictures through the autoencoder {self.autoencoder}: PSNR {figures['psnr_db']:.1f} dB, {distance}."

    def warning(self) -> str | None:
        """Return a sentence if many reconstructions are poor, with what to do about it."""
        if self.poor < POOR_SHARE * len(self.psnrs):
            return None
        return (
            f"{self.poor} of {len(self.psnrs)} pictures are poor once they went through the autoencoder {self.autoencoder}. The "
            "reconstructions are the ceiling: no training makes pictures better than these. Take an autoencoder that knows such pictures "
            "(--autoencoder sdxl), train one on with your own (microdit train-autoencoder SOURCE --from icon --out FOLDER), or use none "
            "(--autoencoder pixels)."
        )

    def draw(self) -> Image.Image:
        """Draw rows of originals, each above the row of its reconstructions with their figures."""
        marks = [f"{psnr:.1f} dB" for psnr in self.psnrs]
        if self.distances is not None:
            marks = [f"{mark}, {distance:.2f}" for mark, distance in zip(marks, self.distances, strict=True)]
        columns = min(COLUMNS, len(marks))
        white = [Image.new("RGB", (self.side, self.side), "white")] * (-len(marks) % columns)
        originals, rebuilt, marks = [*self.originals, *white], [*self.rebuilt, *white], [*marks, *[""] * len(white)]
        rows = [slice(start, start + columns) for start in range(0, len(marks), columns)]
        images = [image for row in rows for image in (*originals[row], *rebuilt[row])]
        captions = [caption for row in rows for caption in (*["original"] * columns, *marks[row])]
        return draw_grid(images, captions, columns, title=self.describe())

    def save(self, path: Path) -> None:
        """Write the drawing as PNG, with the figures as JSON in its text entry `reconstructions`."""
        save_png(self.draw(), path, {"reconstructions": json.dumps(self.figures())})


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, pictures: Sequence[Image.Image], side: int) -> Reconstructions:
    """Resize and crop pictures (at least one) to `side` pixels square, encode and decode them one by one, and measure the difference."""
    try:
        perceptual = PerceptualDistance()
    except UserError:  # the package is not installed, which the sentence of `describe` says
        perceptual = None
    originals, rebuilt, psnrs, distances = [], [], [], []
    for picture in pictures:
        original_CHW = to_tensor(picture, side)
        decoded_CHW = autoencoder.decode(autoencoder.encode(original_CHW[None]))[0].cpu().clamp(-1, 1)
        mse = ((decoded_CHW - original_CHW) / 2).square().mean().clamp(min=1e-10).item()
        originals.append(to_image(original_CHW))
        rebuilt.append(to_image(decoded_CHW))
        psnrs.append(-10 * math.log10(mse))
        if perceptual:
            distances.append(perceptual(original_CHW[None], decoded_CHW[None]).item())
    return Reconstructions(autoencoder.name, side, originals, rebuilt, psnrs, distances if perceptual else None)


def save_reconstructions(source: Source, folder: Path, autoencoder: Autoencoder, side: int, reporter: Reporter = QUIET) -> None:
    """Write what the autoencoder makes of 16 pictures of a source into `folder`, say how good they are, and warn if they are poor.

    Nothing is written for `pixels`, which lose nothing, and for a source without usable pictures.
    """
    if autoencoder.name == "pixels":
        return
    pictures, _, _ = look(source, SHOWN, SEARCHED)
    if not pictures:
        return
    made = reconstruct(autoencoder, pictures, side)
    made.save(folder / RECONSTRUCTIONS)
    reporter.say(made.describe())
    if sentence := made.warning():
        reporter.warn(sentence)
