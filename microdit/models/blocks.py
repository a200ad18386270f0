"""The parts of a MicroDiT block: attention, cross-attention, SwiGLU, adaptive layer norm.

Notable:
- queries and keys are layer-normalised over all heads together, without parameters;
- the attention of a block may be narrower than the model (layer-wise width scaling, 2407.15811 section 3);
- adaLN (Peebles & Xie 2023) modulates self-attention and feed-forward, while the caption's tokens enter by cross-attention;
- what lies between the matrix products is in `elementwise.py`.

Shape legend: B batch, T tokens, L caption tokens, D dim, A attention width, N heads, H head dim, F feed-forward width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from microdit.models.elementwise import EAGER, NORM_EPS
from microdit.models.moe import ExpertChoice


@dataclass(frozen=True)
class BlockShape:
    """The widths of one block.

    With `num_experts` 0 the feed-forward is dense, of hidden width `ffn_dim`: a SwiGLU if `gated`, else two matrices with a GELU. Otherwise
    each expert has the hidden width `ffn_dim` and a GELU.
    """

    attention_dim: int
    ffn_dim: int
    num_experts: int = 0
    gated: bool = True


class KeysValues(NamedTuple):
    """Normalised keys and values, each (B, N, L, H). Those of a caption are the same at every step of sampling."""

    k_BNLH: Tensor
    v_BNLH: Tensor


class Block(nn.Module):
    """Self-attention, cross-attention to the caption and a feed-forward (dense or experts), each added to the residual stream.

    `condition_dim` is the width of the vector that drives adaLN; it differs from `dim` in the patch-mixer.
    """

    def __init__(self, shape: BlockShape, dim: int, condition_dim: int, head_dim: int, bias: bool, expert_capacity: float):
        super().__init__()
        self.elementwise = EAGER
        self.attn_norm = layer_norm(dim)
        self.attn = SelfAttention(dim, shape.attention_dim, head_dim, bias)
        self.cross_norm = layer_norm(dim)
        self.cross_attn = CrossAttention(dim, head_dim, bias)
        self.ffn_norm = layer_norm(dim)
        if shape.num_experts:
            self.ffn: ExpertChoice | SwiGLU | GELU = ExpertChoice(dim, shape.ffn_dim, shape.num_experts, expert_capacity)
        else:
            self.ffn = (SwiGLU if shape.gated else GELU)(dim, shape.ffn_dim, bias)
        self.modulation = nn.Linear(condition_dim, 6 * dim)

    def forward(self, x_BTD: Tensor, caption: Tensor | KeysValues, caption_mask_BL: Tensor | None, condition_BD: Tensor) -> Tensor:
        """Map (B, T, D) -> (B, T, D).

        `caption` is either its tokens (B, L, D) or this block's keys and values of them. `condition_BD` is the activated sum of the noise
        embedding and the pooled caption, the same for all blocks.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition_BD).unsqueeze(1).chunk(6, dim=-1)
        ops = self.elementwise
        attended_BTD = self.attn(ops.modulated_norm(x_BTD, self.attn_norm.weight, shift_1, scale_1))
        x_BTD, normed_BTD = ops.gated_sum_norm(x_BTD, gate_1, attended_BTD, self.cross_norm.weight)
        crossed_BTD = self.cross_attn(normed_BTD, caption, caption_mask_BL)
        x_BTD, normed_BTD = ops.sum_modulated_norm(x_BTD, crossed_BTD, self.ffn_norm.weight, shift_2, scale_2)
        return ops.gated_sum(x_BTD, gate_2, self.ffn(normed_BTD))

    def init_weights(self, output_std: float) -> None:
        """Draw the weights. `output_std` is for those that write to the residual stream; adaLN starts at zero (adaLN-zero)."""
        self.attn.init_weights(output_std)
        self.cross_attn.init_weights(output_std)
        self.ffn.init_weights(output_std)
        nn.init.zeros_(self.modulation.weight)


