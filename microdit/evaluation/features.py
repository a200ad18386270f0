"""Networks that turn images into feature vectors for metrics, all with the interface `ImageFeatures`.

- EfficientNet-Lite0 comes with a PyPI package and works offline, but its metrics are comparable with no published figures.
- Inception is the network of FID and KID, as the TorchScript file inception-2015-12-05.pt used by StyleGAN and clean-fid.
- CLIP gives CMMD and the CLIP score; DINOv2 gives the Frechet distance of Stein et al. 2023 (arXiv 2306.04675).

Images are resized as in clean-fid (Parmar et al. 2022, arXiv 2104.11222): Pillow's antialiased bicubic filter per channel in float, without
rounding afterwards. Images that are not square are squeezed, not cropped. EfficientNet alone sees a centre crop of 8-bit pixels.

Shape legend: N images, B images of a batch, C channels, H W height and width, D features.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from microdit.data.pixels import to_tensor
from microdit.encoders.model_files import fingerprint_of, lasting_name, load_network, loading
from microdit.encoders.vision import IMAGENET_NORMALISATION, efficientnet_file, load_efficientnet, normalise_for_imagenet
from microdit.errors import UserError
from microdit.io.files import sha256_of

BATCH = 32
EFFICIENTNET_SIDE = 224
INCEPTION_SIDE = 299
DINO_SIDE = 224  # as in papers, although DINOv2 was also trained on larger images

_CLIP_NORMALISATION = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # mean, standard deviation


class ImageFeatures(Protocol):
    """A feature network. `fingerprint` identifies its weights, `resize` how images are resized for it; both are part of cache keys."""

    name: str
    fingerprint: str
    resize: str

    def __call__(self, images: list[Image.Image]) -> Tensor:
        """Return features (N, D), float32 on the CPU, of RGB images of any size."""
        ...


class EfficientNetFeatures:
    """1,280 pooled features of EfficientNet-Lite0 with ImageNet weights, from centre crops resized to 224 x 224."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._model = load_efficientnet(device)
        self.name, self.resize = "efficientnet-lite0", "Pillow bicubic, 8 bits, middle, 224"
        self.fingerprint = fingerprint_of([efficientnet_file()])
        self._device = device

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> Tensor:
        features = []
        for start in range(0, len(images), BATCH):
            pixels_BCHW = torch.stack([to_tensor(image, EFFICIENTNET_SIDE) for image in images[start : start + BATCH]])
            normalised_BCHW = normalise_for_imagenet(pixels_BCHW)
            maps_BDHW = self._model.extract_features(normalised_BCHW.to(self._device, memory_format=torch.channels_last))
            features.append(F.adaptive_avg_pool2d(maps_BDHW, 1).flatten(1).cpu())
        return torch.cat(features)


class PixelFeatures:
    """The pixels themselves, resized to 32 x 32, as their difference from white: the plainest judge, which has learnt nothing."""

    name, fingerprint, resize = "pixels", "pixels", "Pillow bicubic, 8 bits, middle, 32"

    def __call__(self, images: list[Image.Image]) -> Tensor:
        return torch.stack([1 - to_tensor(image, 32) for image in images]).flatten(1)


class InceptionFeatures:
    """2,048 pooled features of the Inception network that defines FID, from a TorchScript file."""

    def __init__(self, path: Path, sha256: str | None = None, device: torch.device | str = "cpu"):
        """Load the file, after checking it against `sha256` if given. Raises UserError if it is missing, differs, or is another network."""
        if not path.is_file():
            raise UserError(f"There is no Inception network at {path}: download inception-2015-12-05.pt, the TorchScript file of StyleGAN.")
        if sha256 is not None and sha256_of(path) != sha256.lower():
            raise UserError(f"{path} has the SHA-256 {sha256_of(path)}, not {sha256}: download it again.")
        with loading(path):  # TorchScript runs in its own interpreter and cannot execute Python
            network = torch.jit.load(path, map_location=device).eval()
        if not hasattr(network, "layers"):
            raise UserError(f"{path} is not the Inception network of FID: it has no part named layers. Download inception-2015-12-05.pt.")
        self.name, self.resize = "inception-2015-12-05", _resize_name(INCEPTION_SIDE)
        self.fingerprint = fingerprint_of([path])
        self._layers, self._device = network.layers, device

    def __call__(self, images: list[Image.Image]) -> Tensor:
        return _in_batches(images, INCEPTION_SIDE, self._embed)

    def _embed(self, bytes_BCHW: Tensor) -> Tensor:
        """Skip the network's own resizing, as clean-fid does."""
        return self._layers((bytes_BCHW.to(self._device) - 128) / 128).flatten(1)


