"""The blocks of the denoiser and their parts: attention in three forms, SwiGLU, adaptive layer norm.

Three kinds of blocks, of which a `BlockShape` chooses one:
- `Block`: self-attention of image tokens, then cross-attention to the caption (2407.15811);
- `JointBlock`: one attention over caption and image tokens, whose streams have weights of their own (MM-DiT, 2403.03206);
- `TextBlock`: self-attention of caption tokens alone.

Notable:
- queries and keys are normalised, over all heads together without parameters, or in each head with a weight (RMSNorm);
- the attention of a block may be narrower than the model (layer-wise width scaling, 2407.15811 section 3);
- adaLN (Peebles & Xie 2023) modulates attention and feed-forward; blocks may share its matrix, or do without it;
- what lies between the matrix products is in `elementwise.py`.

Shape legend: B batch, T image tokens, L caption tokens, D dim, A attention width, N heads, H head dim, F feed-forward width.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microdit.models.elementwise import EAGER, NORM_EPS
from microdit.models.moe import ExpertChoice
from microdit.models.positions import Rotary

BlockKind = Literal["cross", "joint", "joint_last", "text"]
Conditioning = Literal["adaln", "shared", "none"]
Norm = Literal["layer", "rms"]
QKNorm = Literal["all_heads", "per_head"]


@dataclass(frozen=True)
class BlockShape:
    """The kind and the widths of one block.

    With `num_experts` 0 the feed-forward is dense, of hidden width `ffn_dim`: a SwiGLU if `gated`, else two matrices with a GELU. Otherwise
    each expert has the hidden width `ffn_dim` and a GELU. The caption's feed-forward in a joint block is always dense.

    A block of kind "joint_last" attends to the caption as "joint" does, and leaves it as it is: nothing behind it reads the caption.
    """

    attention_dim: int
    ffn_dim: int
    num_experts: int = 0
    gated: bool = True
    kind: BlockKind = "cross"


@dataclass(frozen=True)
class BlockStyle:
    """The settings that all blocks of a model share.

    `condition_dim` is the width of the vector that drives adaLN; it differs from a block's own in the patch-mixer. `attention_bias` gives
    attention layers biases even where `bias` is false.
    """

    head_dim: int
    condition_dim: int
    conditioning: Conditioning = "adaln"
    norm: Norm = "layer"
    qk_norm: QKNorm = "all_heads"
    bias: bool = False
    attention_bias: bool = False
    expert_capacity: float = 2.0

    @property
    def rms(self) -> bool:
        return self.norm == "rms"


class KeysValues(NamedTuple):
    """Normalised keys and values, each (B, N, L, H). Those of a caption are the same at every step of sampling."""

    k_BNLH: Tensor
    v_BNLH: Tensor


class Block(nn.Module):
    """Self-attention, cross-attention to the caption and a feed-forward (dense or experts), each added to the residual stream."""

    def __init__(self, shape: BlockShape, dim: int, style: BlockStyle):
        super().__init__()
        self.elementwise, self.rms = EAGER, style.rms
        self.attn_norm = make_norm(dim, style.norm)
        self.attn = SelfAttention(dim, shape.attention_dim, style)
        self.cross_norm = make_norm(dim, style.norm)
        self.cross_attn = CrossAttention(dim, style)
        self.ffn_norm = make_norm(dim, style.norm)
        self.ffn = _feed_forward(shape, dim, style)
        self.modulation = _modulation(6 * dim, style)

    def forward(
        self,
        x_BTD: Tensor,
        caption: Tensor | KeysValues,
        caption_mask_BL: Tensor | None,
        condition_BD: Tensor | None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Map (B, T, D) -> (B, T, D).

        `caption` is either its tokens (B, L, D) or this block's keys and values of them. `condition_BD` is, as `BlockStyle.conditioning`
        says, the activated sum of the noise embedding and the pooled caption, the same for all blocks, or its shared modulation, or None.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = _modulated(self.modulation, condition_BD, 6)
        ops, rms = self.elementwise, self.rms
        attended_BTD = self.attn(ops.modulated_norm(x_BTD, self.attn_norm.weight, shift_1, scale_1, rms), rotary=rotary)
        x_BTD, normed_BTD = ops.sum_norm(x_BTD, gate_1, attended_BTD, self.cross_norm.weight, None, None, rms)
        crossed_BTD = self.cross_attn(normed_BTD, caption, caption_mask_BL)
        x_BTD, normed_BTD = ops.sum_norm(x_BTD, None, crossed_BTD, self.ffn_norm.weight, shift_2, scale_2, rms)
        return ops.gated_sum(x_BTD, gate_2, self.ffn(normed_BTD))

    def init_weights(self, output_std: float) -> None:
        """Draw the weights. `output_std` is for those that write to the residual stream; adaLN starts at zero (adaLN-zero)."""
        self.attn.init_weights(output_std)
        self.cross_attn.init_weights(output_std)
        self.ffn.init_weights(output_std)
        _zero_modulation(self.modulation)


class JointBlock(nn.Module):
    """One attention over caption and image tokens, and a feed-forward for each stream, which have weights of their own (2403.03206)."""

    def __init__(self, shape: BlockShape, dim: int, style: BlockStyle):
        super().__init__()
        self.elementwise, self.rms = EAGER, style.rms
        self.updates_text = shape.kind == "joint"
        self.attn_norm = make_norm(dim, style.norm)
        self.text_attn_norm = make_norm(dim, style.norm)
        self.attn = JointAttention(dim, shape.attention_dim, style, self.updates_text)
        self.ffn_norm = make_norm(dim, style.norm)
        self.ffn = _feed_forward(shape, dim, style)
        self.modulation = _modulation(6 * dim, style)
        self.text_modulation = _modulation((6 if self.updates_text else 2) * dim, style)
        if self.updates_text:
            self.text_ffn_norm = make_norm(dim, style.norm)
            self.text_ffn = _dense(shape, dim, style)

    def forward(
        self,
        x_BTD: Tensor,
        text_BLD: Tensor,
        text_mask_BL: Tensor | None,
        condition_BD: Tensor | None,
        rotary: Rotary | None = None,
        text_rotary: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Map image tokens (B, T, D) and caption tokens (B, L, D) to the same shapes. No token attends to captions' masked tokens.

        `condition_BD` is as in `Block`; the shared modulation has the parts of the image stream first.
        """
        ops, rms = self.elementwise, self.rms
        mine_BD, texts_BD = _parted(self.modulation, condition_BD)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = _modulated(self.modulation, mine_BD, 6)
        text_shift_1, text_scale_1, *text_rest = _modulated(self.text_modulation, texts_BD, 6 if self.updates_text else 2)
        attended_BTD, text_attended_BLD = self.attn(
            ops.modulated_norm(x_BTD, self.attn_norm.weight, shift_1, scale_1, rms),
            ops.modulated_norm(text_BLD, self.text_attn_norm.weight, text_shift_1, text_scale_1, rms),
            text_mask_BL,
            rotary,
            text_rotary,
        )
        x_BTD, normed_BTD = ops.sum_norm(x_BTD, gate_1, attended_BTD, self.ffn_norm.weight, shift_2, scale_2, rms)
        x_BTD = ops.gated_sum(x_BTD, gate_2, self.ffn(normed_BTD))
        if self.updates_text:
            gate_1, shift_2, scale_2, gate_2 = text_rest
            text_BLD, normed_BLD = ops.sum_norm(text_BLD, gate_1, text_attended_BLD, self.text_ffn_norm.weight, shift_2, scale_2, rms)
            text_BLD = ops.gated_sum(text_BLD, gate_2, self.text_ffn(normed_BLD))
        return x_BTD, text_BLD

    def init_weights(self, output_std: float) -> None:
        """Draw the weights, as in `Block`, of both streams alike."""
        self.attn.init_weights(output_std)
        self.ffn.init_weights(output_std)
        _zero_modulation(self.modulation)
        _zero_modulation(self.text_modulation)
        if self.updates_text:
            self.text_ffn.init_weights(output_std)


