"""A small classifier of pictures, trained on real ones alone: a judge of generated images that owes nothing to another network.

Each picture is a class of its own, which the network learns to tell from all others however it is shifted, scaled, rotated, tinted, blurred
or covered by noise. Its features are those before the classes, and serve for pictures that it never saw, too. `python benchmarks/judges.py`
measures how well it recognises held-out pictures.

Shape legend: N pictures, B of a batch, C channels, S side in pixels, D features.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from microdit.data.pixels import to_tensor
from microdit.evaluation.extraction import read_tensors, write_tensors
from microdit.io.console import QUIET, Reporter
from microdit.io.files import cache_folder

VERSION = 1  # of the distortions and layers, to be raised when they change
SIDE = 32
FEATURES = 128
MOST_PICTURES = 4096  # that are learnt, spread evenly over a larger set
EPOCHS, LEAST_STEPS, BATCH, RATE = 21, 60, 128, 3e-3
TEMPERATURE = 0.1  # of the cosine similarity between a picture and a class


class PictureClassifier:
    """Features of pictures by a network that was trained on some: `ImageFeatures`."""

    def __init__(self, network: nn.Module, device: torch.device | str = "cpu"):
        self.name, self.resize = "picture-classifier", f"Pillow bicubic, 8 bits, middle, {SIDE}"
        digest = hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in network.state_dict().values()))
        self.fingerprint = digest.hexdigest()[:16]
        self._network, self._device = network.eval().requires_grad_(False).to(device), device

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> Tensor:
        batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        return torch.cat([self._network(_pixels(batch).to(self._device)).cpu() for batch in batches])


def trained_classifier(images: list[Image.Image], device: torch.device | str = "cpu", reporter: Reporter = QUIET) -> PictureClassifier:
    """Return the classifier of these pictures, from the cache if it was trained before. It takes about a minute on a CPU."""
    chosen = [images[int(number)] for number in np.linspace(0, len(images) - 1, min(len(images), MOST_PICTURES)).round()]
    pixels_NCSS, network = _pixels(chosen), _network()
    path = _cached(pixels_NCSS)
    if (found := read_tensors(path, network.state_dict(), reporter)) is not None:
        network.load_state_dict(found[0])
    else:
        _train(network, pixels_NCSS, device, reporter)
        write_tensors(path, {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()})
    return PictureClassifier(network, device)


def distorted(pixels_BCSS: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures in [-1, 1] on white, each shifted, scaled, rotated, tinted, blurred and covered by noise at random."""
    B, device = len(pixels_BCSS), pixels_BCSS.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(B, *shape).uniform_(low, high, generator=generator).to(device)

    angle_B, scale_B, shift_B2 = uniform(-0.2, 0.2), uniform(0.85, 1.2), uniform(-0.15, 0.15, 2)
    rows_B23 = torch.stack(
        [
            torch.stack([angle_B.cos() / scale_B, -angle_B.sin() / scale_B, shift_B2[:, 0]], dim=1),
            torch.stack([angle_B.sin() / scale_B, angle_B.cos() / scale_B, shift_B2[:, 1]], dim=1),
        ],
        dim=1,
    )
    ink_BCSS = 1 - pixels_BCSS  # so that what moves in from outside is white
    moved_BCSS = F.grid_sample(ink_BCSS, F.affine_grid(rows_B23, list(ink_BCSS.shape), align_corners=False), align_corners=False)
    tinted_BCSS = moved_BCSS * uniform(0.7, 1.3, 3, 1, 1)
    small = int(torch.randint(6, SIDE + 1, (), generator=generator))
    blurred_BCSS = F.interpolate(tinted_BCSS, (small, small), mode="bilinear", antialias=True)
    blurred_BCSS = F.interpolate(blurred_BCSS, (SIDE, SIDE), mode="bilinear")
    noise_BCSS = torch.randn(blurred_BCSS.shape, generator=generator).to(device) * uniform(0, 0.4, 1, 1, 1)
    return 1 - blurred_BCSS + noise_BCSS


def _pixels(images: list[Image.Image]) -> Tensor:
    return torch.stack([to_tensor(image.convert("RGB"), SIDE) for image in images])


def _network() -> nn.Sequential:
    """Return a network from (B, 3, 32, 32) to (B, 128), whose weights do not depend on other random numbers."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for into, out, kernel, stride in ((3, 16, 5, 2), (16, 32, 3, 1), (32, 64, 3, 1)):
            layers += [nn.Conv2d(into, out, kernel, stride, kernel // 2), nn.GroupNorm(8, out), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if stride == 1 else []
        layers += [nn.Flatten(), nn.Linear(64 * (SIDE // 8) ** 2, FEATURES)]
    return nn.Sequential(*layers)


def _train(network: nn.Module, pixels_NCSS: Tensor, device: torch.device | str, reporter: Reporter) -> None:
    """Train by cross entropy over the pictures, with a learning rate that falls by a cosine."""
    generator = torch.Generator().manual_seed(0)
    network.to(device).train()
    classes_ND = nn.Parameter(torch.randn(len(pixels_NCSS), FEATURES, generator=generator).to(device))
    optimizer = torch.optim.AdamW([*network.parameters(), classes_ND], lr=RATE, weight_decay=0.01)
    pixels_NCSS, size = pixels_NCSS.to(device), min(BATCH, len(pixels_NCSS))
    steps = max(LEAST_STEPS, EPOCHS * len(pixels_NCSS) // size)
    with reporter.progress(f"train a classifier of {len(pixels_NCSS):,} pictures, as a judge", steps) as advance:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
            rows_B = torch.randint(len(pixels_NCSS), (size,), generator=generator).to(device)
            features_BD = network(distorted(pixels_NCSS[rows_B], generator))
            logits_BN = F.normalize(features_BD, dim=1) @ F.normalize(classes_ND, dim=1).T / TEMPERATURE
            F.cross_entropy(logits_BN, rows_B).backward()
            optimizer.step()
            optimizer.zero_grad()
            advance(1)


def _cached(pixels_NCSS: Tensor) -> Path:
    """Return the file of the network for these pictures. Its name depends on everything that the network depends on."""
    settings = [VERSION, SIDE, FEATURES, EPOCHS, LEAST_STEPS, BATCH, RATE, TEMPERATURE]
    digest = hashlib.sha256(json.dumps(settings).encode() + pixels_NCSS.numpy().tobytes())
    return cache_folder() / "judges" / f"{digest.hexdigest()[:32]}.safetensors"
