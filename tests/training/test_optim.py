import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from microdit.config.schema import EMARecipe, EngineRecipe, OptimizerRecipe, PhaseRecipe
from microdit.distributed import start_world
from microdit.models.config import Size, resolve
from microdit.models.microdit import MicroDiT
from microdit.training.checkpointing import CheckpointWriter, load_into, newest_intact, whole
from microdit.training.optim import Optimizers, _bundles, learning_rate
from microdit.training.parallel import mesh_of, prepare_blocks, total_norm
from microdit.training.state import EMA, names_of


def small_model(**settings: object) -> MicroDiT:
    size = Size(dim=32, depth=3, head_dim=8, mixer_dim=16, mixer_depth=1, num_experts=2, round_ffn_to=8)
    return MicroDiT(resolve(replace(size, **settings)))


@given(warmup=st.integers(0, 50), final=st.floats(0, 1))
def test_the_learning_rate_warms_up_and_falls_to_its_share(warmup, final):
    phase = PhaseRecipe("p", 200, 1, 1e-3, warmup_steps=warmup, final_learning_rate=final)
    rates = [learning_rate(phase, step) for step in range(200)]
    assert max(rates) == pytest.approx(1e-3)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b - 1e-15 for a, b in pairwise(rates[warmup:]))
    assert rates[-1] == pytest.approx(1e-3 * final, abs=2e-6)


@pytest.mark.parametrize("warmup", [0, 40])
def test_the_learning_rate_is_composers(warmup):
    """Its CosineAnnealingWithWarmupScheduler, in whose words step t has t / t_warmup of the rate: nothing at the first one."""
    phase = PhaseRecipe("p", 200, 1, 1e-3, warmup_steps=warmup, final_learning_rate=0.33)
    for step in range(200):
        cosine = (1 + math.cos(math.pi * (step - warmup) / (200 - warmup))) / 2
        share = step / warmup if step < warmup else 0.33 + 0.67 * cosine
        assert learning_rate(phase, step) == pytest.approx(1e-3 * share, rel=1e-12), step


def test_a_constant_rate_is_constant():
    phase = PhaseRecipe("p", 100, 1, 8e-5)
    assert {learning_rate(phase, step) for step in range(100)} == {8e-5}


@pytest.mark.parametrize("decay", ["matrices", "all"])
@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_experts_learn_at_half_the_rate_and_what_is_asked_decays(method, decay):
    model = small_model()
    optimizers = Optimizers(model, OptimizerRecipe(method=method, expert_learning_rate=0.5, weight_decay=0.1, decay=decay))
    optimizers.set_rate(2e-3)
    of = {id(weight): group for optimizer in optimizers.all for group in optimizer.param_groups for weight in group["params"]}
    assert len(of) == len(list(model.parameters()))
    for name, weight in model.named_parameters():
        is_expert = name.endswith(("w_in", "w_out"))
        assert of[id(weight)]["lr"] == pytest.approx(1e-3 if is_expert else 2e-3), name
        assert of[id(weight)]["weight_decay"] == (0.1 if weight.dim() >= 2 or decay == "all" else 0.0), name
    assert any(name.endswith("w_in") for name, _ in model.named_parameters())


@pytest.mark.parametrize("routing", ["deferred", "maskdit", "sprint"])
def test_muon_has_the_matrices_inside_and_adamw_the_rest(routing):
    model = small_model(depth=5, routing=routing)
    adamw, muon = Optimizers(model, OptimizerRecipe(method="muon")).all
    names = {id(weight): name for name, weight in model.named_parameters()}
    by_muon = {names[id(weight)] for group in muon.param_groups for weight in group["params"]}
    expected = {
        name
        for name, weight in model.named_parameters()
        if name.startswith(("caption.", "blocks.", "mixer.", "decoder.")) and weight.dim() == 2 and not name.endswith("modulation.weight")
    }
    assert by_muon == expected
    assert any(name.startswith("decoder.") for name in by_muon) == (routing == "maskdit")
    assert len(by_muon) + sum(len(group["params"]) for group in adamw.param_groups) == len(names)


WAYS = [OptimizerRecipe("adamw"), OptimizerRecipe("adamw", moments="int8"), OptimizerRecipe("muon")]


