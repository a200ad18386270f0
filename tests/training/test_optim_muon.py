"""Muon in float32, beside PyTorch's and beside the singular value decomposition it stands for."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C

from microdit.training.optim import Muon, orthogonalized
from microdit.training.parallel import Shard

COEFFICIENTS = (DEFAULT_A, DEFAULT_B, DEFAULT_C)
SHAPES = [(24, 8), (8, 24), (16, 16), (24, 8)]


def weights_and_gradients(steps: int) -> tuple[list[nn.Parameter], list[list[torch.Tensor]]]:
    draw = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    return weights, [[torch.randn(shape, generator=draw) for shape in SHAPES] for _ in range(steps)]


def ours(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = Muon([Shard(str(number), weight) for number, weight in enumerate(weights)], weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.02
    return optimizer


def pytorchs(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(weights, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


def after(kind: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The weights and the momentum."""
    weights, gradients = weights_and_gradients(steps)
    optimizer = kind(weights)
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    return [weight.detach() for weight in weights], [optimizer.state[weight]["momentum_buffer"] for weight in weights]


def test_it_steps_as_pytorchs_does_but_for_bfloat16s_rounding():
    mine_all, our_momentum = after(ours, 5)
    theirs, their_momentum = after(pytorchs, 5)
    start, _ = weights_and_gradients(0)
    for mine, other, first in zip(mine_all, theirs, start, strict=True):
        moved = (other - first.detach()).norm()
        assert (mine - other).norm() < 0.02 * moved
        assert moved > 0.1
    for mine, other in zip(our_momentum, their_momentum, strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 24, 8), (3, 8, 24), (1, 16, 16)])
def test_singular_vectors_stay_and_singular_values_come_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, values, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):  # what the iteration does to each singular value
        values = DEFAULT_A * values + DEFAULT_B * values**3 + DEFAULT_C * values**5
    result = orthogonalized(matrices, COEFFICIENTS, 5)
    assert torch.allclose(result, u @ torch.diag_embed(values) @ vh, atol=1e-9)
    assert 0.6 < torch.linalg.svdvals(orthogonalized(matrices, COEFFICIENTS, 8)).min() < 1.3


def test_a_gradient_of_zero_moves_nothing_but_decay():
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([Shard("w", weight)], weight_decay=0.5)
    optimizer.param_groups[0]["lr"] = 0.1
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.allclose(weight, torch.full((4, 4), 0.95))


def test_a_skipped_step_changes_nothing_even_with_nan_gradients():
    weights, ((*gradients,), *_) = weights_and_gradients(1)
    optimizer = ours(weights)
    for taken, scale in ((1.0, 1.0), (0.0, float("nan"))):
        before = [weight.detach().clone() for weight in weights]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient * scale
        momentum = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
        optimizer.step(taken=torch.tensor(taken))
    assert all(weight.equal(old) for weight, old in zip(weights, before, strict=True))
    assert all(state["momentum_buffer"].equal(old) for state, old in zip(optimizer.state.values(), momentum, strict=True))
    assert not weights[0].equal(weights_and_gradients(0)[0][0])
