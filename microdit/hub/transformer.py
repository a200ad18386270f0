"""The denoiser as a model of diffusers: `MicroDiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")`.

Its config.json holds the architecture fully resolved, block by block, and its weights are safetensors, nothing else.

Shape legend: B batch, C channels, H W height and width, L caption tokens, E caption channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from microdit.checkpoint import config_of_fields
from microdit.encoders.model_files import loading
from microdit.errors import UserError
from microdit.model.microdit import MicroDiT, ModelConfig
from microdit.model.patches import unpatchify
from microdit.model.routing import Routing


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
