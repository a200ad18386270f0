# mypy: ignore-errors
"""Kernels by hand in Triton, for gpu_kernels.py: how much faster than PyTorch's would they be? The package does not use them.

Shape legend: N tokens of the whole batch, E experts, M tokens of an expert, D dim; B batch, T queries, L keys, A width, H head dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from microdit.models.elementwise import NORM_EPS, Elementwise, _add_weighted_backward, _static_width, compiled
from microdit.models.elementwise import take_chosen as take

MOST_KEYS = 128
LOG2_E = 1.4426950408889634


@triton.jit
def sum_rows(rows, weight, row_of, out, D, E: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """One program for a token: the sum of the rows that it has among all experts' outputs."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for expert in tl.static_range(E):
        row = tl.load(row_of + token * E + expert)
        value = tl.load(rows + row * D + d, mask=(d < D) & (row >= 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight + row, mask=row >= 0, other=0.0).to(tl.float32)
        total += value
    tl.store(out + token * D + d, total.to(out.dtype.element_ty), mask=d < D)


def gathered_sum(y_EMD: Tensor, weight_EM: Tensor | None, token_EM: Tensor, tokens: int) -> Tensor:
    E, M, D = y_EMD.shape
    place_EM = token_EM * E + torch.arange(E, device=y_EMD.device).unsqueeze(1)
    row_of = torch.full((tokens * E,), -1, device=y_EMD.device)
    row_of.scatter_(0, place_EM.reshape(-1), torch.arange(E * M, device=y_EMD.device))
    out = torch.empty(tokens, D, dtype=y_EMD.dtype, device=y_EMD.device)
    block, y_EMD = triton.next_power_of_2(D), y_EMD.contiguous()
    weight = y_EMD if weight_EM is None else weight_EM.contiguous()
    sum_rows[(tokens,)](y_EMD, weight, row_of, out, D, E=E, WEIGHTED=weight_EM is not None, BLOCK=block, num_warps=2)
    return out


class TakeChosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_EM: Tensor) -> Tensor:
        ctx.save_for_backward(token_EM)
        ctx.tokens = len(x_ND)
        return take(x_ND, token_EM)

    @staticmethod
    def backward(ctx: Any, gradient_EMD: Tensor) -> tuple[Tensor, None]:
        return gathered_sum(gradient_EMD, None, *ctx.saved_tensors, ctx.tokens), None


class AddWeighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_EMD: Tensor, weight_EM: Tensor, token_EM: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(y_EMD, weight_EM, token_EM)
        return gathered_sum(y_EMD, weight_EM, token_EM, tokens)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_EMD, weight_EM, token_EM = ctx.saved_tensors
        gradient_EMD, gradient_EM1 = _static_width(_add_weighted_backward)(gradient_ND, y_EMD, weight_EM.unsqueeze(-1), token_EM)
        return gradient_EMD, gradient_EM1.squeeze(-1), None, None


take_chosen: Any = TakeChosen.apply
add_weighted: Any = AddWeighted.apply


@triton.jit
def normalise_parts(x, y, xs, ys, A, eps, BLOCK: tl.constexpr):
    """One program for a row of one part, which it reads once."""
    row, part, a = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    value = tl.load(x + row * xs + part * A + a, mask=a < A, other=0.0).to(tl.float32)
    centred = tl.where(a < A, value - tl.sum(value, 0) / A, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / A + eps)
    tl.store(y + row * ys + part * A + a, normed.to(y.dtype.element_ty), mask=a < A)


@triton.jit
def normalise_parts_backward(x, g0, g1, g2, dx, xs, s0, s1, s2, A, eps, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The same, backward; the last part's gradient is copied."""
    row, part, a = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    inside = a < A
    gradient = tl.load(g0 + row * s0 + a, mask=inside & (part == 0), other=0.0).to(tl.float32)
    if PARTS > 1:
        gradient += tl.load(g1 + row * s1 + a, mask=inside & (part == 1), other=0.0).to(tl.float32)
    if PARTS > 2:
        gradient += tl.load(g2 + row * s2 + a, mask=inside & (part == 2), other=0.0).to(tl.float32)
    if (PARTS == 1) | (part < PARTS - 1):
        value = tl.load(x + row * xs + part * A + a, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, value - tl.sum(value, 0) / A, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 0) / A + eps)
        normed = centred * inverse
        inner = gradient - tl.sum(gradient, 0) / A - normed * (tl.sum(gradient * normed, 0) / A)
        gradient = inner * inverse
    tl.store(dx + row * xs + part * A + a, gradient.to(dx.dtype.element_ty), mask=inside)


