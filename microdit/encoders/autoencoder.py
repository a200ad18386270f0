"""Frozen autoencoders: pictures (B, 3, H, W) in [-1, 1] <-> scaled latents (B, C, H/f, W/f)."""

import hashlib
from pathlib import Path
from typing import Protocol

import torch
from diffusers import AutoencoderTiny
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from microdit.errors import UserError

diffusers_logging.set_verbosity_error()  # it warns of its own configuration keys

BUNDLED_ICON = Path(__file__).parent / "icon_autoencoder"


class Autoencoder(Protocol):
    """`name` finds it again through `load_autoencoder`; `fingerprint` tells whether its weights are the same."""

    name: str
    fingerprint: str

    def encode(self, images_BCHW: Tensor) -> Tensor: ...

    def decode(self, latents_BCHW: Tensor) -> Tensor: ...


def load_autoencoder(name: str) -> Autoencoder:
    """`pixels`, `icon` (bundled, 64 px -> 8 x 8 x 8), or a folder written by `microdit train-autoencoder`.

    Raises UserError where there is none.
    """
    if name == "pixels":
        return Pixels()
    return TinyAutoencoder(name, BUNDLED_ICON if name == "icon" else Path(name))


class Pixels:
    """No autoencoder: the latents are the pixels."""

    name = "pixels"
    fingerprint = "pixels"

    def encode(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW


class TinyAutoencoder:
    """A diffusers `AutoencoderTiny` in a folder; latents are multiplied by its `scaling_factor`."""

    def __init__(self, name: str, folder: Path):
        weights = folder / "diffusion_pytorch_model.safetensors"
        if not weights.is_file():
            raise UserError(f"There is no autoencoder in {folder} (no {weights.name}). Known names: icon, pixels; or train one.")
        self.name = name
        self.fingerprint = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
        self._model = AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
        self._model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self._scale = self._model.config.scaling_factor

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        return self._model.encode(images_BCHW).latents.contiguous() * self._scale

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return self._model.decode(latents_BCHW / self._scale).sample.contiguous()
