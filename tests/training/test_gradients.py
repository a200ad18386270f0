"""Gradients by a copy of the model in another precision, beside those of autograd and of FSDP. Recording and replaying them needs a GPU."""

from dataclasses import replace

import pytest
import torch

from microdit.config.schema import EngineRecipe, OptimizerRecipe, architecture
from microdit.distributed import World, start_world
from microdit.training.gradients import AutogradGradients, WholeModelGradients
from microdit.training.parallel import DenoisingLoss, mesh_of, prepare_blocks, shard_the_rest
from microdit.training.stability import SpikeGuard
from microdit.training.state import TrainingState
from tests.training.test_state import CPU, EACH, PARTS, parts, recipe

ALONE = World(0, 1, CPU, None)


def fresh(precision: str = "float32") -> TrainingState:
    made = recipe("deferred", "adamw", precision)
    state = TrainingState(made, architecture(made.model, 4, 12), ALONE, None, fresh=True)
    with torch.no_grad():  # fresh weights are zero in places
        draw = torch.Generator().manual_seed(3)
        for weight in state.model.parameters():
            weight.add_(torch.randn(weight.shape, generator=draw) * 0.05)
    return state


def summed(gradients: WholeModelGradients | AutogradGradients, model: torch.nn.Module) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Over two micro-batches; and their losses."""
    batches = [part.to(CPU) for part in parts(recipe("deferred", "adamw"), 0, True)]
    gradients.begin()
    losses = [gradients.add(batch, PARTS * EACH, last=number == PARTS - 1).total_B.clone() for number, batch in enumerate(batches)]
    found = [weight.grad.clone() for weight in model.parameters()]
    for weight in model.parameters():
        weight.grad = None
    return found, torch.cat(losses)


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    distance = torch.stack([(a.full_tensor() if hasattr(a, "full_tensor") else a).sub(b).norm() for a, b in zip(theirs, ours, strict=True)])
    return (distance.norm() / torch.stack([a.norm() for a in ours]).norm()).item()


def test_in_float32_the_sums_are_autograds_own_also_in_the_next_step():
    state = fresh()
    whole, plain = WholeModelGradients(state.loss, torch.float32, replay=False, world=ALONE), AutogradGradients(state.loss)
    for _ in range(2):
        ours, our_losses = summed(whole, state.model)
        theirs, their_losses = summed(plain, state.model)
        assert our_losses.equal(their_losses)
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(ours, theirs, strict=True))
        assert max(gradient.norm() for gradient in ours) > 0


def test_in_bfloat16_they_are_those_of_fsdp_and_near_those_of_float32():
    state, other = fresh(), fresh()
    ours, our_losses = summed(WholeModelGradients(state.loss, torch.bfloat16, replay=False, world=ALONE), state.model)
    exact, exact_losses = summed(AutogradGradients(state.loss), state.model)
    engine, world = EngineRecipe(precision="bfloat16", sharding="fsdp"), start_world("cpu")
    mesh = mesh_of("fsdp", world)
    prepare_blocks(other.model, engine, mesh, world.device)
    sharded = DenoisingLoss(other.model, other.objective, True)
    shard_the_rest(sharded, engine, mesh, world.device)
    theirs, their_losses = summed(AutogradGradients(sharded), other.model)
    assert torch.allclose(our_losses, their_losses, rtol=1e-4)
    assert difference(ours, theirs) < 0.01
    assert difference(exact, ours) < 0.05
    assert torch.allclose(our_losses, exact_losses, rtol=0.05)
    assert all(gradient.dtype == torch.float32 for gradient in ours)


def test_the_copy_follows_the_weights():
    state = fresh("bfloat16")
    assert isinstance(state.gradients, WholeModelGradients)
    batch, guard = parts(recipe("deferred", "adamw"), 0, True)[0].to(CPU), SpikeGuard(recipe("deferred", "adamw").guard, CPU)
    with torch.no_grad():
        before = state.gradients.current_loss()(batch).total_B.mean().item()
    for _ in range(10):
        state.train_step([batch], 0, 1e-3, 1.0, guard)
    with torch.no_grad():
        after = state.gradients.current_loss()(batch).total_B.mean().item()
        of_float32 = state.loss(batch).total_B.mean().item()
    assert after < before
    assert after == pytest.approx(of_float32, rel=0.02)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_released_gradients_are_the_same_ones(precision):
    """Of two micro-batches in the sums; of one, as they are, held for the optimizer; and again of two, in the next step."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    state, other = fresh(), fresh()
    kept, released = (
        WholeModelGradients(state.loss, dtype, False, ALONE),
        WholeModelGradients(other.loss, dtype, False, ALONE, release=True),
    )
    for _ in range(2):
        ours, losses = summed(released, other.model)
        theirs, their_losses = summed(kept, state.model)
        assert released.held is None
        assert losses.equal(their_losses)
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(ours, theirs, strict=True))
        batch = parts(recipe("deferred", "adamw"), 0, True)[0].to(CPU)
        for gradients in (kept, released):
            gradients.begin()
            gradients.add(batch, EACH, last=True)
        assert all(weight.grad is None for weight in other.model.parameters())
        assert all(held.dtype == dtype for held in released.held)
        assert all(held.float().equal(weight.grad) for held, weight in zip(released.held, state.model.parameters(), strict=True))


def test_a_step_of_released_gradients_is_the_same_step():
    """Clipped, with moments in 8 bits and recomputed blocks."""
    states = []
    for release in (False, True):
        made = recipe("deferred", "adamw", "bfloat16", release_gradients=release, activation_checkpointing=0.5 * release)
        made = replace(made, optimizer=OptimizerRecipe(moments="int8"))
        state = TrainingState(made, architecture(made.model, 4, 12), World(0, 1, CPU, None), None, fresh=True)
        guard = SpikeGuard(made.guard, CPU)
        for step in range(3):
            batches = parts(made, step, True)[: 1 + step % 2]
            state.train_step([batch.to(CPU) for batch in batches], step, 1e-3, 0.1, guard)
        states.append(state)
    before = fresh()
    kept, released = (state.tensors() for state in states)
    for name, tensor in kept.items():
        if name.startswith(("model/", "ema/")):
            assert torch.allclose(tensor, released[name], atol=1e-5), name
    assert not all(tensor.equal(released[f"model/{name}"]) for name, tensor in before.model.named_parameters())
