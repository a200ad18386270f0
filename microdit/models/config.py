"""Model sizes: the few numbers that people choose, the paper's named sizes, and how they become a whole architecture."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from microdit.errors import UserError
from microdit.models.blocks import BlockShape
from microdit.models.microdit import MicroDiT, ModelConfig
from microdit.models.routing import METHODS, Routing
from microdit.ranges import Range

Width = Annotated[int, Range(1, 32_768)]
Blocks = Annotated[int, Range(0, 256)]
Ratio = Annotated[float, Range(0, 64, above=True)]


@dataclass(frozen=True)
class Size:
    """The numbers that define a model. Ratios are relative to `dim` (to `mixer_dim` in the patch-mixer and the decoder)."""

    dim: Width
    depth: Annotated[int, Range(1, 256)]
    head_dim: Width
    mixer_dim: Width
    mixer_depth: Blocks
    attention_range: tuple[Ratio, Ratio] = (0.5, 1.0)  # layer-wise width scaling: ratio of the first block, ratio of the last
    ffn_range: tuple[Ratio, Ratio] = (0.5, 4.0)
    mixer_ffn_ratio: Ratio = 4.0
    num_experts: Annotated[int, Range(0, 1024)] = 8  # 0: no mixture of experts
    experts_every: Annotated[int, Range(1, 256)] = 2
    round_ffn_to: Width = 256
    gated_ffn: bool = True  # dense feed-forwards are SwiGLUs; False: two matrices with a GELU, at the same cost
    routing: Routing = "deferred"
    # tread, sprint: how many of the blocks are dense, before the drop and after the restore; null: as published
    dense_blocks: tuple[Blocks, Blocks] | None = None
    decoder_depth: Annotated[int, Range(1, 256)] | None = None  # maskdit: additional blocks, as wide as the mixer's; null: as published


SIZES = {
    "MicroDiT_Nano_2": Size(  # 2.0 M parameters: the recipe emoji-fast
        dim=128, depth=4, head_dim=32, mixer_dim=128, mixer_depth=1, num_experts=0, round_ffn_to=64, routing="none"
    ),
    "MicroDiT_Micro_2": Size(  # 8.3 M: emoji-long
        dim=192, depth=6, head_dim=32, mixer_dim=192, mixer_depth=2, num_experts=4, round_ffn_to=64
    ),
    "MicroDiT_Tiny_2": Size(dim=512, depth=16, head_dim=32, mixer_dim=512, mixer_depth=4),
    "MicroDiT_XL_2": Size(dim=1024, depth=28, head_dim=64, mixer_dim=768, mixer_depth=6),
}


def list_models() -> list[str]:
    """Return the names that `create_model` knows, from the smallest to the largest: two of the emoji recipes, and the paper's two.

    >>> list_models()
    ['MicroDiT_Nano_2', 'MicroDiT_Micro_2', 'MicroDiT_Tiny_2', 'MicroDiT_XL_2']
    """
    return list(SIZES)


def create_model(name: str, **settings: int | float | bool) -> MicroDiT:
    """Return a model of a named size with fresh weights, in float32. XL_2 has 1.16 billion of them, which take 4.6 GB.

    `settings` are further fields of `ModelConfig`, such as in_channels (of the latents) and caption_channels. Raises UserError for a
    name that `list_models` does not have.

    >>> model = create_model("MicroDiT_Nano_2", in_channels=8, caption_channels=384)
    >>> round(sum(weight.numel() for weight in model.parameters()) / 1e6, 1)
    2.0
    """
    if name not in SIZES:
        raise UserError(f"There is no model '{name}'. Known: {', '.join(SIZES)}.")
    return MicroDiT(resolve(SIZES[name], **settings))


def resolve(size: Size, **settings: int | float | bool) -> ModelConfig:
    """Return the whole architecture of `size`. `settings` are the remaining fields of `ModelConfig` (in_channels, patch_size, ...).

    Layer-wise width scaling (2407.15811, section 3): the ratios grow linearly from the first block to the last.
    """

    def with_experts(index: int, last: int) -> bool:
        return size.num_experts > 0 and index != last and (index + 1) % size.experts_every == 0

    attention_ratios = np.linspace(*size.attention_range, size.depth).tolist()
    ffn_ratios = np.linspace(*size.ffn_range, size.depth).tolist()
    blocks = tuple(_shape(size, size.dim, attention_ratios[i], ffn_ratios[i], with_experts(i, size.depth - 1)) for i in range(size.depth))
    # In the mixer the last block may have experts, but the first never does (which matters only with experts_every 1).
    mixer = tuple(_shape(size, size.mixer_dim, 1.0, size.mixer_ffn_ratio, i > 0 and with_experts(i, -1)) for i in range(size.mixer_depth))
    method = METHODS[size.routing]
    decoder_depth = method.decoder if size.decoder_depth is None else size.decoder_depth
    decoder = (_shape(size, size.mixer_dim, 1.0, size.mixer_ffn_ratio, experts=False),) * decoder_depth
    return ModelConfig(
        dim=size.dim,
        head_dim=size.head_dim,
        blocks=blocks,
        mixer_dim=size.mixer_dim,
        mixer=mixer,
        caption_ffn_dim=_round_up(2 * 4 * size.dim // 3, size.round_ffn_to),
        decoder=decoder,
        routing=size.routing,
        dense_blocks=method.dense_blocks if size.dense_blocks is None else tuple(size.dense_blocks),  # type: ignore[arg-type]
        **settings,  # type: ignore[arg-type]
    )


def _shape(size: Size, dim: int, attention_ratio: float, ffn_ratio: float, experts: bool) -> BlockShape:
    """Round the attention to pairs of heads. A SwiGLU has three matrices, so it gets two thirds of the hidden width, at equal cost."""
    gated = size.gated_ffn and not experts
    attention_dim = dim if attention_ratio == 1 else _round_up(max(1, int(dim * attention_ratio)), 2 * size.head_dim)
    hidden_dim = max(2, int(dim * ffn_ratio))
    ffn_dim = _round_up(int(2 * hidden_dim / 3) if gated else hidden_dim, size.round_ffn_to)
    return BlockShape(attention_dim, ffn_dim, size.num_experts if experts else 0, size.gated_ffn)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