class ClipFeatures:
    """Projected image embeddings of a CLIP from transformers (512 for ViT-B, 768 for ViT-L), not normalised."""

    def __init__(self, place: str, device: torch.device | str = "cpu"):
        """Load from `place`, a folder or hub id. CMMD uses openai/clip-vit-large-patch14-336. Raises UserError if that fails."""
        from transformers import CLIPVisionModelWithProjection  # slow to import

        self._model, _, self.fingerprint = load_network(place, ("clip", "clip_vision_model"), CLIPVisionModelWithProjection)
        self._model.to(device)
        self._side = int(self._model.config.image_size)
        self.name, self.resize = lasting_name(place), _resize_name(self._side)

    def __call__(self, images: list[Image.Image]) -> Tensor:
        return _in_batches(images, self._side, self._embed)

    def _embed(self, bytes_BCHW: Tensor) -> Tensor:
        return self._model(pixel_values=_normalised(bytes_BCHW, *_CLIP_NORMALISATION).to(self._model.device)).image_embeds


class DinoFeatures:
    """The class token of a DINOv2 from transformers after its last norm (768 for ViT-B, 1,024 for ViT-L)."""

    def __init__(self, place: str, device: torch.device | str = "cpu"):
        """Load from `place`, a folder or hub id. Stein et al. use facebook/dinov2-large. Raises UserError if that fails."""
        from transformers import Dinov2Model  # slow to import

        self._model, _, self.fingerprint = load_network(place, ("dinov2",), Dinov2Model)
        self._model.to(device)
        self.name, self.resize = lasting_name(place), _resize_name(DINO_SIDE)

    def __call__(self, images: list[Image.Image]) -> Tensor:
        return _in_batches(images, DINO_SIDE, self._embed)

    def _embed(self, bytes_BCHW: Tensor) -> Tensor:
        return self._model(pixel_values=_normalised(bytes_BCHW, *IMAGENET_NORMALISATION).to(self._model.device)).pooler_output


def resize_cleanly(image: Image.Image, side: int) -> Tensor:
    """Resize to (3, side, side), float32 in [0, 255], without rounding."""
    channels = [
        np.asarray(Image.fromarray(np.asarray(channel, dtype=np.float32)).resize((side, side), Image.Resampling.BICUBIC))
        for channel in image.convert("RGB").split()
    ]
    return torch.from_numpy(np.stack(channels)).clamp(0, 255)


@torch.no_grad()
def _in_batches(images: list[Image.Image], side: int, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `embed`, which takes (B, 3, side, side) in [0, 255], to all images. Raises UserError if there are none."""
    if not images:
        raise UserError("There are no images to compute features of.")
    batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    return torch.cat([embed(torch.stack([resize_cleanly(image, side) for image in batch])).float().cpu() for batch in batches])


def _normalised(bytes_BCHW: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    return (bytes_BCHW / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)


def _resize_name(side: int) -> str:
    return f"Pillow bicubic, float, whole, {side}"


def load_beside(folder: Path, name: str, auto_class: Any) -> Any:
    """Load a tokenizer or image processor from a network's folder. The file `name` must exist: without it transformers may invent one."""
    if not (folder / name).is_file():
        raise UserError(f"{folder} has no {name}: copy it there from the model's source.")
    with loading(folder / name):
        return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
