"""However the work is spread, the losses are the same: each against one plain process."""

import copy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from microdit.data.latents import Batch
from microdit.diffusion.edm import EDM
from microdit.model.blocks import layer_norm
from microdit.model.microdit import MicroDiT
from microdit.model.sizes import Size, resolve
from microdit.recipe import EngineRecipe
from microdit.training.draws import add_draws
from microdit.training.parallel import compile_blocks, compute_dtype, sharding_of
from microdit.training.step import DenoisingLoss
from tests.training.processes import RECIPE, losses, train

SETTINGS = ("phases.0.steps=30", "phases.1.steps=20", "phases.0.learning_rate=4e-3", "phases.1.batch_size=8")  # 50 steps that learn


def losses_of(run: Path, data: Path, *more: object, ranks: int = 1) -> dict[int, float]:
    running = train(run, data, *SETTINGS, *more, ranks=ranks)
    assert running.wait() == [0] * ranks, running.output
    return losses(run)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, encoded_emoji) -> Path:
    run = tmp_path_factory.mktemp("plain") / "run"
    learning = losses_of(run, encoded_emoji)
    still = losses_of(run.with_name("still"), encoded_emoji, "phases.0.learning_rate=1e-30", "phases.1.learning_rate=1e-30")
    assert abs(learning[50] - still[50]) > 0.01  # a thousand times what other ways may differ by
    return run


@pytest.mark.parametrize(
    ("engine", "ranks"),
    [
        (["engine.sharding=fsdp"], 2),
        (["engine.sharding=ddp"], 2),
        (["engine.sharding=fsdp"], 1),
        (["engine.micro_batch=2"], 1),
        (["engine.micro_batch=2", "engine.sharding=ddp"], 2),
        (["engine.micro_batch=2", "engine.sharding=fsdp", "engine.activation_checkpointing=true"], 2),
        (["engine.activation_checkpointing=true"], 1),
    ],
    ids=lambda value: "-".join(setting.removeprefix("engine.") for setting in value) if isinstance(value, list) else str(value),
)
def test_the_losses_of_50_steps_are_the_same(tmp_path, encoded_emoji, plain, engine, ranks):
    """Experts included: the recipe has them in every block but the last."""
    assert losses_of(tmp_path / "run", encoded_emoji, *engine, ranks=ranks) == pytest.approx(losses(plain), abs=1e-5)


def test_micro_batches_of_4_of_16_equal_the_whole(tmp_path, encoded_emoji):
    sixteen = ("phases.0.batch_size=16", "phases.1.batch_size=16")
    whole = losses_of(tmp_path / "whole", encoded_emoji, *sixteen)
    assert losses_of(tmp_path / "parts", encoded_emoji, *sixteen, "engine.micro_batch=4") == pytest.approx(whole, abs=1e-5)


def test_averages_are_sharded_and_saved_as_the_same_numbers(tmp_path, encoded_emoji, plain):
    """Two lengths at once; the second begins later, as a copy."""
    emas = ["ema=[{decay: 0.9}, {decay: 0.5, start: 45}]", "record.checkpoint_every=45"]
    losses_of(tmp_path / "one", encoded_emoji, *emas)
    losses_of(tmp_path / "two", encoded_emoji, *emas, "engine.sharding=fsdp", ranks=2)

    def weights(run: str, name: str, step: int = 50) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")

    for name in ("model", "ema", "ema-0.5"):
        one, two = weights("one", name), weights("two", name)
        assert one.keys() == two.keys() == weights("one", "model").keys()
        assert max((one[key] - two[key]).abs().max() for key in one) < 1e-4, name
    at_45, average = weights("one", "model", 45), weights("one", "ema-0.5", 45)
    assert all(at_45[key].equal(average[key]) for key in at_45)
    assert any(not weights("one", "model")[key].equal(weights("one", "ema-0.5")[key]) for key in at_45)


def test_muon_sharded_equals_muon_alone(tmp_path, encoded_emoji, plain):
    settings = ("optimizer.method=muon", "phases.0.steps=4", "phases.1.steps=2", "engine.precision=float32")
    one = losses_of(tmp_path / "one", encoded_emoji, *settings)
    two = losses_of(tmp_path / "two", encoded_emoji, *settings, "engine.sharding=fsdp", ranks=2)
    assert two == pytest.approx(one, abs=1e-5)
    assert any(abs(one[step] - losses(plain)[step]) > 1e-4 for step in one)


