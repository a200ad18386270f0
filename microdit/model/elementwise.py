"""What lies between the matrix products of a block: norms, modulation, residual sums, the gate of a SwiGLU.

On a GPU these are bound by memory, not by arithmetic. Compiled, each is one kernel forward and one or two backward. That takes seconds for
the few functions here, which all blocks share, where compiling blocks of 26 different shapes takes minutes; the products in between are a
library's in either case.

Shape legend: B batch, T tokens, D dim, A attention width, F feed-forward width.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6


def modulated_norm(x_BTD: Tensor, weight_D: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """adaLN (Peebles & Xie 2023): the layer norm, scaled and shifted for each sample."""
    return torch.addcmul(shift_B1D, F.layer_norm(x_BTD, weight_D.shape, weight_D, None, NORM_EPS), 1 + scale_B1D)


def gated_sum(x_BTD: Tensor, gate_B1D: Tensor, y_BTD: Tensor) -> Tensor:
    """x + gate * y."""
    return torch.addcmul(x_BTD, gate_B1D, y_BTD)


def gated_sum_norm(x_BTD: Tensor, gate_B1D: Tensor, y_BTD: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    """x + gate * y, and its layer norm."""
    x_BTD = gated_sum(x_BTD, gate_B1D, y_BTD)
    return x_BTD, F.layer_norm(x_BTD, weight_D.shape, weight_D, None, NORM_EPS)


def sum_modulated_norm(x_BTD: Tensor, y_BTD: Tensor, weight_D: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> tuple[Tensor, Tensor]:
    """x + y, and its modulated norm."""
    x_BTD = x_BTD + y_BTD
    return x_BTD, modulated_norm(x_BTD, weight_D, shift_B1D, scale_B1D)


def normalised(x_BTA: Tensor) -> Tensor:
    """The layer norm of queries or keys, over all heads together, without parameters."""
    return F.layer_norm(x_BTA, (x_BTA.shape[-1],), eps=NORM_EPS)


def gated_silu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, 2002.05202)."""
    return F.silu(gate_BTF) * up_BTF


class Elementwise(NamedTuple):
    """The functions above, eager or compiled: what a block calls."""

    modulated_norm: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    gated_sum: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated_sum_norm: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    sum_modulated_norm: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    normalised: Callable[[Tensor], Tensor]
    gated_silu: Callable[[Tensor, Tensor], Tensor]


EAGER = Elementwise(modulated_norm, gated_sum, gated_sum_norm, sum_modulated_norm, normalised, gated_silu)


@cache
def compiled() -> Elementwise:
    """Compiled at their first use. Numbers of samples, tokens and hidden widths are left open, so that others compile nothing again."""
    functions: list[Callable[..., Any]] = [torch.compile(function, fullgraph=True, dynamic=True) for function in EAGER]
    return Elementwise(*functions)
