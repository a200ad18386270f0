"""The caption embedder: from the text encoder's vectors to the tokens and the pooled vector that condition the blocks.

Shape legend: B batch, L caption tokens, E the text encoder's channels, D dim, N heads, H head dim.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microdit.models.blocks import BlockStyle, KeysValues, Norm, SelfAttention, SwiGLU, make_norm
from microdit.models.elementwise import EAGER
from microdit.models.positions import Rotary

CaptionEmbedding = Literal["block", "linear"]


class Caption(NamedTuple):
    """An embedded caption. It depends on neither the noise nor the image, so sampling computes it once for all steps.

    `kv_cache` holds each block's cross-attention keys and values, filled by `MicroDiT.precompute_kv`. While it is empty, as in training,
    the blocks compute them themselves. `pooled_BD` is None in models without conditioning.
    """

    tokens_BLD: Tensor
    pooled_BD: Tensor | None
    mask_BL: Tensor | None
    kv_cache: dict[nn.Module, KeysValues]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Caption":
        """Return the caption with `change` applied to each tensor. The batch is always the first dimension."""
        kv_cache = {block: KeysValues(change(k), change(v)) for block, (k, v) in self.kv_cache.items()}
        pooled_BD, mask_BL = (None if tensor is None else change(tensor) for tensor in (self.pooled_BD, self.mask_BL))
        return Caption(change(self.tokens_BLD), pooled_BD, mask_BL, kv_cache)


def join(first: Caption, second: Caption) -> Caption:
    """Concatenate two captions along the batch. Both need the same number of tokens, the same cached blocks, and a mask or none."""
    pairs = zip(first.kv_cache.items(), second.kv_cache.values(), strict=True)
    kv_cache = {block: KeysValues(torch.cat([k, other_k]), torch.cat([v, other_v])) for (block, (k, v)), (other_k, other_v) in pairs}

    def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        found = [tensor for tensor in (one, other) if tensor is not None]
        return torch.cat(found) if found else None

    tokens_BLD = torch.cat([first.tokens_BLD, second.tokens_BLD])
    return Caption(tokens_BLD, both(first.pooled_BD, second.pooled_BD), both(first.mask_BL, second.mask_BL), kv_cache)


class CaptionEmbedder(nn.Module):
    """From the text encoder's vectors to caption tokens, and to a pooled vector for adaLN in models that have it.

    Embedding "block" is an MLP on each token and one self-attention block over all of them (2407.15811, section 3); "linear" is a matrix.
    With a `length`, captions are cut or filled up to so many tokens, and a learnt mask token takes the place of padding and of dropped
    captions, so that none of them is masked.
    """

    def __init__(self, channels: int, dim: int, ffn_dim: int, style: BlockStyle, embedding: CaptionEmbedding, length: int | None):
        super().__init__()
        self.rms, self.length = style.rms, length
        self.project = NormMLP(channels, dim, style.norm) if embedding == "block" else nn.Linear(channels, dim, bias=False)
        self.has_block = embedding == "block"
        if self.has_block:
            self.attn_norm = make_norm(dim, style.norm)
            self.attn = SelfAttention(dim, dim, style)
            self.ffn_norm = make_norm(dim, style.norm)
            self.ffn = SwiGLU(dim, ffn_dim, style.bias)
        self.pool = None if style.conditioning == "none" else NormMLP(dim, dim, style.norm)
        if length is not None:
            self.mask_token = nn.Parameter(torch.zeros(channels))

    def forward(self, text_BLE: Tensor, mask_BL: Tensor | None, rotary: Rotary | None = None) -> Caption:
        """Map text vectors (B, L, E) -> `Caption`. The mask is True at real tokens; without one, all tokens are real."""
        if self.length is not None:
            text_BLE, mask_BL = self._filled(text_BLE, mask_BL, self.length), None
        y_BLD = self.project(text_BLE)
        if self.has_block:
            y_BLD = y_BLD + self.attn(EAGER.modulated_norm(y_BLD, self.attn_norm.weight, rms=self.rms), mask_BL, rotary)
            y_BLD = y_BLD + self.ffn(EAGER.modulated_norm(y_BLD, self.ffn_norm.weight, rms=self.rms))
        return Caption(y_BLD, None if self.pool is None else self.pool(_mean(y_BLD, mask_BL)), mask_BL, {})

    def init_weights(self) -> None:
        for mlp in (self.project, self.pool):
            if isinstance(mlp, NormMLP):
                nn.init.normal_(mlp.fc1.weight, std=0.02)
                nn.init.normal_(mlp.fc2.weight, std=0.02)
        if self.has_block:
            self.attn.init_weights(0.02)
            self.ffn.init_weights(0.02)
            nn.init.zeros_(self.attn.out.weight)
            nn.init.zeros_(self.ffn.down.weight)
        if self.length is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def _filled(self, text_BLE: Tensor, mask_BL: Tensor | None, length: int) -> Tensor:
        """Return `length` tokens, with the mask token at padding and where vectors are zero, which stand for a dropped caption."""
        real_BL1 = (text_BLE != 0).any(dim=-1, keepdim=True)
        if mask_BL is not None:
            real_BL1 = real_BL1 & mask_BL.unsqueeze(-1)
        missing = length - text_BLE.shape[1]
        text_BLE, real_BL1 = F.pad(text_BLE, (0, 0, 0, missing)), F.pad(real_BL1, (0, 0, 0, missing))
        return torch.where(real_BL1, text_BLE, self.mask_token.to(text_BLE.dtype))


class NormMLP(nn.Module):
    """Linear, GELU, norm, linear; (..., in_dim) -> (..., dim)."""

    def __init__(self, in_dim: int, dim: int, norm: Norm = "layer"):
        super().__init__()
        self.rms = norm == "rms"
        self.fc1 = nn.Linear(in_dim, dim)
        self.norm = make_norm(dim, norm)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(EAGER.modulated_norm(F.gelu(self.fc1(x), approximate="tanh"), self.norm.weight, rms=self.rms))


def _mean(y_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Return the mean of the real tokens, (B, D)."""
    if mask_BL is None:
        return y_BLD.mean(dim=1)
    weight_BL1 = mask_BL.unsqueeze(-1).to(y_BLD)
    return (y_BLD * weight_BL1).sum(dim=1) / weight_BL1.sum(dim=1)
