"""Model sizes: the few numbers that people choose, the paper's named sizes, and how they become a whole architecture."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np

from microdit.errors import UserError
from microdit.models.blocks import BlockKind, BlockShape, Conditioning, Norm, QKNorm
from microdit.models.caption import CaptionEmbedding
from microdit.models.microdit import MicroDiT, ModelConfig, Positions
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
    # how image tokens see the caption: cross-attention, or joint attention over both streams, which have weights of their own (2403.03206)
    attention: Literal["cross", "joint"] = "cross"
    # how blocks know of noise level and pooled caption: adaLN, adaLN with one matrix for all blocks and a learnt offset for each
    # (2310.00426, section 2.3), or not at all, which suits a network that predicts images (2511.13720)
    conditioning: Conditioning = "adaln"
    # of tokens: sine-cosine tables that are added, rotary angles in attention (of image tokens by row and column, of the caption's in
    # joint attention and in blocks of the caption alone), or both
    positions: Positions = "sincos"
    norm: Norm = "layer"  # layer norm, or RMS norm (1910.07467); both with a weight and without a bias
    qk_norm: QKNorm = "all_heads"  # of queries and keys: a layer norm over all heads together, or an RMS norm with a weight in each head
    attention_bias: bool = False  # biases in attention layers even where model.bias is false
    patch_channels: Width | None = None  # patches pass a bottleneck of so many channels, for large patches of pixels; null: none
    # from the text encoder's vectors to caption tokens: an MLP and a self-attention block, or a single matrix
    caption_embedding: CaptionEmbedding = "block"
    # tokens that captions are cut or filled up to, a learnt mask token taking the place of padding and of dropped captions; null: padding
    # is masked, and dropped captions are zeros
    caption_length: Annotated[int, Range(1, 4096)] | None = None
    preamble_depth: Blocks = 0  # blocks of the caption alone, in front of all others
    unread_text: bool = False  # joint attention: the last block updates the caption's tokens too, though nothing reads them, as in MiniT2I


def _mmjit(dim: int, depth: int, head_dim: int, ffn_ratio: float) -> Size:
    """Return a size of MiniT2I's network, for patches of 16 x 16 pixels and captions of FLAN-T5-large."""
    return Size(
        dim,
        depth,
        head_dim,
        mixer_dim=dim,
        mixer_depth=0,
        attention_range=(1.0, 1.0),
        ffn_range=(ffn_ratio, ffn_ratio),
        num_experts=0,
        round_ffn_to=8,
        routing="none",
        attention="joint",
        conditioning="none",
        positions="both",
        norm="rms",
        qk_norm="per_head",
        attention_bias=True,
        patch_channels=128,
        caption_embedding="linear",
        caption_length=256,
        preamble_depth=2,
        unread_text=True,
    )


SIZES = {
    "MicroDiT_Nano_2": Size(  # 2.0 M parameters: the recipe emoji-fast
        dim=128, depth=4, head_dim=32, mixer_dim=128, mixer_depth=1, num_experts=0, round_ffn_to=64, routing="none"
    ),
    "MicroDiT_Micro_2": Size(  # 8.3 M: emoji-long
        dim=192, depth=6, head_dim=32, mixer_dim=192, mixer_depth=2, num_experts=4, round_ffn_to=64
    ),
    "MicroDiT_Tiny_2": Size(dim=512, depth=16, head_dim=32, mixer_dim=512, mixer_depth=4),
    "MMJiT_B": _mmjit(768, 17, 64, 4.0),  # MiniT2I-B/16: 257 M
    "MMJiT_L": _mmjit(1248, 23, 52, 4.05),  # MiniT2I-L/16: 909 M
    "MicroDiT_XL_2": Size(dim=1024, depth=28, head_dim=64, mixer_dim=768, mixer_depth=6),
}


def list_models() -> list[str]:
    """Return the names that `create_model` knows, from the smallest to the largest: two of the emoji recipes, the paper's and MiniT2I's.

    >>> list_models()
    ['MicroDiT_Nano_2', 'MicroDiT_Micro_2', 'MicroDiT_Tiny_2', 'MMJiT_B', 'MMJiT_L', 'MicroDiT_XL_2']
    """
    return list(SIZES)


def create_model(name: str, **settings: int | float | bool) -> MicroDiT:
    """Return a model of a named size with fresh weights, in float32. XL_2 has 1.16 billion of them, which take 4.6 GB.

    `settings` are further fields of `ModelConfig`, such as in_channels (of the latents) and caption_channels; MiniT2I's models have 3
    channels and a patch_size of 16. Raises UserError for a name that `list_models` does not have.

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
    text = _shape(size, size.dim, 1.0, size.ffn_range[1], experts=False, kind="text")
    return ModelConfig(
        dim=size.dim,
        head_dim=size.head_dim,
        blocks=blocks if decoder or size.unread_text else _without_text_at_last(blocks),
        mixer_dim=size.mixer_dim,
        mixer=mixer,
        caption_ffn_dim=_round_up(2 * 4 * size.dim // 3, size.round_ffn_to) if size.caption_embedding == "block" else 0,
        decoder=decoder if size.unread_text else _without_text_at_last(decoder),
        routing=size.routing,
        dense_blocks=method.dense_blocks if size.dense_blocks is None else tuple(size.dense_blocks),  # type: ignore[arg-type]
        conditioning=size.conditioning,
        positions=size.positions,
        norm=size.norm,
        qk_norm=size.qk_norm,
        attention_bias=size.attention_bias,
        patch_channels=size.patch_channels,
        caption_embedding=size.caption_embedding,
        caption_length=size.caption_length,
        preamble=(text,) * size.preamble_depth,
        **settings,  # type: ignore[arg-type]
    )


def _shape(size: Size, dim: int, attention_ratio: float, ffn_ratio: float, experts: bool, kind: BlockKind | None = None) -> BlockShape:
    """Round the attention to pairs of heads. A SwiGLU has three matrices, so it gets two thirds of the hidden width, at equal cost."""
    gated = size.gated_ffn and not experts
    attention_dim = dim if attention_ratio == 1 else _round_up(max(1, int(dim * attention_ratio)), 2 * size.head_dim)
    hidden_dim = max(2, int(dim * ffn_ratio))
    ffn_dim = _round_up(int(2 * hidden_dim / 3) if gated else hidden_dim, size.round_ffn_to)
    return BlockShape(attention_dim, ffn_dim, size.num_experts if experts else 0, size.gated_ffn, kind or size.attention)


def _without_text_at_last(shapes: tuple[BlockShape, ...]) -> tuple[BlockShape, ...]:
    """Return the blocks at the end of a network, of which the last, if it is joint, leaves the caption as it is: nothing reads it."""
    if not shapes or shapes[-1].kind != "joint":
        return shapes
    return (*shapes[:-1], replace(shapes[-1], kind="joint_last"))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
