from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microdit.model.microdit import MicroDiT
from microdit.model.sizes import Size, resolve
from microdit.recipe import OptimizerRecipe, PhaseRecipe
from microdit.training.ema import EMA
from microdit.training.optim import learning_rate, make_adamw, set_learning_rate


def small_model() -> MicroDiT:
    return MicroDiT(resolve(Size(dim=32, depth=3, head_dim=8, mixer_dim=16, mixer_depth=1, num_experts=2, round_ffn_to=8)))


@given(warmup=st.integers(0, 50), final=st.floats(0, 1))
def test_the_learning_rate_warms_up_and_falls_to_its_share(warmup, final):
    phase = PhaseRecipe("p", 200, 1, 1e-3, warmup_steps=warmup, final_learning_rate=final)
    rates = [learning_rate(phase, step) for step in range(200)]
    assert max(rates) == pytest.approx(1e-3)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b - 1e-15 for a, b in pairwise(rates[warmup:]))
    assert rates[-1] == pytest.approx(1e-3 * final, abs=2e-6)


def test_a_constant_rate_is_constant():
    phase = PhaseRecipe("p", 100, 1, 8e-5)
    assert {learning_rate(phase, step) for step in range(100)} == {8e-5}


def test_experts_learn_at_half_the_rate_and_only_matrices_decay():
    model = small_model()
    optimizer = make_adamw(model, OptimizerRecipe(expert_learning_rate=0.5, weight_decay=0.1))
    set_learning_rate(optimizer, 2e-3)
    of = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
    assert len(of) == len(list(model.parameters()))
    for name, weight in model.named_parameters():
        is_expert = name.endswith(("w_in", "w_out"))
        assert of[id(weight)]["lr"] == pytest.approx(1e-3 if is_expert else 2e-3), name
        assert of[id(weight)]["weight_decay"] == (0.1 if weight.dim() >= 2 else 0.0), name
    assert any(name.endswith("w_in") for name, _ in model.named_parameters())


def test_one_step_is_adamw_of_the_formula():
    model = small_model()
    optimizer = make_adamw(model, OptimizerRecipe())
    set_learning_rate(optimizer, 1e-2)
    before = model.blocks[0].attn.qkv.weight.detach().clone()
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 0.3)
    optimizer.step()
    # after one step the moments, with their bias corrected, are the gradient and its square
    expected = before * (1 - 1e-2 * 0.1) - 1e-2 * 0.3 / (0.3 + 1e-8)
    assert torch.allclose(model.blocks[0].attn.qkv.weight, expected, atol=1e-7)


def test_the_average_equals_the_naive_sum():
    model = small_model()
    ema = EMA(model, decay=0.9)
    naive = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for step in range(30):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, weight in model.named_parameters():
            naive[name] = decay * naive[name] + (1 - decay) * weight.detach()
    for name, weight in ema.model.named_parameters():
        assert torch.allclose(weight, naive[name], atol=1e-5)
        assert not weight.requires_grad
