"""The denoiser as a model of diffusers: `MicroDiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")`.

Its config.json holds the architecture fully resolved, block by block, and its weights are safetensors, nothing else.

Shape legend: B batch, C channels, H W height and width, L caption tokens, E caption channels.

The noise of EDM as a component of a pipeline of diffusers: settings alone, the sampler is `microdit.diffusion`'s.

Frozen encoders that a pipeline's folder names instead of holding: by the name that finds them, and the fingerprint of their weights.

MiniLM, which comes with a package and is larger than the models beside it; and encoders that lie on the hub.

What a pipeline's model_index.json may name. Diffusers would import whatever is written there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors import safe_open
from torch import Tensor

from microdit.checkpoint import config_of_fields
from microdit.diffusion.edm import EDM
from microdit.encoders.autoencoder import Autoencoder, DiffusersAutoencoder, load_autoencoder
from microdit.encoders.model_files import check_complete, loading, weight_files
from microdit.encoders.text import FrozenTextEncoder, TextEncoder, load_text_encoder
from microdit.errors import UserError
from microdit.models.microdit import MicroDiT, ModelConfig
from microdit.models.patches import unpatchify
from microdit.models.routing import Routing
from microdit.pipelines.native import unchanged


class MicroDiTTransformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """`denoiser` is the network itself. `sample_size` is the height and width of the latents that it was trained on.

    The other arguments are the fields of `ModelConfig`, with a dictionary for each block's shape.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        dim: int,
        head_dim: int,
        blocks: Sequence[Mapping[str, int]],
        mixer_dim: int,
        mixer: Sequence[Mapping[str, int]],
        caption_ffn_dim: int,
        decoder: Sequence[Mapping[str, int]] = (),
        routing: Routing = "deferred",
        dense_blocks: Sequence[int] = (0, 0),
        in_channels: int = 4,
        patch_size: int = 2,
        caption_channels: int = 1024,
        expert_capacity: float = 2.0,
        bias: bool = False,
        position_scale: float = 1.0,
        sample_size: Sequence[int] = (32, 32),
    ):
        """Raises TypeError or ValueError if these are no architecture."""
        super().__init__()
        fields = {key: value for key, value in self.config.items() if not key.startswith("_") and key != "sample_size"}
        self.denoiser = MicroDiT(config_of_fields(fields))

    @classmethod
    def around(cls, denoiser: MicroDiT, sample_size: tuple[int, int]) -> Self:
        """A network that is there already; it is not copied."""
        model = cls.of(denoiser.config, sample_size)
        model.denoiser = denoiser
        return model

    @classmethod
    def of(cls, config: ModelConfig, sample_size: tuple[int, int]) -> Self:
        """With fresh weights."""
        return cls(**asdict(config), sample_size=sample_size)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """As in diffusers, but only safetensors are read. Raises UserError for a damaged file, or weights of another architecture."""
        wants_info = kwargs.pop("output_loading_info", False)
        model: Any
        place = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        with loading(place):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True}, output_loading_info=True
            )
        strange = sorted([*info["missing_keys"], *info["unexpected_keys"]])
        if strange:  # diffusers would go on, with random weights for those that are missing
            raise UserError(
                f"{place} holds the weights of another architecture than its config.json says ({len(strange)} are missing or strange, "
                f"such as {strange[0]}): download it again, or export it anew."
            )
        return (model, info) if wants_info else model  # type: ignore[return-value]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The network F of EDM (2206.00364, eq. 7), (B, C, H, W), on all patches.

        `hidden_states` are the noisy latents (B, C, H, W) times c_in; `timestep` is c_noise, (B,); `encoder_hidden_states` are the
        caption's vectors, (B, L, E), with `encoder_attention_mask`, (B, L), true at real tokens.
        """
        caption = self.denoiser.embed_caption(encoder_hidden_states.to(self.dtype), encoder_attention_mask)
        patches_BTP = self.denoiser(hidden_states, timestep, caption)
        sample_BCHW = unpatchify(patches_BTP, self.config.patch_size, *hidden_states.shape[-2:])
        return Transformer2DModelOutput(sample=sample_BCHW) if return_dict else (sample_BCHW,)


class EDMSettings(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """The fields of `EDM` (2206.00364, table 1), saved as scheduler_config.json."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sigma_data: float = 0.9,
        P_mean: float = -0.6,
        P_std: float = 1.2,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
    ):
        self.edm = EDM(sigma_data, P_mean, P_std, sigma_min, sigma_max, rho)

    @classmethod
    def around(cls, edm: EDM) -> Self:
        return cls(**asdict(edm))


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


PIPELINE = "MicroDiTPipeline"
_TEXT_MODELS = ("BertModel", "CLIPTextModel", "MT5EncoderModel", "T5EncoderModel", "UMT5EncoderModel")
_COMPONENTS: dict[str, set[tuple[str, str]]] = {
    "transformer": {("microdit.pipelines.components", "MicroDiTTransformer2DModel")},
    "scheduler": {("microdit.pipelines.components", "EDMSettings")},
    "vae": {
        *(("diffusers", name) for name in ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")),
        ("microdit.pipelines.components", "ReferencedAutoencoder"),
    },
    "text_encoder": {*(("transformers", name) for name in _TEXT_MODELS), ("microdit.pipelines.components", "ReferencedTextEncoder")},
}


def refuse_strange_components(model_index: Mapping[str, Any], place: str) -> None:
    """Raises UserError if it is another pipeline's, or names classes that are no components of ours."""
    if model_index.get("_class_name") != PIPELINE:
        raise UserError(f"{place} holds a {model_index.get('_class_name')}, not a {PIPELINE}: load it with diffusers' own class.")
    for name, value in model_index.items():
        if isinstance(value, list | tuple) and not _is_component(name, value):
            raise UserError(f"{place} is refused: its model_index.json names {value} as its {name}, which is no component of {PIPELINE}.")


def refuse_incomplete_autoencoder(folder: Path, model: Any) -> None:
    """Raises UserError if the folder that `model` was loaded from lacks some of its weights: diffusers goes on with random ones."""
    found: set[str] = set()
    for path in weight_files(folder, "diffusion_pytorch_model", ".safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    check_complete(folder, [name for name in model.state_dict() if name not in found])


def _is_component(name: str, value: list[Any] | tuple[Any, ...]) -> bool:
    if len(value) != 2 or name.startswith("_"):
        return False
    library, class_name = value
    if library is None:
        return name not in ("transformer", "scheduler")
    if name == "tokenizer":
        return library == "transformers" and isinstance(class_name, str) and "Tokenizer" in class_name
    return (library, class_name) in _COMPONENTS.get(name, ())