class TextBlock(nn.Module):
    """Self-attention and a feed-forward on caption tokens. It knows nothing of image and noise, so sampling runs it once for all steps."""

    def __init__(self, shape: BlockShape, dim: int, style: BlockStyle):
        super().__init__()
        self.elementwise, self.rms = EAGER, style.rms
        self.attn_norm = make_norm(dim, style.norm)
        self.attn = SelfAttention(dim, shape.attention_dim, style)
        self.ffn_norm = make_norm(dim, style.norm)
        self.ffn = _dense(shape, dim, style)

    def forward(self, text_BLD: Tensor, mask_BL: Tensor | None, rotary: Rotary | None = None) -> Tensor:
        """Map (B, L, D) -> (B, L, D). No token attends to masked ones."""
        ops = self.elementwise
        attended_BLD = self.attn(ops.modulated_norm(text_BLD, self.attn_norm.weight, rms=self.rms), mask_BL, rotary)
        text_BLD, normed_BLD = ops.sum_norm(text_BLD, None, attended_BLD, self.ffn_norm.weight, rms=self.rms)
        return ops.gated_sum(text_BLD, None, self.ffn(normed_BLD))

    def init_weights(self, output_std: float) -> None:
        self.attn.init_weights(output_std)
        self.ffn.init_weights(output_std)


