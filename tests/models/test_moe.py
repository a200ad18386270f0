import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.models.moe import ExpertChoice


def make_experts(num_experts: int, capacity: float, seed: int = 0) -> ExpertChoice:
    torch.manual_seed(seed)
    experts = ExpertChoice(dim=6, hidden_dim=10, num_experts=num_experts, capacity=capacity).double()
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    return experts


def naive_experts(experts: ExpertChoice, x: torch.Tensor) -> torch.Tensor:
    """The definition, one sample, one expert and one token at a time."""
    out = torch.zeros_like(x)
    for sample in range(len(x)):
        probabilities = (x[sample] @ experts.router.weight.T).softmax(dim=-1)
        for expert in range(experts.num_experts):
            takes = int(experts.capacity * x.shape[1] / experts.num_experts)
            for token in probabilities[:, expert].argsort(descending=True)[:takes]:
                hidden = torch.nn.functional.gelu(x[sample, token] @ experts.w_in[expert])
                out[sample, token] += probabilities[token, expert] * (hidden @ experts.w_out[expert])
    return out


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 12), experts=st.integers(2, 4), capacity=st.sampled_from([0.5, 1.0, 2.0]),
    seed=st.integers(0, 100),
)  # fmt: skip
def test_gather_and_scatter_equal_the_naive_loop(batch, tokens, experts, capacity, seed):
    # one expert alone would score every token 1, and which of equals it takes is nobody's business
    layer = make_experts(experts, capacity, seed)
    x = torch.randn(batch, tokens, 6, dtype=torch.float64)
    assert torch.allclose(layer(x), naive_experts(layer, x), atol=1e-10)


def test_gradients_equal_those_of_the_naive_loop():
    layer = make_experts(4, 2.0)
    x = torch.randn(2, 8, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).square().sum(), leaves)
    naive = torch.autograd.grad(naive_experts(layer, x).square().sum(), leaves)
    for ours_one, naive_one in zip(ours, naive, strict=True):
        assert torch.allclose(ours_one, naive_one, atol=1e-9)


@pytest.mark.parametrize("capacity", [1.0, 2.0])
def test_samples_of_a_batch_do_not_compete(capacity):
    layer = make_experts(4, capacity)
    x = torch.randn(3, 8, 6, dtype=torch.float64)
    alone = torch.cat([layer(sample.unsqueeze(0)) for sample in x])
    assert torch.allclose(layer(x), alone, atol=1e-12)
