"""Training steps with representation alignment: what is aligned, what the gradients are, and what a checkpoint holds."""

from dataclasses import replace

import pytest
import torch

from microdit.config.schema import AlignmentRecipe, OptimizerRecipe, Recipe, architecture
from microdit.diffusion.edm import EDM
from microdit.distributed import World
from microdit.models.alignment import Alignment, ProjectorShape
from microdit.models.microdit import MicroDiT
from microdit.models.routing import METHODS
from microdit.training.gradients import AutogradGradients, WholeModelGradients
from microdit.training.noise import TrainingBatch
from microdit.training.parallel import DenoisingLoss
from microdit.training.stability import SpikeGuard
from microdit.training.state import TrainingState, read_step
from tests.training.test_state import CPU, EACH, META, PARTS, parts, recipe

CHANNELS = 24
ALONE = World(0, 1, CPU, None)


def aligned(routing: str = "deferred", method: str = "adamw", **settings: object) -> Recipe:
    return replace(recipe(routing, method), alignment=AlignmentRecipe("efficientnet", 2, width=16, **settings))


def state_of(made: Recipe, device: torch.device = CPU) -> TrainingState:
    world = World(0, 1, device, None)
    return TrainingState(made, architecture(made.model, 4, 12), world, None, fresh=True, feature_channels=CHANNELS)


