"""The caption embedder: from the text encoder's vectors to the tokens and the pooled vector that condition the blocks.

Shape legend: B batch, L caption tokens, E the text encoder's channels, D dim, N heads, H head dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microdit.models.blocks import KeysValues, SelfAttention, SwiGLU, layer_norm


class Caption(NamedTuple):
    """An embedded caption. It depends on neither the noise nor the image, so sampling computes it once for all steps.

    `kv_cache` holds each block's cross-attention keys and values, filled by `MicroDiT.precompute_kv`. While it is empty, as in training,
    the blocks compute them themselves.
    """

    tokens_BLD: Tensor
    pooled_BD: Tensor
    mask_BL: Tensor | None
    kv_cache: dict[nn.Module, KeysValues]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Caption":
        """Return the caption with `change` applied to each tensor. The batch is always the first dimension."""
        kv_cache = {block: KeysValues(change(k), change(v)) for block, (k, v) in self.kv_cache.items()}
        mask_BL = None if self.mask_BL is None else change(self.mask_BL)
        return Caption(change(self.tokens_BLD), change(self.pooled_BD), mask_BL, kv_cache)


def join(first: Caption, second: Caption) -> Caption:
    """Concatenate two captions along the batch. Both need the same number of tokens, the same cached blocks, and a mask or none."""
    pairs = zip(first.kv_cache.items(), second.kv_cache.values(), strict=True)
    kv_cache = {block: KeysValues(torch.cat([k, other_k]), torch.cat([v, other_v])) for (block, (k, v)), (other_k, other_v) in pairs}
    masks = [mask_BL for mask_BL in (first.mask_BL, second.mask_BL) if mask_BL is not None]
    return Caption(
        torch.cat([first.tokens_BLD, second.tokens_BLD]),
        torch.cat([first.pooled_BD, second.pooled_BD]),
        torch.cat(masks) if masks else None,
        kv_cache,
    )


class CaptionEmbedder(nn.Module):
    """An MLP on each token, one self-attention block over all of them, and a pooled vector for adaLN (2407.15811, section 3)."""

    def __init__(self, channels: int, dim: int, head_dim: int, ffn_dim: int, bias: bool):
        super().__init__()
        self.project = NormMLP(channels, dim)
        self.attn_norm = layer_norm(dim)
        self.attn = SelfAttention(dim, dim, head_dim, bias)
        self.ffn_norm = layer_norm(dim)
        self.ffn = SwiGLU(dim, ffn_dim, bias)
        self.pool = NormMLP(dim, dim)

    def forward(self, text_BLE: Tensor, mask_BL: Tensor | None) -> Caption:
        """Map text vectors (B, L, E) -> `Caption`. The mask is True at real tokens; without one, all tokens are real."""
        y_BLD = self.project(text_BLE)
        y_BLD = y_BLD + self.attn(self.attn_norm(y_BLD), mask_BL)
        y_BLD = y_BLD + self.ffn(self.ffn_norm(y_BLD))
        if mask_BL is None:
            mean_BD = y_BLD.mean(dim=1)
        else:
            weight_BL1 = mask_BL.unsqueeze(-1).to(y_BLD)
            mean_BD = (y_BLD * weight_BL1).sum(dim=1) / weight_BL1.sum(dim=1)
        return Caption(y_BLD, self.pool(mean_BD), mask_BL, {})

    def init_weights(self) -> None:
        for mlp in (self.project, self.pool):
            nn.init.normal_(mlp.fc1.weight, std=0.02)
            nn.init.normal_(mlp.fc2.weight, std=0.02)
        self.attn.init_weights(0.02)
        self.ffn.init_weights(0.02)
        nn.init.zeros_(self.attn.out.weight)
        nn.init.zeros_(self.ffn.down.weight)


class NormMLP(nn.Module):
    """Linear, GELU, layer norm, linear; (..., in_dim) -> (..., dim)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(in_dim, dim)
        self.norm = layer_norm(dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.gelu(self.fc1(x), approximate="tanh")))
