"""AdamW whose two moments take one byte a number each, in blocks with a scale of their own (Dettmers et al. 2021, 2110.02861).

Notable:
- a code is a short float, with eight levels between a number and its double: the small numbers of a block keep their precision beside its
  largest one;
- a number between two levels goes to either, in turn and so that the mean is right. Rounded to the nearest, a second moment that moves by a
  thousandth a step would never leave its level;
- which of the two it goes to follows from the step's number and the place in the block, so a resumed run goes on bit for bit;
- scales are powers of two, so that codes stay what they are when a scale changes;
- a weight is updated some million numbers at a time: no whole moment is ever there in float32.

Shape legend: N blocks, B numbers of a block.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from microdit.planning.memory import block_size

TOP, SIGNED_TOP = 255, 127  # the codes of a block's largest numbers
DROPPED = 20  # of a float32's 23 bits of mantissa
ONE = 127 << 3  # the exponent of 1.0 in a float32, and three bits of mantissa
LEAST = 2.0 ** ((1 - SIGNED_TOP) // 8) * (1 + (1 - SIGNED_TOP) % 8 / 8)  # what the signed code 1 stands for
CHUNK = {"cuda": 1 << 22, "cpu": 1 << 16}  # numbers at a time: of a CPU as many as its cache holds


class _Settings(NamedTuple):
    """Settings of one update. `rate` and `root` include the bias corrections. What changes from step to step is a tensor."""

    rate: Tensor
    root: Tensor
    decay: Tensor
    beta1: float
    beta2: float
    eps: float
    taken: Tensor


class AdamW8(Optimizer):
    """torch.optim.AdamW but for the moments' rounding."""

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float, compile: bool = False):
        """`compile`: make one kernel of an update's forty."""
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._quantised: Callable[..., None] = torch.compile(_quantised_update, dynamic=True) if compile else _quantised_update

    @torch.no_grad()
    def step(self, closure: None = None, taken: Tensor | None = None) -> None:  # type: ignore[override]
        """`taken`: 0.0 leaves weights and moments as they are; a scalar on the weights' device."""
        for group in self.param_groups:
            for leaf in group["params"]:
                if leaf.grad is not None:
                    self._update(leaf, leaf.grad, self.state[leaf] or self._begin(leaf), group, taken)

    def _begin(self, leaf: Tensor) -> dict[str, Tensor]:
        state, block = self.state[leaf], block_size(leaf.shape)
        state["step"] = torch.zeros((), device=leaf.device)
        for name, codes in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
            state[name] = torch.zeros_like(leaf, dtype=torch.float32 if block is None else codes)
            if block is not None:
                state[f"{name}_scale"] = torch.zeros(len(leaf), leaf.shape[1:].numel() // block, device=leaf.device)
        return state

    def _update(self, leaf: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], taken: Tensor | None) -> None:
        step, (beta1, beta2) = state["step"], group["betas"]
        state["step"] = step = step.add_(1.0 if taken is None else taken)
        taken = torch.ones_like(step) if taken is None else taken
        rate = torch.full_like(step, group["lr"])  # numbers that change are tensors, so that they compile nothing again
        decay, eps = 1 - rate * group["weight_decay"], group["eps"]
        settings = _Settings(rate / (1 - beta1**step), (1 - beta2**step).sqrt(), decay, beta1, beta2, eps, taken)
        if "exp_avg_scale" not in state:
            _plain_update(leaf, gradient, state["exp_avg"], state["exp_avg_sq"], settings)
            return
        block = block_size(leaf.shape)
        assert block is not None
        dither_B = _dither(step, block)
        for piece in _pieces(leaf, gradient, state, block):
            self._quantised(*piece, dither_B, settings)