class Head(nn.Module):
    """The last layer: a norm, adaptive unless the model has no conditioning, then a linear map from tokens to patches.

    The map is initialised to zero. It has a modulation of its own also where blocks share theirs.
    """

    def __init__(self, dim: int, style: BlockStyle, patch_values: int):
        super().__init__()
        self.rms = style.rms
        self.norm = make_norm(dim, style.norm)
        self.modulation = None if style.conditioning == "none" else nn.Linear(style.condition_dim, 2 * dim)
        self.linear = nn.Linear(dim, patch_values)

    def forward(self, x_BTD: Tensor, condition_BD: Tensor | None) -> Tensor:
        """Map tokens (B, T, D) -> patches (B, T, P)."""
        shift, scale = _modulated(self.modulation, condition_BD, 2)
        return self.linear(EAGER.modulated_norm(x_BTD, self.norm.weight, shift, scale, self.rms))

    def init_weights(self) -> None:
        _zero_modulation(self.modulation)
        nn.init.zeros_(self.linear.weight)


class Offset(nn.Module):
    """A block's part of a shared modulation: a learnt offset (adaLN-single of PixArt-alpha, 2310.00426, section 2.3)."""

    def __init__(self, size: int):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(size))

    def forward(self, shared_BM: Tensor) -> Tensor:
        return shared_BM[:, : len(self.offset)] + self.offset


class SelfAttention(nn.Module):
    """Multi-head self-attention of width `attention_dim` on tokens of width `dim`."""

    def __init__(self, dim: int, attention_dim: int, style: BlockStyle):
        super().__init__()
        bias = style.bias or style.attention_bias
        self.qkv = nn.Linear(dim, 3 * attention_dim, bias=bias)
        self.out = nn.Linear(attention_dim, dim, bias=bias)
        self.heads = Heads(style)

    def forward(self, x_BTD: Tensor, key_mask_BT: Tensor | None = None, rotary: Rotary | None = None) -> Tensor:
        """Map (B, T, D) -> (B, T, D). No token attends to those where `key_mask_BT` is False."""
        q_BNTH, k_BNTH, v_BNTH = self.heads(self.qkv(x_BTD), "qkv", rotary)
        return self.out(_attend(q_BNTH, KeysValues(k_BNTH, v_BNTH), key_mask_BT))

    def init_weights(self, output_std: float) -> None:
        nn.init.trunc_normal_(self.qkv.weight, std=0.02)
        nn.init.trunc_normal_(self.out.weight, std=output_std)


class CrossAttention(nn.Module):
    """Multi-head attention from image tokens (queries) to caption tokens (keys and values), always as wide as the model."""

    def __init__(self, dim: int, style: BlockStyle):
        super().__init__()
        bias = style.bias or style.attention_bias
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.heads = Heads(style)

    def forward(self, x_BTD: Tensor, caption: Tensor | KeysValues, caption_mask_BL: Tensor | None = None) -> Tensor:
        """Map (B, T, D), (B, L, D) -> (B, T, D). `caption` is either the caption's tokens or their keys and values, computed before."""
        keys_values = self.keys_values(caption) if isinstance(caption, Tensor) else caption
        (q_BNTH,) = self.heads(self.q(x_BTD), "q")
        return self.out(_attend(q_BNTH, keys_values, caption_mask_BL))

    def keys_values(self, caption_BLD: Tensor) -> KeysValues:
        """Project caption tokens (B, L, D) to keys and values. Nothing in them depends on the image tokens."""
        return KeysValues(*self.heads(self.kv(caption_BLD), "kv"))

    def init_weights(self, output_std: float) -> None:
        nn.init.trunc_normal_(self.q.weight, std=0.02)
        nn.init.trunc_normal_(self.kv.weight, std=0.02)
        nn.init.trunc_normal_(self.out.weight, std=output_std)


