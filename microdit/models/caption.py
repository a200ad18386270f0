"""Captions as the blocks use them, and what makes them of the text encoder's vectors.

Shape legend: B batch, L caption tokens, E the text encoder's channels, D dim, N heads, H head dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microdit.models.blocks import KeysValues, SelfAttention, SwiGLU, layer_norm


class Caption(NamedTuple):
    """Depends on neither noise nor picture, so it can be computed once for all steps.

    `answers`: what each block's cross-attention makes of it, by `MicroDiT.answer_once`; empty where blocks shall compute that themselves.
    """

    tokens_BLD: Tensor
    pooled_BD: Tensor
    mask_BL: Tensor | None
    answers: dict[nn.Module, KeysValues]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Caption":
        """With each of its tensors changed along the batch, its first dimension."""
        answers = {block: KeysValues(change(k), change(v)) for block, (k, v) in self.answers.items()}
        mask_BL = None if self.mask_BL is None else change(self.mask_BL)
        return Caption(change(self.tokens_BLD), change(self.pooled_BD), mask_BL, answers)


def join(first: Caption, second: Caption) -> Caption:
    """Both in one batch. They have as many tokens, and either both have a mask or neither; answers of the same blocks."""
    pairs = zip(first.answers.items(), second.answers.values(), strict=True)
    answers = {block: KeysValues(torch.cat([k, other_k]), torch.cat([v, other_v])) for (block, (k, v)), (other_k, other_v) in pairs}
    masks = [mask_BL for mask_BL in (first.mask_BL, second.mask_BL) if mask_BL is not None]
    return Caption(
        torch.cat([first.tokens_BLD, second.tokens_BLD]),
        torch.cat([first.pooled_BD, second.pooled_BD]),
        torch.cat(masks) if masks else None,
        answers,
    )


class CaptionEmbedder(nn.Module):
    """Caption MLP, one self-attention block over its tokens, and the pooled vector for adaLN."""

    def __init__(self, channels: int, dim: int, head_dim: int, ffn_dim: int, bias: bool):
        super().__init__()
        self.project = NormMLP(channels, dim)
        self.attn_norm = layer_norm(dim)
        self.attn = SelfAttention(dim, dim, head_dim, bias)
        self.ffn_norm = layer_norm(dim)
        self.ffn = SwiGLU(dim, ffn_dim, bias)
        self.pool = NormMLP(dim, dim)

    def forward(self, text_BLE: Tensor, mask_BL: Tensor | None) -> Caption:
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
    """Linear, GELU, layer norm, linear."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(in_dim, dim)
        self.norm = layer_norm(dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.gelu(self.fc1(x), approximate="tanh")))