def _pieces(leaf: Tensor, gradient: Tensor, state: dict[str, Tensor], block: int) -> Iterator[tuple[Tensor, ...]]:
    """Weight, gradient, both moments' codes (N, B) and scales (N, 1), of some blocks at a time: views, all but a strided gradient."""
    blocks = [tensor.reshape(-1, block) for tensor in (leaf, gradient, state["exp_avg"], state["exp_avg_sq"])]
    scales = [state[name].view(-1, 1) for name in ("exp_avg_scale", "exp_avg_sq_scale")]
    yield from zip(*(tensor.split(CHUNK.get(leaf.device.type, CHUNK["cuda"]) // block) for tensor in (*blocks, *scales)), strict=True)


def _dither(step: Tensor, block: int) -> Tensor:
    """Numbers in [0, 1), (B,), which over the steps come evenly in each place: multiples of the golden ratio."""
    places = torch.arange(block, device=step.device) * 0.7548776662
    return (torch.remainder(step, 4096) * 0.6180339887 + places) % 1.0


def _quantised_update(
    weight_NB: Tensor,
    gradient_NB: Tensor,
    mean_codes_NB: Tensor,
    square_codes_NB: Tensor,
    mean_scale_N1: Tensor,
    square_scale_N1: Tensor,
    dither_B: Tensor,
    settings: _Settings,
) -> None:
    mean_NB, square_NB = unpack_signed(mean_codes_NB, mean_scale_N1), unpack(square_codes_NB, square_scale_N1)
    _plain_update(weight_NB, gradient_NB, mean_NB, square_NB, settings)
    packed = *pack_signed(mean_NB, dither_B), *pack(square_NB, 1 - dither_B)
    for kept, new in zip((mean_codes_NB, mean_scale_N1, square_codes_NB, square_scale_N1), packed, strict=True):
        kept.copy_(torch.where(settings.taken > 0, new, kept))


def _plain_update(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, settings: _Settings) -> None:
    """Update weight and moments in place."""
    rate, root, decay, beta1, beta2, eps, taken = settings
    new_mean, new_square = mean.lerp(gradient, 1 - beta1), square.lerp(gradient.square(), 1 - beta2)
    moved = weight * decay - rate * new_mean / (new_square.sqrt() / root + eps)
    for kept, new in ((weight, moved), (mean, new_mean), (square, new_square)):
        kept.copy_(torch.where(taken > 0, new, kept))


def pack(x_NB: Tensor, dither_B: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers from 0 on -> codes (N, B), uint8, and scales (N, 1). What is more than 32 octaves below the largest becomes that."""
    scale_N1 = _scale(x_NB)
    return _level(_share(x_NB, scale_N1), TOP, dither_B).clamp(0, TOP).to(torch.uint8), scale_N1


def unpack(codes_NB: Tensor, scale_N1: Tensor) -> Tensor:
    return _value(codes_NB.int(), TOP) * scale_N1


def pack_signed(x_NB: Tensor, dither_B: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers -> codes (N, B), int8, and scales (N, 1). What is more than 16 octaves below the largest becomes that, or 0."""
    scale_N1 = _scale(x_NB)
    share_NB = _share(x_NB, scale_N1)
    level_NB = torch.where(share_NB < LEAST, (share_NB > LEAST * dither_B).int(), _level(share_NB, SIGNED_TOP, dither_B))
    return (level_NB.clamp(0, SIGNED_TOP) * x_NB.sign()).to(torch.int8), scale_N1


def unpack_signed(codes_NB: Tensor, scale_N1: Tensor) -> Tensor:
    codes_NB = codes_NB.int()
    return codes_NB.sign() * _value(codes_NB.abs(), SIGNED_TOP) * scale_N1


def _scale(x_NB: Tensor) -> Tensor:
    """Return the least power of two that is not below the largest number, (N, 1); 0 where all are 0."""
    most_N1 = x_NB.abs().amax(dim=1, keepdim=True)
    return ((most_N1.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def _share(x_NB: Tensor, scale_N1: Tensor) -> Tensor:
    return torch.where(scale_N1 > 0, x_NB.abs() / scale_N1, 0.0)


def _level(share_NB: Tensor, top: int, dither_B: Tensor) -> Tensor:
    """A float32's exponent and the first three bits behind it, counted so that 1.0 is `top`; up or down by the bits that are dropped."""
    return ((share_NB.view(torch.int32) + (dither_B * (1 << DROPPED)).int()) >> DROPPED) - (ONE - top)


def _value(level_NB: Tensor, top: int) -> Tensor:
    return ((level_NB + (ONE - top)) << DROPPED).view(torch.float32)