def busy(state: TrainingState) -> TrainingState:
    """Fresh weights are zero in places; these are not."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in state.model.parameters():
            weight.add_(torch.randn(weight.shape, generator=draw) * 0.1)
    return state


def batches(made: Recipe, features: bool = True) -> list[TrainingBatch]:
    return [part.to(CPU) for part in parts(made, 0, True, features)]


class Watched(Alignment):
    """Remembers what it was given."""

    def forward(self, tokens_BKD, features_BEYX, grid, keep_ids_BK=None):
        self.given = tokens_BKD, grid, keep_ids_BK
        return super().forward(tokens_BKD, features_BEYX, grid, keep_ids_BK)


@pytest.mark.parametrize("attention", ["cross", "joint"])
@pytest.mark.parametrize("routing", METHODS)
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_the_tokens_are_those_that_the_block_sees(routing, attention, kind):
    """At every block; and what alignment adds to the gradients is a central difference of the similarity, in float64."""
    made = recipe(routing, "adamw")
    made = replace(made, model=replace(made.model, num_experts=0, attention=attention))
    model = MicroDiT(architecture(made.model, 4, 12)).double()
    draw = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape, generator=draw, dtype=torch.float64) * 0.2
    batch = batches(made)[0].map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    kept = 16 if METHODS[routing].drop else 64
    seen = [tokens for shape, width, tokens in model.config.tokens_by_block(64, kept) if width == 32]
    for block in range(1, 5):
        alignment = Watched(ProjectorShape(kind, 32, 8, CHANNELS), block, weight=0.7).double()
        loss = DenoisingLoss(model, EDM(), True, alignment)
        losses = loss(batch)
        tokens, grid, keep_ids = alignment.given
        assert tokens.shape == (EACH, seen[block - 1], 32)
        assert grid == (8, 8)
        assert (keep_ids is None) == (tokens.shape[1] == 64)
        assert torch.allclose(losses.total_B, losses.denoising_B - 0.7 * losses.alignment_B)
        plain = DenoisingLoss(model, EDM(), True)(batch)
        assert plain.total_B.equal(losses.denoising_B)
    weights = list(loss.parameters())
    directions = [torch.randn(weight.shape, generator=draw, dtype=torch.float64) for weight in weights]
    both, of_noise = (torch.autograd.grad(one.total_B.sum(), weights, materialize_grads=True) for one in (losses, plain))
    slope = sum(((ours - other) * direction).sum() for ours, other, direction in zip(both, of_noise, directions, strict=True))
    values = []
    for step in (1e-6, -2e-6):
        for weight, direction in zip(weights, directions, strict=True):
            weight.data += step * direction
        values.append(-0.7 * loss(batch).alignment_B.sum().item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope.item(), rel=1e-5)


def test_a_step_without_features_has_the_gradients_of_an_unaligned_run():
    """Behind `until`: same initial weights, same losses, same gradients, and no gradient of the projector."""
    plain, other = busy(state_of(recipe("deferred", "adamw"))), busy(state_of(aligned()))
    assert all(a.equal(b) for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True))
    found = []
    for state in (plain, other):
        gradients = AutogradGradients(state.loss)
        losses = [gradients.add(batch, PARTS * EACH, last=False).total_B for batch in batches(aligned(), features=False)]
        found.append([*losses, *(weight.grad for weight in state.model.parameters())])
    assert all(a.equal(b) for a, b in zip(*found, strict=True))
    assert all(weight.grad is None for weight in other.alignment.parameters())


def test_the_seed_draws_the_projector_and_other_random_numbers_stay():
    made = aligned()
    torch.manual_seed(5)
    drawn = []
    for seed in (0, 0, 1):
        state = state_of(replace(made, seed=seed))
        drawn.append(torch.cat([weight.detach().flatten() for weight in state.alignment.parameters()]))
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])
    torch.manual_seed(0)
    state_of(recipe("deferred", "adamw"))
    after = torch.rand(1)
    torch.manual_seed(0)
    state_of(made)
    assert torch.rand(1).equal(after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("release", [False, True])
def test_micro_batches_have_the_gradients_of_the_whole(dtype, release):
    state, made = busy(state_of(aligned("deferred", projector="conv"))), aligned()
    both = batches(made)
    whole = TrainingBatch(
        *(None if a is None else torch.cat([a, b]) for a, b in zip(*(vars(batch).values() for batch in both), strict=True))
    )
    exact = AutogradGradients(state.loss)
    exact.add(whole, PARTS * EACH, last=True)
    expected = [weight.grad for weight in state.loss.parameters()]
    for weight in state.loss.parameters():
        weight.grad = None
    gradients = WholeModelGradients(state.loss, dtype, False, ALONE, release)
    gradients.begin()
    losses = [gradients.add(batch, PARTS * EACH, last=number == PARTS - 1) for number, batch in enumerate(both)]
    found = [weight.grad for weight in state.loss.parameters()]
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert all((a - b).norm() < tolerance * b.norm() + 1e-7 for a, b in zip(found, expected, strict=True))
    assert all(part.alignment_B.shape == (EACH,) and not part.alignment_B.requires_grad for part in losses)
    assert all(weight.grad.any() for weight in state.alignment.parameters())


@pytest.mark.parametrize(("method", "moments"), [("adamw", "float32"), ("adamw", "int8"), ("muon", "float32")])
def test_a_step_trains_the_projector_and_averages_the_model_alone(method, moments):
    made = aligned(method=method)
    made = replace(made, optimizer=OptimizerRecipe(method, moments))
    state = state_of(made)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    guard = SpikeGuard(made.guard, CPU)
    results = [read_step(state.train_step(batches(made), step, 1e-2, 1.0, guard).values())[0] for step in range(20)]
    assert results[-1].alignment > results[0].alignment + 0.1
    assert sum(results[0].counts) == PARTS * EACH
    after = state.tensors()
    parts_of = {name.split("/")[0] for name in after}
    assert parts_of == {"model", "ema", "ema-0.99", "optimizer", "alignment"}
    projector = [name for name in after if name.startswith("alignment/")]
    assert projector == [f"alignment/projector.{layer}.{part}" for layer in (0, 2, 4) for part in ("weight", "bias")]
    assert all(not after[name].equal(before[name]) for name in projector)
    assert all(f"optimizer/alignment.{name.removeprefix('alignment/')}/exp_avg" in after or moments == "int8" for name in projector)
    assert {name.removeprefix("ema/") for name in after if name.startswith("ema/")} == {name for name, _ in state.model.named_parameters()}
    assert "alignment" not in "".join(name for name, _ in state.ema_model().named_parameters())


def test_the_guard_and_the_metrics_see_the_denoising_loss_alone():
    made = aligned(weight=100.0)
    state = state_of(made)
    result, decision = read_step(state.train_step(batches(made), 0, 1e-3, 1.0, SpikeGuard(made.guard, CPU)).values())
    plain = state_of(recipe("deferred", "adamw"))
    expected, _ = read_step(plain.train_step(batches(made, features=False), 0, 1e-3, 1.0, SpikeGuard(made.guard, CPU)).values())
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert decision.loss == pytest.approx(expected.loss, rel=1e-6)
    assert expected.alignment is None
    assert -1 < result.alignment < 1


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_no_number_is_read_from_the_device_in_an_aligned_step(kind):
    made = aligned(projector=kind, spatial_norm=True)
    state = state_of(made, META)
    reading = state.train_step(parts(made, 0, True, features=True), 0, 1e-3, 1.0, SpikeGuard(made.guard, META))
    with pytest.raises((NotImplementedError, RuntimeError)):  # the step is queued, and reading its numbers would have raised
        reading.values()


def test_recomputed_blocks_are_aligned_with_the_same_gradients():
    states = []
    for share in (False, True):
        made = aligned()
        made = replace(made, engine=replace(made.engine, activation_checkpointing=share))
        state = busy(state_of(made))
        AutogradGradients(state.loss).add(batches(made)[0], EACH, last=True)
        states.append([weight.grad for weight in state.loss.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*states, strict=True))


def test_an_alignment_ends_with_its_share_of_the_run_whatever_the_phases():
    phases = [replace(recipe("none", "adamw").phases[0], name=name, steps=steps) for name, steps in (("a", 10), ("b", 30))]
    made = replace(aligned(until=0.5), phases=phases)
    assert [made.aligned_at(step) for step in range(40)] == [True] * 20 + [False] * 20
    alone = [made.alone(phase) for phase in phases]
    assert [one.aligned_steps for one in alone] == [10, 10]
    late = replace(made, alignment=replace(made.alignment, until=0.2))
    assert late.alone(phases[0]).aligned_steps == 8
    assert late.alone(phases[1]).alignment is None
    assert replace(made, alignment=None).aligned_steps == 0
