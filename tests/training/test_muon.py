"""Muon in float32, beside PyTorch's and beside the singular value decomposition it stands for."""

import pytest
import torch
from torch import nn
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C

from microdit.training.muon import CPUMuon, orthogonalized

COEFFICIENTS = (DEFAULT_A, DEFAULT_B, DEFAULT_C)
SHAPES = [(24, 8), (8, 24), (16, 16), (24, 8)]


def weights_and_gradients(steps: int) -> tuple[list[nn.Parameter], list[list[torch.Tensor]]]:
    draw = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    return weights, [[torch.randn(shape, generator=draw) for shape in SHAPES] for _ in range(steps)]


def after(kind: type[torch.optim.Muon], steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The weights and the momentum."""
    weights, gradients = weights_and_gradients(steps)
    optimizer = kind(weights, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    return [weight.detach() for weight in weights], [optimizer.state[weight]["momentum_buffer"] for weight in weights]


def test_it_steps_as_pytorchs_does_but_for_bfloat16s_rounding():
    ours, our_momentum = after(CPUMuon, 5)
    theirs, their_momentum = after(torch.optim.Muon, 5)
    start, _ = weights_and_gradients(0)
    for mine, other, first in zip(ours, theirs, start, strict=True):
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
    optimizer = CPUMuon([weight], lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.allclose(weight, torch.full((4, 4), 0.95))
