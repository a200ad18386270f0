"""Compiled functions that have a backward pass of their own agree with the eager ones, whose gradients autograd computes."""

import pytest
import torch
from torch._dynamo.utils import counters

from microdit.models.elementwise import EAGER, compiled


def outputs_and_gradients(function, inputs, trained):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:trained]]
    outputs = function(*leaves, *inputs[trained:])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pull = [torch.linspace(-1, 1, output.numel()).view_as(output) ** 3 for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, pull)]


def tokens_of_experts(samples, tokens, experts, each):
    """Each expert takes other tokens: some tokens are taken by several experts, others by none."""
    token_BEK = torch.rand(samples, experts, tokens).topk(each).indices
    return (token_BEK + torch.arange(0, samples * tokens, tokens).view(-1, 1, 1)).transpose(0, 1).flatten(1)


def inputs_of(name, samples):
    torch.manual_seed(samples)
    if name == "split_normalised":
        return [torch.randn(samples, 5, 3 * 8), 3], 1
    token_EM = tokens_of_experts(samples, 6, 4, 2)
    if name == "take_chosen":
        return [torch.randn(samples * 6, 8), token_EM], 1
    return [torch.randn(4, samples * 2, 8), torch.rand(4, samples * 2), token_EM, samples * 6], 2


@pytest.mark.parametrize("name", ["split_normalised", "take_chosen", "add_weighted"])
def test_compiled_equals_eager_at_any_batch_size_with_one_compilation(name):
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for samples in (3, 4, 7):
        ours = outputs_and_gradients(getattr(compiled(), name), *inputs_of(name, samples))
        theirs = outputs_and_gradients(getattr(EAGER, name), *inputs_of(name, samples))
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert len(set(graphs)) == 1


def test_a_token_without_experts_gets_zero_beside_infinite_outputs():
    y_EMD = torch.full((2, 1, 3), torch.inf)
    sums_ND = compiled().add_weighted(y_EMD, torch.ones(2, 1), torch.tensor([[1], [1]]), 4)
    assert torch.equal(sums_ND[[0, 2, 3]], torch.zeros(3, 3))
    assert torch.isinf(sums_ND[1]).all()