@pytest.mark.parametrize("way", WAYS)
def test_the_state_goes_by_name_and_making_it_changes_no_weight(way):
    models = [small_model(), small_model()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [Optimizers(model, way) for model in models]

    def step(index: int, value: float) -> None:
        optimizers[index].set_rate(1e-3)
        for weight in models[index].parameters():
            weight.grad = torch.full_like(weight, value)
        optimizers[index].step()

    before = [weight.detach().clone() for weight in models[1].parameters()]
    made = optimizers[1].tensors()
    assert all(a.equal(b) for a, b in zip(before, models[1].parameters(), strict=True))
    assert all(not tensor.any() for tensor in made.values())
    step(0, 0.5)
    models[1].load_state_dict(models[0].state_dict())
    saved = optimizers[0].tensors()
    assert saved.keys() == made.keys()
    for name, tensor in saved.items():
        made[name].copy_(tensor)
    for index in (0, 1):
        step(index, -0.2)
    assert all(a.equal(b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("moments", ["float32", "int8"])
@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_one_step_is_adamw_of_the_formula(decay, moments):
    """And with `all`, norm gains and biases shrink as matrices do."""
    model = small_model()
    optimizers = Optimizers(model, OptimizerRecipe(decay=decay, moments=moments, expert_learning_rate=1.0))
    optimizers.set_rate(1e-2)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 0.3)
    optimizers.step()
    # after one step the moments, with their bias corrected, are the gradient and its square
    for name, weight in model.named_parameters():
        shrunk = before[name] * (1 - 1e-2 * 0.1) if weight.dim() >= 2 or decay == "all" else before[name]
        assert torch.allclose(weight, shrunk - 1e-2 * 0.3 / (0.3 + 1e-8), atol=1e-7 if moments == "float32" else 1e-3), name


@pytest.mark.parametrize(("start", "on_cpu"), [(0, False), (0, True), (10, False), (10, True)])
def test_the_average_equals_the_naive_sum(start, on_cpu):
    model = small_model()
    ema = EMA(model, EMARecipe(decay=0.9, start=start), on_cpu)
    naive = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for step in range(30):
        with torch.no_grad():
            ema.let_weights_change()
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        ema.update(step, torch.tensor(1.0))
        decay = min(0.9, (1 + step) / (10 + step)) if start == 0 else 0.9 if step >= start else 0.0
        for name, weight in model.named_parameters():
            naive[name] = decay * naive[name] + (1 - decay) * weight.detach()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    ema.update(30, torch.tensor(0.0))  # a step that was not taken
    for name, average in ema.averages.items():
        assert torch.allclose(average, naive[name], atol=1e-5)
        assert not average.requires_grad


def test_files_of_averages_are_named_by_their_length():
    assert names_of([EMARecipe(0.999), EMARecipe(0.9999), EMARecipe(0.99, 100)]) == ["ema", "ema-0.9999", "ema-0.99"]


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_not_taken_changes_no_weight_and_no_moment(way):
    model = small_model()
    optimizers = Optimizers(model, way)
    optimizers.set_rate(1e-3)

    def step(value: float, taken: float) -> list[torch.Tensor]:
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, value)
        optimizers.step(torch.tensor(taken))
        return [tensor.detach().clone() for tensor in (*model.parameters(), *optimizers.tensors().values())]

    first = step(0.5, 1.0)
    assert all(a.equal(b) for a, b in zip(first, step(math.nan, 0.0), strict=True))
    assert not all(a.equal(b) for a, b in zip(first, step(0.5, 1.0), strict=True))


@pytest.mark.parametrize("largest", [0.5, 1e6])
@pytest.mark.parametrize("way", WAYS)
def test_bundled_gradients_give_the_same_update(way, largest, monkeypatch):
    """Clipped or short enough, in bfloat16; beside the same ones in float32 and in the weights' `grad`."""
    monkeypatch.setattr("microdit.training.optim.BUNDLE", 3000)
    models = [small_model(), small_model()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [Optimizers(model, way) for model in models]
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradients = [torch.randn(weight.shape, generator=draw).bfloat16() for weight in models[0].parameters()]
        for weight, gradient in zip(models[0].parameters(), gradients, strict=True):
            weight.grad = gradient.float()
        norms = []
        for optimizer, held in zip(optimizers, (None, gradients), strict=True):
            optimizer.set_rate(1e-2)
            norms.append(total_norm(optimizer.take_gradients(held), None))
            optimizer.clip(largest, norms[-1])
            optimizer.step(torch.tensor(1.0))
            optimizer.zero_grad()
        assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert all(weight.grad is None for weight in models[1].parameters())


@given(sizes=st.lists(st.integers(1, 100), min_size=1), most=st.integers(1, 150))
def test_bundles_are_all_of_it_and_as_large_as_may_be(sizes, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("microdit.training.optim.BUNDLE", most)
        bundles = _bundles(sizes)
    assert [number for first, end in bundles for number in range(first, end)] == list(range(len(sizes)))
    assert all(end - first == 1 or sum(sizes[first:end]) <= most for first, end in bundles)
    assert all(sum(sizes[a:b]) + sizes[b] > most for a, b in bundles if b < len(sizes))


@pytest.mark.parametrize("way", WAYS)
def test_the_state_of_a_sharded_model_is_sharded_and_survives_a_checkpoint(way, tmp_path):
    world, models = start_world("cpu"), [small_model(), small_model()]
    found = []
    for model in models:
        prepare_blocks(model, EngineRecipe(sharding="fsdp"), mesh_of("fsdp", world), world.device)
        optimizers = Optimizers(model, way)
        optimizers.set_rate(1e-3)
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, 0.3) if model is models[0] else None
        if model is models[0]:
            optimizers.take_gradients()
            optimizers.step()
        found.append(optimizers.tensors())
    written, read = found
    for name, tensor in written.items():
        weight = models[0].get_parameter(name.partition("/")[0])
        assert isinstance(tensor, DTensor) == (isinstance(weight, DTensor) and tensor.dim() > 0), name
        assert tensor.dim() == 0 or len(tensor) == len(weight), name
    saver = CheckpointWriter(tmp_path, world, 1, None, pytest.fail)
    saver.save(1, written, {}, [])
    assert saver.finish()
    checkpoint = newest_intact(tmp_path, world, pytest.fail)
    load_into(checkpoint, read, world)
    assert all(whole(tensor).equal(whole(read[name])) for name, tensor in written.items())
    assert any(whole(tensor).any() for tensor in read.values())
    by_torch = {name: torch.zeros_like(whole(tensor)) for name, tensor in written.items()}
    load(by_torch, storage_reader=HuggingFaceStorageReader(str(checkpoint.folder / "shards")), no_dist=True)
    assert all(whole(tensor).equal(by_torch[name]) for name, tensor in written.items())