class JointAttention(nn.Module):
    """Multi-head attention in which caption and image tokens are queries and keys together, with projections of their own.

    Without `updates_text` the caption's tokens are keys and values alone.
    """

    def __init__(self, dim: int, attention_dim: int, style: BlockStyle, updates_text: bool):
        super().__init__()
        self.updates_text, bias = updates_text, style.bias or style.attention_bias
        self.qkv = nn.Linear(dim, 3 * attention_dim, bias=bias)
        self.out = nn.Linear(attention_dim, dim, bias=bias)
        if updates_text:
            self.text_qkv = nn.Linear(dim, 3 * attention_dim, bias=bias)
            self.text_out = nn.Linear(attention_dim, dim, bias=bias)
        else:
            self.text_kv = nn.Linear(dim, 2 * attention_dim, bias=bias)
        self.heads = Heads(style)

    def forward(
        self, x_BTD: Tensor, text_BLD: Tensor, text_mask_BL: Tensor | None, rotary: Rotary | None, text_rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        """Map (B, T, D), (B, L, D) to the same shapes; the caption unchanged if it is not updated. Caption tokens come first."""
        T, L = x_BTD.shape[1], text_BLD.shape[1]
        q_BNTH, k_BNTH, v_BNTH = self.heads(self.qkv(x_BTD), "qkv", rotary)
        if self.updates_text:
            text_q_BNLH, text_k_BNLH, text_v_BNLH = self.heads(self.text_qkv(text_BLD), "qkv", text_rotary)
            q_BNTH = torch.cat([text_q_BNLH, q_BNTH], dim=2)
        else:
            text_k_BNLH, text_v_BNLH = self.heads(self.text_kv(text_BLD), "kv", text_rotary)
        keys_values = KeysValues(torch.cat([text_k_BNLH, k_BNTH], dim=2), torch.cat([text_v_BNLH, v_BNTH], dim=2))
        mask_BK = None if text_mask_BL is None else F.pad(text_mask_BL, (0, T), value=True)
        attended_BSA = _attend(q_BNTH, keys_values, mask_BK)
        if not self.updates_text:
            return self.out(attended_BSA), text_BLD
        text_BLA, image_BTA = attended_BSA.split([L, T], dim=1)
        return self.out(image_BTA), self.text_out(text_BLA)

    def init_weights(self, output_std: float) -> None:
        for inner in [self.qkv, self.text_qkv if self.updates_text else self.text_kv]:
            nn.init.trunc_normal_(inner.weight, std=0.02)
        for outer in [self.out, self.text_out] if self.updates_text else [self.out]:
            nn.init.trunc_normal_(outer.weight, std=output_std)


class Heads(nn.Module):
    """Splits projections into heads, and normalises and rotates queries and keys. Has weights if they are normalised per head."""

    def __init__(self, style: BlockStyle):
        super().__init__()
        self.elementwise, self.head_dim = EAGER, style.head_dim
        self.per_head = style.qk_norm == "per_head"
        if self.per_head:
            self.q_weight = nn.Parameter(torch.ones(style.head_dim))
            self.k_weight = nn.Parameter(torch.ones(style.head_dim))

    def forward(self, x_BTPA: Tensor, parts: Literal["qkv", "kv", "q"], rotary: Rotary | None = None) -> list[Tensor]:
        """Map (B, T, P * A) -> a tensor (B, N, T, H) for each of the `parts`, which lie side by side."""
        ops = self.elementwise
        if self.per_head:
            weights = {"q": self.q_weight, "k": self.k_weight}
            split = zip(parts, x_BTPA.chunk(len(parts), dim=-1), strict=True)
            heads = [ops.head_normalised(x, weights[part]) if part in weights else self._split(x) for part, x in split]
        else:
            normed = (ops.normalised(x_BTPA),) if parts == "q" else ops.split_normalised(x_BTPA, len(parts))
            heads = [self._split(x) for x in normed]
        if rotary is not None:
            heads = [x if part == "v" else ops.rotated(x, rotary.cos, rotary.sin) for part, x in zip(parts, heads, strict=True)]
        return [x_BTNH.transpose(1, 2) for x_BTNH in heads]

    def _split(self, x_BTA: Tensor) -> Tensor:
        return x_BTA.unflatten(-1, (-1, self.head_dim))


class SwiGLU(nn.Module):
    """The gated feed-forward down(silu(gate(x)) * up(x)) (Shazeer 2020, 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool):
        super().__init__()
        self.elementwise = EAGER
        self.gate = nn.Linear(dim, hidden_dim, bias=bias)
        self.up = nn.Linear(dim, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.elementwise.gated_silu(self.gate(x_BTD), self.up(x_BTD)))

    def init_weights(self, output_std: float) -> None:
        nn.init.trunc_normal_(self.gate.weight, std=0.02)
        nn.init.trunc_normal_(self.up.weight, std=output_std)
        nn.init.trunc_normal_(self.down.weight, std=output_std)


class GELU(nn.Module):
    """The feed-forward down(gelu(up(x))) without a gate, as a baseline for SwiGLU."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool):
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTD)))

    def init_weights(self, output_std: float) -> None:
        nn.init.trunc_normal_(self.up.weight, std=0.02)
        nn.init.trunc_normal_(self.down.weight, std=output_std)


