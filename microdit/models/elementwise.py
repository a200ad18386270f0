"""The operations between a block's matrix products: norms, gates, activations, and the way of tokens to the experts and back.

On a GPU they are bound by memory bandwidth, so they are free functions, which `compiled` turns into one kernel each where the eager ones
take several. All blocks share them: compiling takes seconds, where 26 blocks of different shapes would take minutes.

Shape legend: B batch, T tokens, D dim, A attention width, N heads, H head dim, P parts side by side, F feed-forward width;
in the functions of experts N tokens of the whole batch, E experts, M tokens that an expert takes from the batch.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.fx.experimental._config as shapes_config
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

NORM_EPS = 1e-6


class Elementwise(NamedTuple):
    """The functions that a block calls between its matrix products, eager or compiled."""

    modulated_norm: Callable[..., Tensor]
    gated_sum: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    sum_norm: Callable[..., tuple[Tensor, Tensor]]
    gated_silu: Callable[[Tensor, Tensor], Tensor]
    normalised: Callable[[Tensor], Tensor]
    split_normalised: Callable[[Tensor, int], tuple[Tensor, ...]]
    head_normalised: Callable[[Tensor, Tensor], Tensor]
    rotated: Callable[[Tensor, Tensor, Tensor], Tensor]
    take_chosen: Callable[[Tensor, Tensor], Tensor]
    add_weighted: Callable[[Tensor, Tensor, Tensor, int], Tensor]


def modulated_norm(
    x_BTD: Tensor, weight_D: Tensor, shift_B1D: Tensor | None = None, scale_B1D: Tensor | None = None, rms: bool = False
) -> Tensor:
    """Return the layer norm of x, or its RMS norm, scaled and shifted for each sample: adaLN (Peebles & Xie 2023)."""
    if rms:
        normed_BTD = F.rms_norm(x_BTD, weight_D.shape, weight_D.to(x_BTD.dtype), NORM_EPS)
    else:
        normed_BTD = F.layer_norm(x_BTD, weight_D.shape, weight_D, None, NORM_EPS)
    return normed_BTD if shift_B1D is None or scale_B1D is None else torch.addcmul(shift_B1D, normed_BTD, 1 + scale_B1D)


def gated_sum(x_BTD: Tensor, gate_B1D: Tensor | None, y_BTD: Tensor) -> Tensor:
    """Return x + gate * y, or x + y without a gate."""
    return x_BTD + y_BTD if gate_B1D is None else torch.addcmul(x_BTD, gate_B1D, y_BTD)


def sum_norm(
    x_BTD: Tensor,
    gate_B1D: Tensor | None,
    y_BTD: Tensor,
    weight_D: Tensor,
    shift_B1D: Tensor | None = None,
    scale_B1D: Tensor | None = None,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the gated sum of x and y, and its modulated norm."""
    x_BTD = gated_sum(x_BTD, gate_B1D, y_BTD)
    return x_BTD, modulated_norm(x_BTD, weight_D, shift_B1D, scale_B1D, rms)


def gated_silu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """Return silu(gate) * up (Shazeer 2020, 2002.05202)."""
    return F.silu(gate_BTF) * up_BTF


def normalised(x_BTA: Tensor) -> Tensor:
    """Return the layer norm of queries or keys over all heads together, without parameters."""
    return F.layer_norm(x_BTA, (x_BTA.shape[-1],), eps=NORM_EPS)