class Head(nn.Module):
    """The last layer: an adaptive norm, then a linear map from tokens to patches that is initialised to zero.

    `condition_dim` is the width of the vector that drives adaLN; it differs from `dim` behind a decoder.
    """

    def __init__(self, dim: int, condition_dim: int, patch_values: int):
        super().__init__()
        self.norm = layer_norm(dim)
        self.modulation = nn.Linear(condition_dim, 2 * dim)
        self.linear = nn.Linear(dim, patch_values)

    def forward(self, x_BTD: Tensor, condition_BD: Tensor) -> Tensor:
        """Map tokens (B, T, D) -> patches (B, T, P)."""
        shift, scale = self.modulation(condition_BD).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(EAGER.modulated_norm(x_BTD, self.norm.weight, shift, scale))

    def init_weights(self) -> None:
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.linear.weight)


class SelfAttention(nn.Module):
    """Multi-head self-attention of width `attention_dim` on tokens of width `dim`."""

    def __init__(self, dim: int, attention_dim: int, head_dim: int, bias: bool):
        super().__init__()
        self.head_dim, self.elementwise = head_dim, EAGER
        self.qkv = nn.Linear(dim, 3 * attention_dim, bias=bias)
        self.out = nn.Linear(attention_dim, dim, bias=bias)

    def forward(self, x_BTD: Tensor, key_mask_BT: Tensor | None = None) -> Tensor:
        """Map (B, T, D) -> (B, T, D). No token attends to those where `key_mask_BT` is False."""
        q_BNTH, k_BNTH, v_BNTH = (_heads(part_BTA, self.head_dim) for part_BTA in self.elementwise.split_normalised(self.qkv(x_BTD), 3))
        return self.out(_attend(q_BNTH, KeysValues(k_BNTH, v_BNTH), key_mask_BT))

    def init_weights(self, output_std: float) -> None:
        nn.init.trunc_normal_(self.qkv.weight, std=0.02)
        nn.init.trunc_normal_(self.out.weight, std=output_std)


class CrossAttention(nn.Module):
    """Multi-head attention from image tokens (queries) to caption tokens (keys and values), always as wide as the model."""

    def __init__(self, dim: int, head_dim: int, bias: bool):
        super().__init__()
        self.head_dim, self.elementwise = head_dim, EAGER
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x_BTD: Tensor, caption: Tensor | KeysValues, caption_mask_BL: Tensor | None = None) -> Tensor:
        """Map (B, T, D), (B, L, D) -> (B, T, D). `caption` is either the caption's tokens or their keys and values, computed before."""
        keys_values = self.keys_values(caption) if isinstance(caption, Tensor) else caption
        q_BNTH = _heads(self.elementwise.normalised(self.q(x_BTD)), self.head_dim)
        return self.out(_attend(q_BNTH, keys_values, caption_mask_BL))

    def keys_values(self, caption_BLD: Tensor) -> KeysValues:
        """Project caption tokens (B, L, D) to keys and values. Nothing in them depends on the image tokens."""
        return KeysValues(*(_heads(part_BLD, self.head_dim) for part_BLD in self.elementwise.split_normalised(self.kv(caption_BLD), 2)))

    def init_weights(self, output_std: float) -> None:
        nn.init.trunc_normal_(self.q.weight, std=0.02)
        nn.init.trunc_normal_(self.kv.weight, std=0.02)
        nn.init.trunc_normal_(self.out.weight, std=output_std)


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


def layer_norm(dim: int) -> nn.LayerNorm:
    """Make a layer norm with a weight and no bias, as MicroDiT has everywhere."""
    return nn.LayerNorm(dim, eps=NORM_EPS, bias=False)


def _attend(q_BNTH: Tensor, keys_values: KeysValues, key_mask_BL: Tensor | None) -> Tensor:
    """Compute scaled dot-product attention: queries (B, N, T, H) -> (B, T, A)."""
    mask_B11L = None if key_mask_BL is None else key_mask_BL[:, None, None, :]
    out_BNTH = F.scaled_dot_product_attention(q_BNTH, *keys_values, attn_mask=mask_B11L)
    return out_BNTH.transpose(1, 2).flatten(-2)


def _heads(x_BTA: Tensor, head_dim: int) -> Tensor:
    """Split the heads: (B, T, N * H) -> (B, N, T, H)."""
    return x_BTA.unflatten(-1, (-1, head_dim)).transpose(1, 2)