class RMSNorm(nn.RMSNorm):
    """An RMS norm whose weight may have another dtype than its input, as a layer norm's may: PyTorch's own is slow there, and warns."""

    def forward(self, x: Tensor) -> Tensor:
        return EAGER.modulated_norm(x, self.weight, rms=True)


def make_norm(dim: int, norm: Norm) -> nn.LayerNorm | nn.RMSNorm:
    """Make a layer norm with a weight and no bias, as MicroDiT has everywhere, or an RMS norm."""
    return nn.LayerNorm(dim, eps=NORM_EPS, bias=False) if norm == "layer" else RMSNorm(dim, eps=NORM_EPS)


def make_block(shape: BlockShape, dim: int, style: BlockStyle) -> Block | JointBlock | TextBlock:
    """Make the block that a shape describes, on tokens of width `dim`."""
    kinds: dict[BlockKind, type[Block | JointBlock | TextBlock]] = {
        "cross": Block,
        "joint": JointBlock,
        "joint_last": JointBlock,
        "text": TextBlock,
    }
    return kinds[shape.kind](shape, dim, style)


def _feed_forward(shape: BlockShape, dim: int, style: BlockStyle) -> ExpertChoice | SwiGLU | GELU:
    if shape.num_experts:
        return ExpertChoice(dim, shape.ffn_dim, shape.num_experts, style.expert_capacity)
    return _dense(shape, dim, style)


def _dense(shape: BlockShape, dim: int, style: BlockStyle) -> SwiGLU | GELU:
    return (SwiGLU if shape.gated else GELU)(dim, shape.ffn_dim, style.bias)


def _modulation(size: int, style: BlockStyle) -> nn.Linear | Offset | None:
    if style.conditioning == "none":
        return None
    return Offset(size) if style.conditioning == "shared" else nn.Linear(style.condition_dim, size)


def _parted(modulation: nn.Module | None, condition_BD: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return what drives the image stream and the caption's: the halves of a shared modulation, else twice the condition."""
    if condition_BD is None or not isinstance(modulation, Offset):
        return condition_BD, condition_BD
    mine_BM, texts_BM = condition_BD.chunk(2, dim=-1)
    return mine_BM, texts_BM


def _modulated(modulation: nn.Module | None, condition_BD: Tensor | None, parts: int) -> tuple[Tensor | None, ...]:
    """Return shifts, scales and gates, (B, 1, D) each; None for each without conditioning."""
    if modulation is None:
        return (None,) * parts
    return cast(Tensor, modulation(condition_BD)).unsqueeze(1).chunk(parts, dim=-1)


def _zero_modulation(modulation: nn.Module | None) -> None:
    """Start with gates at zero (adaLN-zero)."""
    if isinstance(modulation, nn.Linear):
        nn.init.zeros_(modulation.weight)


def _attend(q_BNTH: Tensor, keys_values: KeysValues, key_mask_BL: Tensor | None) -> Tensor:
    """Compute scaled dot-product attention: queries (B, N, T, H) -> (B, T, A)."""
    mask_B11L = None if key_mask_BL is None else key_mask_BL[:, None, None, :]
    out_BNTH = F.scaled_dot_product_attention(q_BNTH, *keys_values, attn_mask=mask_B11L)
    return out_BNTH.transpose(1, 2).flatten(-2)
