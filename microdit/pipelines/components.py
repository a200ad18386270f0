"""Components of a pipeline folder: the denoiser, its objective's noise settings, and encoders that the folder names, not holds.

`MicroDiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")` loads the denoiser alone. Its config.json holds the
architecture block by block, and its weights are safetensors.

A folder's model_index.json may name these classes and a few of diffusers and transformers, no others: diffusers would import whatever is
written there.

Shape legend: B batch, C channels, H W height and width, L caption tokens, E caption channels.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors import safe_open
from torch import Tensor

from microdit.checkpoint import config_of_fields
from microdit.diffusion.edm import EDM
from microdit.diffusion.flow import Flow, FlowPrediction
from microdit.diffusion.objective import Objective
from microdit.encoders.autoencoder import Autoencoder, DiffusersAutoencoder, is_autoencoder, load_autoencoder
from microdit.encoders.language_models import LanguageModel
from microdit.encoders.model_files import check_complete, loading
from microdit.encoders.text import FrozenTextEncoder, TextEncoder, load_text_encoder
from microdit.errors import UserError
from microdit.models.blocks import Conditioning, Norm, QKNorm
from microdit.models.caption import CaptionEmbedding
from microdit.models.microdit import MicroDiT, Positions
from microdit.models.patches import unpatchify
from microdit.models.routing import Routing
from microdit.pipelines.sampling import autocast_like

E = TypeVar("E", Autoencoder, TextEncoder)


class MicroDiTTransformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The denoiser as a model of diffusers; `denoiser` is the network itself.

    `sample_size` is the height and width of the latents that it was trained on. The other arguments are the fields of `ModelConfig`, with
    a dictionary for each block's shape.
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
        conditioning: Conditioning = "adaln",
        positions: Positions = "sincos",
        norm: Norm = "layer",
        qk_norm: QKNorm = "all_heads",
        attention_bias: bool = False,
        patch_channels: int | None = None,
        caption_embedding: CaptionEmbedding = "block",
        caption_length: int | None = None,
        preamble: Sequence[Mapping[str, int]] = (),
        sample_size: Sequence[int] = (32, 32),
    ):
        """Build the denoiser. Raises TypeError or ValueError if the arguments are not a valid architecture."""
        super().__init__()
        fields = {key: value for key, value in self.config.items() if not key.startswith("_") and key != "sample_size"}
        self.denoiser = MicroDiT(config_of_fields(fields))

    @classmethod
    def around(cls, denoiser: MicroDiT, sample_size: tuple[int, int]) -> Self:
        """Wrap a network, which is not copied."""
        with torch.device("meta"):  # the fresh weights are thrown away
            model = cls(**asdict(denoiser.config), sample_size=sample_size)
        model.denoiser = denoiser
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load as diffusers does, but from safetensors alone. Raises UserError for a damaged file, or weights of another architecture."""
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

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that matrix products are computed in; the weights of norms and the residual stream may be float32 beside it."""
        return self.denoiser.head.linear.weight.dtype

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Compute the network F of `Objective.preconditioning`, (B, C, H, W), on all patches.

        `hidden_states` are the noisy latents (B, C, H, W) times c_in; `timestep` is c_noise, (B,); `encoder_hidden_states` are the
        caption's vectors, (B, L, E), with `encoder_attention_mask`, (B, L), true at real tokens.
        """
        with autocast_like(self.denoiser):
            caption = self.denoiser.embed_caption(encoder_hidden_states.to(self.dtype), encoder_attention_mask)
            patches_BTP = self.denoiser(hidden_states, timestep, caption)
        sample_BCHW = unpatchify(patches_BTP, self.config.patch_size, *hidden_states.shape[-2:])
        return Transformer2DModelOutput(sample=sample_BCHW) if return_dict else (sample_BCHW,)