def split_normalised(x_BTPA: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Split (B, T, P * A) into P tensors (B, T, A), and normalise all but the last: queries and keys, but not values."""
    *others, last_BTA = x_BTPA.chunk(parts, dim=-1)
    return *map(normalised, others), last_BTA


def head_normalised(x_BTA: Tensor, weight_H: Tensor) -> Tensor:
    """Return the RMS norm of queries or keys in each head, (B, T, N, H)."""
    return F.rms_norm(x_BTA.unflatten(-1, (-1, len(weight_H))), weight_H.shape, weight_H.to(x_BTA.dtype), NORM_EPS)


def rotated(x_BTNH: Tensor, cos_BT1H: Tensor, sin_BT1H: Tensor) -> Tensor:
    """Return queries or keys with each pair of channels i and i + H/2 rotated by its angle (RoFormer, 2104.09864, section 3.2.2)."""
    first, second = x_BTNH.chunk(2, dim=-1)
    return (x_BTNH * cos_BT1H + torch.cat([-second, first], dim=-1) * sin_BT1H).to(x_BTNH.dtype)


def take_chosen(x_ND: Tensor, token_EM: Tensor) -> Tensor:
    """Return the tokens that each expert takes, (E, M, D). No expert takes a token twice."""
    return x_ND.index_select(0, token_EM.reshape(-1)).view(*token_EM.shape, x_ND.shape[-1])


def add_weighted(y_EMD: Tensor, weight_EM: Tensor, token_EM: Tensor, tokens: int) -> Tensor:
    """Return the weighted sum of the experts' outputs for each of `tokens` tokens, (N, D); 0 for those that no expert took."""
    weighted_EMD = y_EMD * weight_EM.to(y_EMD.dtype).unsqueeze(-1)
    sums_ND = torch.zeros(tokens, y_EMD.shape[-1], dtype=y_EMD.dtype, device=y_EMD.device)
    return sums_ND.index_add(0, token_EM.reshape(-1), weighted_EMD.flatten(0, 1))


EAGER = Elementwise(
    modulated_norm,
    gated_sum,
    sum_norm,
    gated_silu,
    normalised,
    split_normalised,
    head_normalised,
    rotated,
    take_chosen,
    add_weighted,
)


@cache
def compiled() -> Elementwise:
    """Return the functions compiled by torch.compile, at their first call, with dynamic sizes: no new shape compiles them again.

    Sizes that happen to be equal at the first call, such as a batch and a width, are not taken to be always equal, which a later call would
    refute: the setting that says so is the process's. Static are the widths that are normalised, or taken to experts: a kernel that knows
    a row's width reads it once. Where autograd would choose a slow backward pass, the compiled function has its own.
    """
    shapes_config.use_duck_shape = False
    return Elementwise(
        _dynamic(modulated_norm),
        _dynamic(gated_sum),
        _dynamic(sum_norm),
        _dynamic(gated_silu),
        _static_width(normalised),
        _SplitNormalised.apply,
        _dynamic(head_normalised),
        _dynamic(rotated),
        _TakeChosen.apply,
        _AddWeighted.apply,
    )


def _dynamic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function once for inputs of any size. The widths of parameters are static."""
    compiled_function: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=True)
    return compiled_function


@cache
def _static_width(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function once for each width, the last dimension of inputs that are not integers, and any other sizes."""
    kernel = _dynamic(function)

    def call(*inputs: Tensor | int) -> Any:
        for tensor in inputs:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                torch._dynamo.mark_static(tensor, tensor.dim() - 1)
        return kernel(*inputs)

    return call


class _SplitNormalised(torch.autograd.Function):
    """`split_normalised`, whose backward pass writes all parts' gradients to one tensor instead of concatenating them afterwards."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_BTPA: Tensor, parts: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_BTPA)
        normed_BTpA = _static_width(_normalised_parts)(x_BTPA, parts)
        return *normed_BTpA.unbind(-2), x_BTPA.chunk(parts, dim=-1)[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients_BTA: Tensor) -> tuple[Tensor, None]:
        return _static_width(_split_normalised_backward)(*ctx.saved_tensors, *gradients_BTA), None


def _normalised_parts(x_BTPA: Tensor, parts: int) -> Tensor:
    """Return all parts but the last, normalised, (B, T, P - 1, A)."""
    width = x_BTPA.chunk(parts, dim=-1)[0].shape[-1]  # a number, where `parts` itself is a symbol to the compiler
    return normalised(x_BTPA.unflatten(-1, (-1, width))[..., :-1, :])


def _split_normalised_backward(x_BTPA: Tensor, *gradients_BTA: Tensor) -> Tensor:
    parts_BTA = x_BTPA.chunk(len(gradients_BTA), dim=-1)[:-1]
    inner = [_normalised_backward(x_BTA, gradient_BTA) for x_BTA, gradient_BTA in zip(parts_BTA, gradients_BTA[:-1], strict=True)]
    return torch.cat([*inner, gradients_BTA[-1]], dim=-1)


def _normalised_backward(x_BTA: Tensor, gradient_BTA: Tensor) -> Tensor:
    """Return the gradient of `normalised`. The statistics are computed again, from numbers that are read anyway."""
    wide = torch.promote_types(x_BTA.dtype, torch.float32)
    x, gradient = x_BTA.to(wide), gradient_BTA.to(wide)
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + NORM_EPS)
    normed = (x - mean) * inverse
    inner = gradient - gradient.mean(-1, keepdim=True) - normed * (gradient * normed).mean(-1, keepdim=True)
    return (inner * inverse).to(x_BTA.dtype)


class _TakeChosen(torch.autograd.Function):
    """`take_chosen`, whose backward pass gathers each token's gradients in a fixed order instead of adding them by atomics."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_EM: Tensor) -> Tensor:
        ctx.save_for_backward(token_EM)
        ctx.tokens = len(x_ND)
        return take_chosen(x_ND, token_EM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_EMD: Tensor) -> tuple[Tensor, None]:
        return _static_width(_gathered_sum)(gradient_EMD, None, *ctx.saved_tensors, ctx.tokens), None


class _AddWeighted(torch.autograd.Function):
    """`add_weighted`, which gathers each token's outputs in a fixed order instead of adding them by atomics."""

    @staticmethod
    def forward(ctx: Any, y_EMD: Tensor, weight_EM: Tensor, token_EM: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(y_EMD, weight_EM.unsqueeze(-1), token_EM)
        return _static_width(_gathered_sum)(y_EMD, weight_EM.unsqueeze(-1), token_EM, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gradient_EMD, gradient_EM1 = _static_width(_add_weighted_backward)(gradient_ND, *ctx.saved_tensors)
        return gradient_EMD, gradient_EM1.squeeze(-1), None, None


def _gathered_sum(y_EMD: Tensor, weight_EM1: Tensor | None, token_EM: Tensor, tokens: int) -> Tensor:
    """Return `add_weighted`, summed in the order of the experts in at least float32; all weights are 1 if there are none."""
    E, M, D = y_EMD.shape
    wide = torch.promote_types(y_EMD.dtype, torch.float32)
    rows_EM = torch.arange(E * M, device=y_EMD.device).view(E, M)
    row_EN = torch.full((E, tokens), -1, device=y_EMD.device).scatter(1, token_EM, rows_EM)  # -1: not taken
    sum_ND = torch.zeros(tokens, D, dtype=wide, device=y_EMD.device)
    for row_N in row_EN.unbind():
        taken_N = row_N >= 0
        taken_ND = torch.ops.aten._unsafe_masked_index(y_EMD.view(E * M, D), taken_N.unsqueeze(1), [row_N], 0.0).to(wide)
        if weight_EM1 is not None:
            taken_ND = taken_ND * torch.ops.aten._unsafe_masked_index(weight_EM1.reshape(-1), taken_N, [row_N], 0.0).unsqueeze(1)
        sum_ND = sum_ND + taken_ND
    return sum_ND.to(y_EMD.dtype)


def _add_weighted_backward(gradient_ND: Tensor, y_EMD: Tensor, weight_EM1: Tensor, token_EM: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the outputs and of their weights."""
    gradient_EMD = gradient_ND[token_EM].to(torch.promote_types(y_EMD.dtype, torch.float32))
    return (gradient_EMD * weight_EM1).to(y_EMD.dtype), (gradient_EMD * y_EMD).sum(-1, keepdim=True).to(weight_EM1.dtype)