class SplitNormalised(torch.autograd.Function):
    """`parts` 1 is the norm alone."""

    @staticmethod
    def forward(ctx: Any, x_BTPA: Tensor, parts: int) -> tuple[Tensor, ...]:
        (*sizes, PA), normed = x_BTPA.shape, max(1, parts - 1)
        x, A = x_BTPA.reshape(-1, PA), PA // parts
        y = torch.empty(len(x), normed * A, dtype=x.dtype, device=x.device)
        block = triton.next_power_of_2(A)
        normalise_parts[(len(x), normed)](x, y, x.stride(0), y.stride(0), A, NORM_EPS, BLOCK=block, num_warps=2)
        ctx.save_for_backward(x_BTPA)
        ctx.parts = parts
        inner = y.view(*sizes, normed, A).unbind(-2)
        return inner if parts == 1 else (*inner, x_BTPA[..., -A:])

    @staticmethod
    def backward(ctx: Any, *gradients_BTA: Tensor) -> tuple[Tensor, None]:
        (x_BTPA,), parts = ctx.saved_tensors, ctx.parts
        x, A = x_BTPA.reshape(-1, x_BTPA.shape[-1]), x_BTPA.shape[-1] // parts
        dx, rows = torch.empty_like(x), [gradient.reshape(-1, A) for gradient in gradients_BTA]
        three = (rows * 3)[:3]
        strides = x.stride(0), *(gradient.stride(0) for gradient in three)
        block = triton.next_power_of_2(A)
        normalise_parts_backward[(len(x), parts)](x, *three, dx, *strides, A, NORM_EPS, PARTS=parts, BLOCK=block, num_warps=2)
        return dx.view(x_BTPA.shape), None


split_normalised: Any = SplitNormalised.apply


def normalised(x_BTA: Tensor) -> Tensor:
    (y_BTA,) = SplitNormalised.apply(x_BTA, 1)
    return y_BTA


@triton.jit
def attend_forward(
    q, k, v, o, qb, qt, kb, kl, vb, vl, ob, ot, T: tl.constexpr, L, scale, H: tl.constexpr, BT: tl.constexpr, BL: tl.constexpr
):
    """One program for a head of a sample and BT queries; all keys at once."""
    head, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t, j, h = tl.program_id(2) * BT + tl.arange(0, BT), tl.arange(0, BL), head * H + tl.arange(0, H)
    q_TH = tl.load(q + sample * qb + t[:, None] * qt + h[None, :], mask=t[:, None] < T, other=0.0)
    k_LH = tl.load(k + sample * kb + j[:, None] * kl + h[None, :], mask=j[:, None] < L, other=0.0)
    v_LH = tl.load(v + sample * vb + j[:, None] * vl + h[None, :], mask=j[:, None] < L, other=0.0)
    s_TL = tl.where(j[None, :] < L, tl.dot(q_TH, tl.trans(k_LH)) * scale, float("-inf"))
    p_TL = tl.exp2(s_TL - tl.max(s_TL, 1)[:, None])
    p_TL = p_TL / tl.sum(p_TL, 1)[:, None]
    o_TH = tl.dot(p_TL.to(v_LH.dtype), v_LH)
    tl.store(o + sample * ob + t[:, None] * ot + h[None, :], o_TH.to(v_LH.dtype), mask=t[:, None] < T)