class NoiseSettings(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """The fields of an objective, saved as scheduler_config.json. The solver is a setting of each call."""

    objective: Objective
    kind: type[Any]

    @classmethod
    def from_config(cls, config: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Load from settings. Raises UserError for those of another scheduler, of which diffusers would accept the keys it knows."""
        strange = [name for name in config if not name.startswith("_") and name not in asdict(cls.kind())]
        if strange or config.get("_class_name", cls.__name__) != cls.__name__:
            raise UserError(_foreign_scheduler(config.get("_class_name", "another scheduler's settings")))
        return super().from_config(config, return_unused_kwargs, **kwargs)


class EDMSettings(NoiseSettings):
    """The fields of `EDM` (2206.00364, table 1)."""

    kind = EDM

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sigma_data: float = 0.9,
        P_mean: float = -0.6,
        P_std: float = 1.2,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        student_steps: int = 0,
        teacher_steps: int = 0,
    ):
        self.objective = EDM(sigma_data, P_mean, P_std, sigma_min, sigma_max, rho, student_steps, teacher_steps)


class FlowSettings(NoiseSettings):
    """The fields of `Flow`."""

    kind = Flow

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        prediction: FlowPrediction = "velocity",
        t_mean: float = 0.0,
        t_std: float = 1.0,
        shift: float = 1.0,
        noise_scale: float = 1.0,
        training_floor: float = 0.01,
        sampling_floor: float = 0.05,
        sigma_min: float = 0.0,
        sigma_max: float = 1.0,
        student_steps: int = 0,
        teacher_steps: int = 0,
    ):
        noise = t_mean, t_std, shift, noise_scale, training_floor, sampling_floor, sigma_min, sigma_max
        self.objective = Flow(prediction, *noise, student_steps, teacher_steps)


def noise_settings_of(objective: Objective) -> NoiseSettings:
    """Return an objective as the scheduler of a pipeline."""
    if isinstance(objective, EDM):
        return EDMSettings(**asdict(objective))
    assert isinstance(objective, Flow)
    return FlowSettings(**asdict(objective))


def check_scheduler(scheduler: object) -> None:
    """Raise UserError unless `scheduler` is an `EDMSettings` or a `FlowSettings`."""
    if not isinstance(scheduler, NoiseSettings):
        raise UserError(_foreign_scheduler(type(scheduler).__name__))


def _foreign_scheduler(name: str) -> str:
    return (
        f"A {PIPELINE} cannot sample with {name}: its scheduler is EDMSettings or FlowSettings, the noise settings that the model was "
        'trained with. Leave the scheduler as it is, and choose solver="heun", "dpm" or "euler" when you draw.'
    )


class _Reference(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A frozen encoder that is saved as its name and the fingerprint of its weights, in a config.json.

    `from_pretrained` loads the encoder at once; one that is made by hand loads it when it is first used. Without a fingerprint, any
    weights of that name are accepted.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, name: str, fingerprint: str | None = None):
        super().__init__()
        self._opened: Any = None
        self.register_buffer("nothing", torch.zeros(0), persistent=False)  # diffusers asks parts for their dtype, opened or not

    @classmethod
    def around(cls, encoder: Any) -> Self:
        """Refer to an encoder that is loaded already."""
        reference = cls(encoder.name, encoder.fingerprint)
        reference._hold(encoder)
        return reference

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load the encoder. Raises UserError if it is missing or has other weights than recorded."""
        config = cls.load_config(pretrained_model_name_or_path, subfolder=kwargs.get("subfolder"))
        if not isinstance(config, dict) or not isinstance(config.get("name"), str):  # diffusers would look for anything else on the hub
            place = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            raise UserError(f"The configuration in {place} names no encoder: export or download it again.")
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
                check_unchanged(encoder, self.config.fingerprint)
            self._hold(encoder)
        return self._opened

    def _hold(self, encoder: Any) -> None:
        if isinstance(encoder, FrozenTextEncoder):
            self.network = encoder.loaded.model  # a part of this module, so that it moves along
        elif isinstance(encoder, DiffusersAutoencoder | LanguageModel):
            self.network = encoder.model
        self._opened = encoder

    def _load(self, name: str) -> Any:
        raise NotImplementedError


class ReferencedTextEncoder(_Reference):
    """A text encoder with its tokenizer, named as `load_text_encoder` takes it: MiniLM, which comes with a package, or one on the hub."""

    def _load(self, name: str) -> TextEncoder:
        return load_text_encoder(name)

    @property
    def encoder(self) -> TextEncoder:
        return self._open()


class ReferencedAutoencoder(_Reference):
    """An autoencoder, named as `load_autoencoder` takes it."""

    def _load(self, name: str) -> Autoencoder:
        return load_autoencoder(name)

    @property
    def encoder(self) -> Autoencoder:
        return self._open()


PIPELINE = "MicroDiTPipeline"
_TEXT_MODELS = ("BertModel", "CLIPTextModel", "MT5EncoderModel", "T5EncoderModel", "UMT5EncoderModel")
_OURS = "microdit.pipelines.components"
_MODULES_BEFORE = ("microdit.hub.transformer", "microdit.hub.scheduler", "microdit.hub.references")  # of folders exported by version 0
_COMPONENTS: dict[str, set[tuple[str, str]]] = {
    "transformer": {(_OURS, "MicroDiTTransformer2DModel")},
    "scheduler": {(_OURS, "EDMSettings"), (_OURS, "FlowSettings")},
    "vae": {(_OURS, "ReferencedAutoencoder")},  # and the autoencoders of diffusers
    "text_encoder": {*(("transformers", name) for name in _TEXT_MODELS), (_OURS, "ReferencedTextEncoder")},
}


def checked_components(model_index: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the content of a model_index.json with the names that our classes have today.

    Raises UserError if it is another pipeline's, or names classes that are no components of ours.
    """
    if model_index.get("_class_name") != PIPELINE:
        raise UserError(f"{place} holds a {model_index.get('_class_name')}, not a {PIPELINE}: load it with diffusers' own class.")
    renamed = {name: _renamed(value) for name, value in model_index.items()}
    for name, value in renamed.items():
        if isinstance(value, list) and not _is_component(name, value):
            if name == "scheduler":
                raise UserError(f"{place} is refused. {_foreign_scheduler(str(value[-1]))}")
            raise UserError(f"{place} is refused: its model_index.json names {value} as its {name}, which is no component of {PIPELINE}.")
    return renamed


def _renamed(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    return [_OURS if part in _MODULES_BEFORE else part for part in value]


def check_unchanged(encoder: E, fingerprint: str) -> E:
    """Return `encoder`. Raises UserError if its weights are not those with this fingerprint."""
    if encoder.fingerprint != fingerprint:
        raise UserError(
            f"The encoder '{encoder.name}' is not the one that the data was encoded with "
            f"(fingerprint {encoder.fingerprint}, not {fingerprint}): encode and train again, or bring back the old one."
        )
    return encoder


def check_autoencoder_is_whole(folder: Path, model: Any, variant: str | None = None) -> None:
    """Raise UserError if the folder that `model` was loaded from lacks some weights, which diffusers would initialise at random."""
    files = _autoencoder_files(folder, f".{variant}") if variant else []
    found: set[str] = set()
    for path in files or _autoencoder_files(folder, ""):  # a component without the variant is loaded without it
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    check_complete(folder, [name for name in model.state_dict() if name not in found])


def _autoencoder_files(folder: Path, variant: str) -> list[Path]:
    """One file, or the parts of one that is too large."""
    stem = f"diffusion_pytorch_model{variant}"
    return [path for path in folder.glob(f"{stem}*.safetensors") if re.fullmatch(rf"{re.escape(stem)}(-\d+-of-\d+)?", path.stem)]


def _is_component(name: str, value: list[Any] | tuple[Any, ...]) -> bool:
    if len(value) != 2 or name.startswith("_"):
        return False
    library, class_name = value
    if library is None:
        return name not in ("transformer", "scheduler")
    if name == "tokenizer":
        return library == "transformers" and isinstance(class_name, str) and "Tokenizer" in class_name
    if name == "vae" and library == "diffusers":
        return is_autoencoder(class_name)
    return (library, class_name) in _COMPONENTS.get(name, ())