def test_bfloat16_is_near_float32_and_not_the_same(tmp_path, encoded_emoji, plain):
    exact = losses(plain)
    for name, more in (("autocast", []), ("fsdp", ["engine.sharding=fsdp"])):
        rough = losses_of(tmp_path / name, encoded_emoji, "engine.precision=bfloat16", *more)
        worst = max(abs(rough[step] - exact[step]) for step in exact)
        assert 1e-6 < worst < 0.05, name
        saved = load_file(tmp_path / name / "checkpoints" / "step-00000050" / "model.safetensors")
        assert all(tensor.dtype == torch.float32 for tensor in saved.values())


def test_norms_compute_in_float32_whatever_comes_in():
    """The model's layer norms on bfloat16 tokens: the float32 result, rounded once, but for ties of rounding."""
    norm = layer_norm(1024)
    x = (torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * 3 + 5).bfloat16()
    in_float32 = norm(x.float()).bfloat16()
    rounded = norm.bfloat16()(x)
    assert (rounded != in_float32).float().mean() < 1e-3
    assert torch.allclose(rounded.float(), in_float32.float(), rtol=2**-7, atol=1e-6)


def small_losses(**settings: object) -> list[DenoisingLoss]:
    """The same module twice, no weight of it zero."""
    torch.manual_seed(0)
    size = Size(dim=32, depth=2, head_dim=8, mixer_dim=16, mixer_depth=1, num_experts=4, experts_every=1, round_ffn_to=8)
    model = MicroDiT(resolve(replace(size, **settings), caption_channels=12))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return [DenoisingLoss(m, EDM(), mask_padding=True) for m in (model, copy.deepcopy(model))]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"routing": "sprint", "dense_blocks": (0, 1)}, marks=pytest.mark.slow),
        pytest.param({"routing": "maskdit", "depth": 1, "decoder_depth": 1}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: settings.get("routing", "deferred"),
)
def test_compiled_blocks_compute_the_same_and_compile_once_for_all_mask_ratios(settings):
    eager, compiled = small_losses(**settings)
    torch._dynamo.reset()
    compile_blocks(compiled.model.all_blocks)
    graphs = []
    counters.clear()
    for step, ratio in enumerate((0.75, 0.0, 0.5, 0.3, 0.9)):
        length = 5 + step % 2
        text_mask_BL = torch.arange(length) < torch.tensor([[3], [5], [2], [4]])
        batch = Batch(torch.randn(4, 4, 16, 16), torch.randn(4, length, 12), text_mask_BL)
        drawn = add_draws(batch, EDM(), 0, step, range(4), (8, 8), ratio, 0.1)
        values = [loss(drawn).mean() for loss in (eager, compiled)]
        for value in values:
            value.backward()
        assert values[1].item() == pytest.approx(values[0].item(), rel=1e-5)
        for (name, ours), theirs in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4), name
        eager.zero_grad(), compiled.zero_grad()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] >= len({(shape, width) for shape, width, _ in eager.model.config.tokens_by_block(64, 64)})  # of each kind of block
    assert len(set(graphs)) == 1


@pytest.mark.slow
def test_the_trainer_compiled_equals_the_trainer_eager(tmp_path, encoded_emoji, plain):
    compiled = losses_of(tmp_path / "run", encoded_emoji, "engine.compile=true")
    assert compiled == pytest.approx(losses(plain), abs=1e-4)


def test_what_auto_means():
    class World:
        def __init__(self, size):
            self.size = size

    assert sharding_of(EngineRecipe(), World(1), 2_000_000_000) == "none"
    assert sharding_of(EngineRecipe(), World(8), 200_000_000) == "ddp"
    assert sharding_of(EngineRecipe(), World(8), 1_165_000_000) == "fsdp"
    assert sharding_of(EngineRecipe(sharding="fsdp"), World(1), 1) == "fsdp"
    assert compute_dtype(EngineRecipe(), torch.device("cpu")) == torch.float32
    assert compute_dtype(EngineRecipe(), torch.device("cuda")) == torch.bfloat16


def test_torchrun_starts_all_again_when_one_dies(tmp_path, encoded_emoji, plain):
    """Two sharded processes by torchrun; one is killed; the elastic agent starts both again, and they go on from the checkpoint."""
    run = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2", "--standalone"]
    more = ["--resume", "engine.sharding=fsdp", "record.checkpoint_every=5", *SETTINGS]
    command = [*launcher, "-m", "microdit", "train", RECIPE, f"data.path={encoded_emoji}", "--out", run, *more]
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT)
    wait_for_checkpoint(run, agent)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    workers = [pid for pid in children if b"microdit" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    subprocess.run(["kill", "-9", workers[-1]], check=True)
    assert agent.wait(150) == 0, (tmp_path / "log").read_text()[-3000:]
    assert losses(run) == pytest.approx(losses(plain), abs=1e-5)


def wait_for_checkpoint(run: Path, agent: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list((run / "checkpoints").glob("step-*")):
        assert agent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
