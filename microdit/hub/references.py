"""Frozen encoders that a pipeline's folder names instead of holding: by the name that finds them, and the fingerprint of their weights.

MiniLM, which comes with a package and is larger than the models beside it; and encoders that lie on the hub.
"""

from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from microdit.encoders.autoencoder import Autoencoder, DiffusersAutoencoder, load_autoencoder
from microdit.encoders.text import FrozenTextEncoder, TextEncoder, load_text_encoder
from microdit.pipeline import unchanged


class _Reference(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Saved as a config.json alone. `from_pretrained` opens what it names; made by hand, it opens that when it is first used.

    Without a fingerprint whatever has the name is taken.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, name: str, fingerprint: str | None = None):
        super().__init__()
        self._opened: Any = None
        self.register_buffer("nothing", torch.zeros(0), persistent=False)  # diffusers asks parts for their dtype, opened or not

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Raises UserError if what is named is not there, or has changed since."""
        config = cls.load_config(pretrained_model_name_or_path, subfolder=kwargs.get("subfolder"))
        reference = cls.from_config(config)
        reference._open()
        return reference.to(kwargs.get("torch_dtype") or kwargs.get("dtype") or torch.float32)

    def save_pretrained(self, save_directory: Any, **_: Any) -> None:
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.save_config(save_directory)

    def _open(self) -> Any:
        if self._opened is None:
            encoder = self._load(self.config.name)
            if self.config.fingerprint is not None:
                unchanged(encoder, {"fingerprint": self.config.fingerprint})
            if isinstance(encoder, FrozenTextEncoder):
                self.network = encoder.loaded.model  # a part of this module, so that it moves along
            elif isinstance(encoder, DiffusersAutoencoder):
                self.network = encoder.model
            self._opened = encoder
        return self._opened

    def _load(self, name: str) -> Any:
        raise NotImplementedError


class ReferencedTextEncoder(_Reference):
    """A text encoder with its tokenizer, by its name for `load_text_encoder`."""

    def _load(self, name: str) -> TextEncoder:
        return load_text_encoder(name)

    @property
    def encoder(self) -> TextEncoder:
        return self._open()


class ReferencedAutoencoder(_Reference):
    """An autoencoder, by its name for `load_autoencoder`."""

    def _load(self, name: str) -> Autoencoder:
        return load_autoencoder(name)

    @property
    def encoder(self) -> Autoencoder:
        return self._open()

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1]."""
        return self.encoder.decode(latents_BCHW)
