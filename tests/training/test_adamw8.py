"""Beside AdamW in float32, whose steps they follow, and beside what quantising must do."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from microdit.planning.memory import BLOCK, block_size, moment_bytes
from microdit.training.adamw8 import LEAST, AdamW8, pack, pack_signed, unpack, unpack_signed

HALF = torch.full((BLOCK,), 0.5)


def numbers(seed: int, octaves: float = 4) -> Tensor:
    """(8, BLOCK), of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(8, BLOCK, generator=draw) * torch.exp2(octaves * torch.randn(8, BLOCK, generator=draw))


@given(seed=st.integers(0, 1000), size=st.integers(-60, 60))
def test_what_is_packed_comes_back_within_a_sixteenth(seed, size):
    x = numbers(seed, octaves=1) * 2.0**size
    within = x.abs() >= 2 * LEAST * x.abs().amax(dim=1, keepdim=True)
    error = (unpack_signed(*pack_signed(x, HALF)) - x).abs() / x.abs()
    assert error[within].max() <= 1 / 16 + 1e-6
    squares = x.abs()
    assert ((unpack(*pack(squares, HALF)) - squares).abs() / squares).max() <= 1 / 16 + 1e-6


@given(seed=st.integers(0, 1000), dither=st.floats(0, 0.999))
def test_what_was_unpacked_is_packed_as_it_was(seed, dither):
    for packing, unpacking, x in ((pack, unpack, numbers(seed).abs()), (pack_signed, unpack_signed, numbers(seed))):
        codes, scale = packing(x, HALF)
        again, its_scale = packing(unpacking(codes, scale), torch.full((BLOCK,), dither))
        assert unpacking(again, its_scale).equal(unpacking(codes, scale))


def test_dithering_is_unbiased_even_below_the_smallest_code():
    x = numbers(0, octaves=6)
    dithers = [torch.full((BLOCK,), (step + 0.5) / 512) for step in range(512)]
    for packing, unpacking, wanted in ((pack_signed, unpack_signed, x), (pack, unpack, x.abs())):
        mean = torch.stack([unpacking(*packing(wanted, dither)) for dither in dithers]).mean(dim=0)
        assert torch.allclose(mean, wanted, rtol=0.002, atol=LEAST * x.abs().max() / 256)


def test_zeros_stay_zeros():
    codes, scale = pack_signed(torch.zeros(2, BLOCK), HALF)
    assert not unpack_signed(codes, scale).any()
    assert not unpack(*pack(torch.zeros(2, BLOCK), HALF)).any()


def weights(seed: int = 0) -> list[nn.Parameter]:
    """A matrix, experts, one with small blocks, and a vector."""
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((24, 512), (2, 16, 48), (32, 16), (40,))]


def gradients(step: int) -> list[Tensor]:
    """Noisy, and of sizes from 1e-4 to 1 within each block."""
    draw = torch.Generator().manual_seed(100 + step)
    found = []
    for weight in weights():
        sizes = torch.logspace(-4, 0, weight.numel()).reshape(weight.shape).roll(7)
        found.append((torch.randn(weight.shape, generator=draw) + 0.3) * sizes)
    return found


def trained(optimizer_of, steps: int) -> list[nn.Parameter]:
    own = weights()
    optimizer = optimizer_of([{"params": own, "weight_decay": 0.1, "lr": 1e-3}])
    for step in range(steps):
        for weight, gradient in zip(own, gradients(step), strict=True):
            weight.grad = gradient
        optimizer.step()
    return own


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_it_goes_where_adamw_goes(beta2):
    """300 steps: each weight's way, as the share of AdamW's that it is away from it."""
    betas, before = (0.9, beta2), weights()
    exact = trained(lambda groups: torch.optim.AdamW(groups, betas=betas, eps=1e-8), 300)
    ours = trained(lambda groups: AdamW8(groups, betas, 1e-8), 300)
    for a, b, old in zip(exact, ours, before, strict=True):
        assert (b - a).norm() < 0.06 * (a - old).norm(), a.shape
    assert torch.allclose(exact[3], ours[3], atol=1e-6)  # vectors are not quantised


def test_a_second_moment_that_moves_slowly_is_followed():
    """Rounded to the nearest it would stay where it is: a thousandth a step is a hundredth of the way to the next level."""
    weight = nn.Parameter(torch.zeros(1, BLOCK))
    optimizer = AdamW8([{"params": [weight]}], (0.9, 0.999), 1e-8)
    expected = 0.0
    for step in range(1500):
        size = 1.0 if step < 500 else 0.1
        weight.grad = torch.full_like(weight, size)
        weight.grad[0, 0] = 1.0  # so that the block's scale stays
        expected = 0.999 * expected + 0.001 * size**2
        optimizer.step()
    state = optimizer.state[weight]
    square = unpack(state["exp_avg_sq"], state["exp_avg_sq_scale"])[0, 1:]
    assert square.mean().item() == pytest.approx(expected, rel=0.06)
    assert (square / expected).log2().abs().max() < 0.5


def test_moments_take_a_byte_a_number_and_their_scales():
    optimizer = AdamW8([{"params": (own := weights())}], (0.9, 0.999), 1e-8)
    for weight in own:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for weight in own:
        held = sum(tensor.nbytes for name, tensor in optimizer.state[weight].items() if name != "step")
        assert held == moment_bytes(len(weight), weight.shape)
    assert moment_bytes(24, own[0].shape) == 24 * 512 * 2 + 24 * 2 * 8
    assert [block_size(weight.shape) for weight in own] == [256, 256, 16, None]
    assert block_size(torch.Size([8, 1031])) is None  # a prime number


def test_a_step_that_is_not_taken_changes_nothing():
    own = weights()
    optimizer = AdamW8([{"params": own, "lr": 1e-3}], (0.9, 0.999), 1e-8)

    def step(number: int, taken: float) -> list[Tensor]:
        for weight, gradient in zip(own, gradients(number), strict=True):
            weight.grad = gradient if taken else gradient * math.nan
        optimizer.step(taken=torch.tensor(taken))
        return [tensor.detach().clone() for weight in own for tensor in (weight, *optimizer.state[weight].values())]

    assert all(a.equal(b) for a, b in zip(weights(), own, strict=True))
    step(0, 0.0)  # the very first one, too
    assert all(a.equal(b) for a, b in zip(weights(), own, strict=True))
    first = step(0, 1.0)
    assert all(a.equal(b) for a, b in zip(first, step(1, 0.0), strict=True))
    assert not any(a.equal(b) for a, b in zip(weights(), own, strict=True))