@triton.jit
def attend_backward(
    q,
    k,
    v,
    do,
    dq,
    dk,
    dv,
    qb,
    qt,
    kb,
    kl,
    vb,
    vl,
    ob,
    ot,
    db,
    dt,
    T: tl.constexpr,
    L,
    scale,
    inner,
    H: tl.constexpr,
    BT: tl.constexpr,
    BL: tl.constexpr,
):
    """One program for a head of a sample. The softmax is computed again, so its sums are not read. `inner`: 1/sqrt(H)."""
    head, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    j, h = tl.arange(0, BL), head * H + tl.arange(0, H)
    k_LH = tl.load(k + sample * kb + j[:, None] * kl + h[None, :], mask=j[:, None] < L, other=0.0)
    v_LH = tl.load(v + sample * vb + j[:, None] * vl + h[None, :], mask=j[:, None] < L, other=0.0)
    dk_LH = tl.zeros([BL, H], tl.float32)
    dv_LH = tl.zeros([BL, H], tl.float32)
    for first in range(0, T, BT):
        t = first + tl.arange(0, BT)
        inside = t[:, None] < T
        q_TH = tl.load(q + sample * qb + t[:, None] * qt + h[None, :], mask=inside, other=0.0)
        do_TH = tl.load(do + sample * ob + t[:, None] * ot + h[None, :], mask=inside, other=0.0)
        s_TL = tl.where(j[None, :] < L, tl.dot(q_TH, tl.trans(k_LH)) * scale, float("-inf"))
        p_TL = tl.exp2(s_TL - tl.max(s_TL, 1)[:, None])
        p_TL = p_TL / tl.sum(p_TL, 1)[:, None]
        dp_TL = tl.dot(do_TH, tl.trans(v_LH))
        ds_TL = (p_TL * (dp_TL - tl.sum(p_TL * dp_TL, 1)[:, None])).to(q_TH.dtype)
        dv_LH += tl.dot(tl.trans(p_TL.to(q_TH.dtype)), do_TH)
        dk_LH += tl.dot(tl.trans(ds_TL), q_TH)
        dq_TH = tl.dot(ds_TL, k_LH) * inner
        tl.store(dq + sample * ob + t[:, None] * ot + h[None, :], dq_TH.to(q_TH.dtype), mask=inside)
    outs = sample * db + j[:, None] * dt + h[None, :]
    tl.store(dk + outs, (dk_LH * inner).to(k_LH.dtype), mask=j[:, None] < L)
    tl.store(dv + outs, dv_LH.to(k_LH.dtype), mask=j[:, None] < L)


class Attend(torch.autograd.Function):
    """Rows of queries, keys and values may lie apart, as the parts of one product do."""

    @staticmethod
    def forward(ctx: Any, q_BTA: Tensor, k_BLA: Tensor, v_BLA: Tensor, head: int) -> Tensor:
        (B, T, A), L = q_BTA.shape, k_BLA.shape[1]
        out = torch.empty(B, T, A, dtype=q_BTA.dtype, device=q_BTA.device)
        strides = [stride for x in (q_BTA, k_BLA, v_BLA, out) for stride in x.stride()[:2]]
        sizes = {"H": head, "BT": 64, "BL": max(16, triton.next_power_of_2(L))}
        grid = A // head, B, triton.cdiv(T, 64)
        attend_forward[grid](q_BTA, k_BLA, v_BLA, out, *strides, T, L, LOG2_E * head**-0.5, **sizes, num_warps=4)
        ctx.save_for_backward(q_BTA, k_BLA, v_BLA)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx: Any, do_BTA: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        (B, T, A), L, head = q.shape, k.shape[1], ctx.sizes["H"]
        do = do_BTA.contiguous()
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        strides = [stride for x in (q, k, v, do, dk) for stride in x.stride()[:2]]
        warps = 8 if ctx.sizes["BL"] > 64 else 4
        attend_backward[(A // head, B)](
            q, k, v, do, dq, dk, dv, *strides, T, L, LOG2_E * head**-0.5, head**-0.5, **ctx.sizes, num_warps=warps
        )
        return dq, dk, dv, None


def attend(head: int, q_BTA: Tensor, kv_BLA: Tensor) -> Tensor:
    """Attention of queries (B, T, A) to keys and values side by side, (B, L, 2 * A), at most `MOST_KEYS` of them."""
    out: Tensor = Attend.apply(q_BTA, *kv_BLA.chunk(2, dim=-1), head)
    return out


def by_hand() -> Elementwise:
    """The compiled functions, with those by hand in the place of theirs."""
    return compiled()._replace(normalised=normalised, split_normalised=split_normalised, take_chosen=take_chosen, add_weighted=add_weighted)


def attend_heads(q_BNTH: Tensor, keys_values: tuple[Tensor, Tensor], key_mask_BL: Tensor | None) -> Tensor:
    """`blocks._attend`, by hand where it can be."""
    k_BNLH, v_BNLH = keys_values
    if key_mask_BL is not None or k_BNLH.shape[2] > MOST_KEYS:
        mask_B11L = None if key_mask_BL is None else key_mask_BL[:, None, None, :]
        return F.scaled_dot_product_attention(q_BNTH, k_BNLH, v_BNLH, attn_mask=mask_B11L).transpose(1, 2).flatten(-2)
    q_BTA, k_BLA, v_BLA = (heads.transpose(1, 2).flatten(-2) for heads in (q_BNTH, k_BNLH, v_BNLH))
    out: Tensor = Attend.apply(q_BTA, k_BLA, v_BLA, q_BNTH.shape[-1])
    return out
