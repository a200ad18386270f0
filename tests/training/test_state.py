"""A whole step gives the device its work and waits for none of it. The meta device holds no numbers, so reading any of them raises."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from microdit.config.schema import DataRecipe, EMARecipe, EngineRecipe, ModelRecipe, OptimizerRecipe, PhaseRecipe, Recipe, architecture
from microdit.data.dataset import StoredBatch
from microdit.data.packing import StoredRows
from microdit.diffusion.edm import EDM
from microdit.distributed import World
from microdit.models.routing import METHODS
from microdit.training.noise import NoiseSettings, StoredMicroBatch, sample_noise
from microdit.training.stability import SpikeGuard
from microdit.training.state import TrainingState, read_step

CPU, META = torch.device("cpu"), torch.device("meta")
PARTS, EACH, STEPS = 2, 4, 2


def recipe(routing: str, method: str, precision: str = "float32", **engine: bool) -> Recipe:
    decoder = 2 if METHODS[routing].decoder else None
    dense = (1, 1) if METHODS[routing].drop == "blocks" else None
    size = {"num_experts": 4, "round_ffn_to": 8, "routing": routing, "decoder_depth": decoder, "dense_blocks": dense}
    model = ModelRecipe(32, 4, 8, 16, 1, **size)
    return Recipe(
        "test",
        data=DataRecipe("nowhere"),
        model=model,
        phases=[PhaseRecipe("all", STEPS, PARTS * EACH, 1e-3)],
        optimizer=OptimizerRecipe(method),
        ema=[EMARecipe(0.9), EMARecipe(0.99, start=1)],
        engine=EngineRecipe(precision=precision, **engine),
    )


def parts(recipe: Recipe, step: int, eight_bits: bool, features: bool = False) -> list[StoredMicroBatch]:
    """Micro-batches as the loader gives them, with features of 24 channels on a grid of 4 x 4 if asked."""
    draw = torch.Generator().manual_seed(step)

    def rows(*shape: int) -> StoredRows:
        if not eight_bits:
            return StoredRows(torch.randn(shape, generator=draw).half(), None)
        scale = torch.rand(*shape[:2], 1, generator=draw).half() / 50
        return StoredRows(torch.randint(-127, 128, shape, generator=draw).to(torch.int8), scale)

    method, made = METHODS[recipe.model.routing], []
    for number in range(PARTS):
        lengths_B = torch.randint(1, 6, (EACH,), generator=draw)
        stored = StoredBatch(rows(EACH, 4, 256), (16, 16), torch.rand(EACH, generator=draw) < 0.5, rows(EACH, 5, 12), lengths_B)
        if features:
            maps = StoredRows(torch.randn(EACH, 16, 24, generator=torch.Generator().manual_seed(number)).half(), None)
            stored = replace(stored, features=maps, feature_sides=(4, 4))
        ratio = 0.75 if method.drop else 0.0
        settings = NoiseSettings(EDM(), ratio, 0.1, method.path_drop)
        numbers = range(number * EACH, (number + 1) * EACH)
        made.append(StoredMicroBatch(stored, partial(sample_noise, settings=settings, seed=0, step=step, numbers=numbers, grid=(8, 8))))
    return made


def run(recipe: Recipe, device: torch.device, steps: int = STEPS) -> tuple[list[torch.Tensor], list]:
    """The first `steps`. Returns the weights, averages and moments, and the steps' numbers, unread."""
    world = World(0, 1, device, None)
    state = TrainingState(recipe, architecture(recipe.model, 4, 12), world, None, fresh=True)
    guard = SpikeGuard(recipe.guard, device)
    readings = []
    for step in range(steps):
        readings.append(state.train_step(parts(recipe, step, eight_bits=step % 2 == 0), step, 1e-3, 1.0, guard))
    return [*state.tensors().values()], readings


@pytest.mark.parametrize(
    ("routing", "method", "precision"),
    [*((routing, "adamw", "float32") for routing in METHODS), ("deferred", "muon", "float32"), ("deferred", "adamw", "bfloat16")],
)
def test_no_number_is_read_from_the_device_in_a_step(routing, method, precision):
    """Routings differ within the model alone; the steps of one show what later steps do, and those of its optimizers."""
    steps = STEPS if routing == "deferred" else 1
    tensors, readings = run(recipe(routing, method, precision, activation_checkpointing=routing == "tread"), META, steps)
    assert all(tensor.device.type in ("meta", "cpu") for tensor in tensors)
    with pytest.raises((NotImplementedError, RuntimeError)):  # and reading them would have raised
        readings[-1].values()


@pytest.mark.parametrize("routing", list(METHODS))
def test_the_same_steps_on_a_cpu_learn(routing):
    tensors, readings = run(recipe(routing, "muon"), CPU)
    results = [read_step(reading.values()) for reading in readings]
    assert all(decision.taken and decision.grad_norm > 0 for _, decision in results)
    assert all(sum(sums.counts) == PARTS * EACH and sums.loss == pytest.approx(decision.loss) for sums, decision in results)
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_the_initial_weights_come_from_the_recipes_seed_alone():
    drawn = []
    for seed in (0, 0, 1):
        torch.rand(3)  # what else was drawn before makes no difference
        asked = replace(recipe("deferred", "adamw"), seed=seed)
        state = TrainingState(asked, architecture(asked.model, 4, 12), World(0, 1, CPU, None), None, fresh=True)
        drawn.append(torch.cat([weight.detach().flatten() for weight in state.model.parameters()]))
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])


def test_a_steps_gradients_are_clipped_to_the_norm_that_its_phase_allows():
    plain = recipe("deferred", "adamw")
    state = TrainingState(plain, architecture(plain.model, 4, 12), World(0, 1, CPU, None), None, fresh=True)
    _, decision = read_step(state.train_step(parts(plain, 0, True), 0, 1e-3, 0.01, SpikeGuard(plain.guard, CPU)).values())
    assert decision.grad_norm > 0.02
    moments = [tensor.flatten() for name, tensor in state.tensors().items() if name.endswith("/exp_avg")]
    assert torch.cat(moments).norm().item() == pytest.approx((1 - plain.optimizer.betas[0]) * 0.01, rel=1e-3)


def test_a_step_whose_loss_is_no_number_changes_nothing():
    plain = recipe("deferred", "muon")
    world = World(0, 1, CPU, None)
    state = TrainingState(plain, architecture(plain.model, 4, 12), world, None, fresh=True)
    guard = SpikeGuard(plain.guard, CPU)
    state.train_step(parts(plain, 0, True), 0, 1e-3, 1.0, guard)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    broken = parts(plain, 1, False)
    broken[1].stored.latents.numbers_BRV[0] = torch.nan
    _, decision = read_step(state.train_step(broken, 1, 1e-3, 1.0, guard).values())
    assert not decision.taken
    assert "nan" in decision.objection
    assert all(tensor.equal(before[name]) for name, tensor in state.tensors().items())
    _, decision = read_step(state.train_step(parts(plain, 1, True), 1, 1e-3, 1.0, guard).values())
    assert decision.taken
    assert not all(tensor.equal(before[name]) for name, tensor in state.tensors().items())
