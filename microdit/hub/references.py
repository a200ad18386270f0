"""Frozen encoders that a pipeline's folder names instead of holding: by the name that finds them, and the fingerprint of their weights.

MiniLM, which comes with a package and is larger than the models beside it; and encoders that lie on the hub.
"""

from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from microdit.encoders.autoencoder import Autoencoder, load_autoencoder
from microdit.encoders.text import FrozenTextEncoder, TextEncoder, load_text_encoder
from microdit.pipeline import unchanged


class _Reference(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Saved as a config.json alone; loaded by loading what it names."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Raises UserError if what is named is not there, or has changed since."""
        config = cls.load_config(pretrained_model_name_or_path, subfolder=kwargs.get("subfolder"))
        return cls.from_config(config).to(kwargs.get("torch_dtype") or kwargs.get("dtype") or torch.float32)

    def save_pretrained(self, save_directory: Any, **_: Any) -> None:
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.save_config(save_directory)


class ReferencedTextEncoder(_Reference):
    """A text encoder by its name for `load_text_encoder`; its tokenizer comes with it. Without a fingerprint whatever has the name is taken."""

    @register_to_config
    def __init__(self, name: str, fingerprint: str | None = None):
        super().__init__()
        self.encoder: TextEncoder = load_text_encoder(name)
        if fingerprint is not None:
            unchanged(self.encoder, {"fingerprint": fingerprint})
        self.weights = _network(self.encoder)


class ReferencedAutoencoder(_Reference):
    """An autoencoder by its name for `load_autoencoder`. Without a fingerprint whatever has the name is taken."""

    @register_to_config
    def __init__(self, name: str, fingerprint: str | None = None):
        super().__init__()
        self.encoder: Autoencoder = load_autoencoder(name)
        if fingerprint is not None:
            unchanged(self.encoder, {"fingerprint": fingerprint})
        self.weights = _network(self.encoder)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1]."""
        return self.encoder.decode(latents_BCHW)


def _network(encoder: TextEncoder | Autoencoder) -> nn.Module | None:
    """Registered as a part, so that it moves with the pipeline."""
    if isinstance(encoder, FrozenTextEncoder):
        return encoder.loaded.model
    return getattr(encoder, "model", None)
