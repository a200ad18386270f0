"""However the work is spread, the same is computed: each way against one plain process.

The proof is of single steps. From equal weights the losses and gradients of a step agree up to rounding, on any machine; and what a step
makes of its gradients is a formula, which the checkpoints of a sharded run are held against. Whole runs are compared loosely: rounding
grows on the way, where AdamW divides a tiny gradient by a tiny moment, and where two tokens are nearly the same to an expert that chooses.
"""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C

from microdit.cli import main as cli
from microdit.config.schema import EngineRecipe
from microdit.data.dataset import Batch
from microdit.diffusion.edm import EDM
from microdit.distributed import World
from microdit.errors import UserError
from microdit.models.blocks import make_norm
from microdit.models.config import Size, resolve
from microdit.models.elementwise import EAGER
from microdit.models.microdit import MicroDiT
from microdit.training.noise import NoiseSettings, sample_noise
from microdit.training.optim import orthogonalized
from microdit.training.parallel import DenoisingLoss, compile_elementwise, compute_dtype, mesh_of, sharding_of
from tests.training.processes import HANG, RECIPE, losses, on_each, recorded, tensors, train, wait_for

SETTINGS = ("phases.0.steps=14", "phases.1.steps=8", "phases.0.learning_rate=4e-3", "phases.1.batch_size=8")  # 22 steps that learn
STILL = (  # both phases from the same weights in every step; without memory, AdamW's first moment is the gradient
    *("phases.0.steps=4", "phases.1.steps=2", "phases.1.batch_size=8", "phases.0.learning_rate=1e-30", "phases.1.learning_rate=1e-30"),
    *("optimizer.betas=[0, 0]", "record.checkpoint_every=2", "record.keep_checkpoints=5"),
)
LOOSE = 5e-3  # of whole runs, which learn far more


def trained(run: Path, data: Path, *more: object, ranks: int = 1) -> Path:
    running = train(run, data, *more, ranks=ranks)
    assert running.wait() == [0] * ranks, running.output
    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory, encoded_emoji) -> Path:
    run = trained(tmp_path_factory.mktemp("plain") / "run", encoded_emoji, *SETTINGS)
    slow = trained(run.with_name("slow"), encoded_emoji, *SETTINGS, "phases.0.learning_rate=1e-30", "phases.1.learning_rate=1e-30")
    assert abs(losses(run)[22] - losses(slow)[22]) > 4 * LOOSE
    return run


@pytest.fixture(scope="module")
def still(tmp_path_factory, encoded_emoji, plain) -> Path:
    return trained(tmp_path_factory.mktemp("still") / "run", encoded_emoji, *STILL, f"init_from={plain}")


def assert_same_steps(run: Path, other: Path) -> None:
    """Losses and gradients of all steps but one at most: there rounding may let an expert choose another of two tokens alike."""

    def agree(near: list[bool]) -> bool:
        return sum(near) >= len(near) - 1

    start, end = (load_file(place / "checkpoints" / "step-00000006" / "model.safetensors") for place in (other, run))
    assert all(start[name].equal(end[name]) for name in start)
    assert losses(run).keys() == losses(other).keys()
    assert agree([losses(run)[step] == pytest.approx(loss, abs=1e-6) for step, loss in losses(other).items()])
    norms = recorded(run, "grad_norm")
    assert agree([norms[step] == pytest.approx(norm, rel=1e-5) for step, norm in recorded(other, "grad_norm").items()])
    assert agree([same_gradients(tensors(run, step), tensors(other, step)) for step in (2, 4, 6)])


def same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Each weight's, up to 1e-4 of the largest element of it. None is zero throughout: every part of the model has something to learn."""
    names = [name for name in theirs if name.endswith("/exp_avg")]
    assert names
    assert all(theirs[name].any() for name in names)
    return all((ours[name] - theirs[name]).abs().max() < 1e-4 * theirs[name].abs().max() + 1e-9 for name in names)


@pytest.mark.parametrize(
    ("engine", "ranks"),
    [
        (["engine.micro_batch=2", "engine.sharding=ddp"], 2),
        (["engine.micro_batch=2", "engine.sharding=fsdp", "engine.activation_checkpointing=true"], 2),
        # Each alone, which tells which of them is at fault where a pair above fails.
        pytest.param(["engine.sharding=fsdp"], 2, marks=pytest.mark.slow),
        pytest.param(["engine.sharding=ddp"], 2, marks=pytest.mark.slow),
        pytest.param(["engine.sharding=fsdp"], 1, marks=pytest.mark.slow),
        pytest.param(["engine.micro_batch=2"], 1, marks=pytest.mark.slow),
        pytest.param(["engine.activation_checkpointing=true"], 1, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(setting.removeprefix("engine.") for setting in value) if isinstance(value, list) else str(value),
)
def test_losses_and_gradients_of_each_step_are_the_same(tmp_path, encoded_emoji, plain, still, engine, ranks):
    """Experts included: the recipe has four in every block but the last, which choose half of the tokens each."""
    assert_same_steps(trained(tmp_path / "run", encoded_emoji, *STILL, f"init_from={plain}", *engine, ranks=ranks), still)


def test_micro_batches_of_4_of_16_equal_the_whole(tmp_path, encoded_emoji, plain):
    sixteen = (*STILL, "phases.0.batch_size=16", "phases.1.batch_size=16", f"init_from={plain}")
    whole = trained(tmp_path / "whole", encoded_emoji, *sixteen)
    assert_same_steps(trained(tmp_path / "parts", encoded_emoji, *sixteen, "engine.micro_batch=4"), whole)


def test_sharded_steps_are_adamws_and_ema_follows_the_weights(tmp_path, encoded_emoji, plain):
    """By the formulas, from one checkpoint to the next. Two averages at once; the second begins later, as a copy."""
    ema = "ema=[{decay: 0.9}, {decay: 0.5, start: 3}]"
    every = ("record.checkpoint_every=1", "record.keep_checkpoints=9", "phases.0.steps=3", "phases.1.steps=2")
    run = trained(tmp_path / "run", encoded_emoji, ema, *every, f"init_from={plain}", "engine.sharding=fsdp", ranks=2)
    rates, states = recorded(run, "learning_rate"), {step: tensors(run, step) for step in range(1, 6)}
    for step in range(2, 6):
        before, after = states[step - 1], states[step]
        short, long = 0.5 if step > 3 else 0.0, min(0.9, step / (9 + step))
        for name in [name.removeprefix("model/") for name in before if name.startswith("model/")]:
            assert torch.allclose(after[f"model/{name}"], adamw(before, after, name, rates[step], step), atol=1e-7), (step, name)
            for ema_name, decay in (("ema", long), ("ema-0.5", short)):
                expected = decay * before[f"{ema_name}/{name}"] + (1 - decay) * after[f"model/{name}"]
                assert torch.allclose(after[f"{ema_name}/{name}"], expected, rtol=1e-6, atol=1e-7), (step, ema_name, name)
    saved = load_file(run / "checkpoints" / "step-00000005" / "ema-0.5.safetensors")
    assert all(tensor.equal(states[5][f"ema-0.5/{name}"]) for name, tensor in saved.items())
    assert any(not tensor.equal(states[5][f"model/{name}"]) for name, tensor in saved.items())


def adamw(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], name: str, rate: float, step: int) -> torch.Tensor:
    """The weight after step number `step` (from 1), by the moments after it (1711.05101, algorithm 2). Experts learn at half the rate."""
    weight, mean, square = before[f"model/{name}"], *(after[f"optimizer/{name}/{key}"] for key in ("exp_avg", "exp_avg_sq"))
    rate = rate * (0.5 if name.endswith(("w_in", "w_out")) else 1)
    update = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return weight * (1 - rate * (0.1 if weight.dim() >= 2 else 0)) - rate * update


def test_a_whole_run_sharded_ends_near_the_plain_one(tmp_path, encoded_emoji, plain):
    run = trained(tmp_path / "run", encoded_emoji, *SETTINGS, "engine.sharding=fsdp", "engine.micro_batch=2", ranks=2)
    assert losses(run) == pytest.approx(losses(plain), abs=LOOSE)


def test_each_step_of_a_sharded_muon_orthogonalizes_whole_matrices(tmp_path, encoded_emoji, plain):
    """By its formula, on the gradient that the momentum before and after the step tells of."""
    every = ("optimizer.method=muon", "record.checkpoint_every=1", "record.keep_checkpoints=4", "phases.0.steps=2", "phases.1.steps=1")
    run = trained(tmp_path / "run", encoded_emoji, *every, f"init_from={plain}", "engine.sharding=fsdp", ranks=2)
    rates, states = recorded(run, "learning_rate"), [tensors(run, step) for step in range(1, 4)]
    matrices = [name.split("/")[1] for name in states[0] if name.endswith("/momentum_buffer")]
    assert len(matrices) > 10
    for step, (before, after) in enumerate(pairwise(states), 2):
        for name in matrices:
            weight, momentum = before[f"model/{name}"], after[f"optimizer/{name}/momentum_buffer"]
            gradient = (momentum - 0.95 * before[f"optimizer/{name}/momentum_buffer"]) / 0.05
            update = orthogonalized(gradient.lerp(momentum, 0.95)[None], (DEFAULT_A, DEFAULT_B, DEFAULT_C), 5)[0]
            size = 0.2 * max(weight.shape) ** 0.5 * rates[step]
            expected = weight * (1 - 0.1 * rates[step]) - size * update
            assert (after[f"model/{name}"] - expected).abs().max() < 0.01 * size * update.abs().max(), (step, name)


def test_bfloat16_is_near_float32_and_not_the_same(tmp_path, encoded_emoji, plain, still):
    exact = losses(still)
    for name, more in (("copy", []), ("fsdp", ["engine.sharding=fsdp"])):
        run = trained(tmp_path / name, encoded_emoji, *STILL, f"init_from={plain}", "engine.precision=bfloat16", *more)
        worst = max(abs(loss - exact[step]) for step, loss in losses(run).items())
        assert 1e-6 < worst < 0.05, name
        saved = load_file(run / "checkpoints" / "step-00000006" / "model.safetensors")
        assert all(tensor.dtype == torch.float32 for tensor in saved.values())


def test_norms_compute_in_float32_whatever_comes_in():
    """The model's layer norms on bfloat16 tokens: the float32 result, rounded once, but for ties of rounding."""
    norm = make_norm(1024, "layer")
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
        pytest.param(
            {"attention": "joint", "positions": "both", "norm": "rms", "qk_norm": "per_head", "conditioning": "shared"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"routing": "sprint", "dense_blocks": (0, 1)}, marks=pytest.mark.slow),
        pytest.param({"routing": "maskdit", "depth": 1, "decoder_depth": 1}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: settings.get("routing", settings.get("attention", "deferred")),
)
def test_compiled_code_agrees_and_compiles_once_for_all_mask_ratios(settings):
    eager, compiled = small_losses(**settings)
    torch._dynamo.reset()
    compile_elementwise(compiled.model)
    graphs = []
    counters.clear()
    for step, ratio in enumerate((0.75, 0.0, 0.5, 0.3, 0.9)):
        length = 5 + step % 2
        text_mask_BL = torch.arange(length) < torch.tensor([[3], [5], [2], [4]])
        batch = Batch(torch.randn(4, 4, 16, 16), torch.randn(4, length, 12), text_mask_BL)
        drawn = sample_noise(batch, NoiseSettings(EDM(), ratio, 0.1), 0, step, range(4), (8, 8))
        values = [loss(drawn).total_B.mean() for loss in (eager, compiled)]
        for value in values:
            value.backward()
        assert values[1].item() == pytest.approx(values[0].item(), rel=1e-5)
        for (name, ours), theirs in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4), name
        eager.zero_grad(), compiled.zero_grad()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] >= len(EAGER)
    assert len(set(graphs)) == 1


@pytest.mark.slow
def test_the_trainer_compiled_equals_the_trainer_eager(tmp_path, encoded_emoji, plain, still):
    assert_same_steps(trained(tmp_path / "run", encoded_emoji, *STILL, f"init_from={plain}", "engine.compile=true"), still)


def test_what_auto_means(monkeypatch):
    def world(size: int, device: str = "cpu") -> World:
        return World(0, size, torch.device(device), None)

    assert sharding_of(EngineRecipe(), world(1), 2_000_000_000) == "none"
    assert sharding_of(EngineRecipe(), world(8), 200_000_000) == "ddp"
    assert sharding_of(EngineRecipe(), world(8), 1_165_000_000) == "fsdp"
    assert sharding_of(EngineRecipe(sharding="fsdp"), world(1), 1) == "fsdp"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    assert sharding_of(EngineRecipe(), world(8, "cuda"), 1_165_000_000) == "ddp"
    assert sharding_of(EngineRecipe(), world(8, "cuda"), 3_000_000_000) == "fsdp"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert sharding_of(EngineRecipe(), world(64, "cuda"), 1_165_000_000) == "ddp"
    assert sharding_of(EngineRecipe(), world(64, "cuda"), 3_000_000_000) == "hybrid"
    assert sharding_of(EngineRecipe(), world(64, "cuda"), 30_000_000_000) == "fsdp"  # one machine has no room for its state
    assert sharding_of(EngineRecipe(), world(8, "cuda"), 3_000_000_000) == "fsdp"
    assert sharding_of(EngineRecipe(), world(12, "cuda"), 3_000_000_000) == "fsdp"
    assert sharding_of(EngineRecipe(sharding="hybrid"), world(16), 1) == "hybrid"
    for size, sentence in ((8, "there is one machine, with all 8 processes"), (12, "of 12 processes 8 run on this machine")):
        with pytest.raises(UserError, match=f"engine.sharding is hybrid, and {sentence}: take engine.sharding fsdp"):
            sharding_of(EngineRecipe(sharding="hybrid"), world(size), 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(UserError, match="of 8 processes 1 run"):
        sharding_of(EngineRecipe(sharding="hybrid"), world(8), 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert compute_dtype(EngineRecipe(), torch.device("cpu")) == torch.float32
    assert compute_dtype(EngineRecipe(), torch.device("cuda")) == torch.bfloat16


def test_hybrid_machines_must_be_alike(monkeypatch):
    class UnlikeWorld(World):
        def gather(self, value, group=None):
            return [6] * 6 + [3] * 6

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    with pytest.raises(UserError, match="the machines run 3 and 6 processes: start as many on each"):
        mesh_of("hybrid", UnlikeWorld(0, 12, torch.device("cpu"), None, None))


def test_an_elastic_agent_starts_all_again_when_one_dies(tmp_path, encoded_emoji, plain):
    """Two sharded processes of torchrun's agent; one is killed; the agent starts both again, and they go on from the checkpoint."""
    run, pids = tmp_path / "run", tmp_path / "pids"
    pids.mkdir()
    agent = on_each(run_agent, 1, 1, tmp_path / "logs", pids, train_arguments(run, encoded_emoji))
    wait_for(lambda: list((run / "checkpoints").glob("step-*")), agent)
    first = {path.name: int(path.read_text()) for path in pids.iterdir()}
    os.kill(first["1"], signal.SIGKILL)
    assert agent.wait() == [0], agent.output
    assert all(int((pids / rank).read_text()) != pid for rank, pid in first.items())
    assert [start["from_step"] > 0 for start in json.loads((run / "run.json").read_text())["starts"]] == [False, True]
    assert losses(run) == pytest.approx(losses(plain), abs=LOOSE)


def train_arguments(run: Path, data: Path) -> list[str]:
    more = ["--resume", "engine.sharding=fsdp", "record.checkpoint_every=8", *SETTINGS]
    return [str(part) for part in ["train", RECIPE, f"data.path={data}", "--out", run, *more]]


def run_agent(pids: Path, arguments: list[str]) -> None:
    """What `torchrun --nproc-per-node 2 --max-restarts 2 --standalone` does, but its processes are forked and need not import anew."""
    settings = LaunchConfig(1, 1, 2, max_restarts=2, monitor_interval=0.05, start_method="fork", rdzv_backend="c10d", run_id="test")
    settings.rdzv_endpoint = "127.0.0.1:0"
    elastic_launch(settings, run_worker)(pids, arguments)


def run_worker(pids: Path, arguments: list[str]) -> None:
    (pids / os.environ["RANK"]).write_text(str(os.getpid()))
    sys.argv = ["microdit", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise


@pytest.mark.slow
def test_torchrun_starts_all_again_when_one_dies(tmp_path, encoded_emoji, plain):
    """The same by the real launcher: five processes that import everything."""
    run = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2", "--standalone"]
    command = [*launcher, "-m", "microdit", *train_arguments(run, encoded_emoji)]
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    wait_for_checkpoint(run, agent)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    workers = [pid for pid in children if b"microdit" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    subprocess.run(["kill", "-9", workers[-1]], check=True)
    assert agent.wait(HANG) == 0, (tmp_path / "log").read_text()[-3000:]
    assert losses(run) == pytest.approx(losses(plain), abs=LOOSE)


def wait_for_checkpoint(run: Path, agent: subprocess.Popen) -> None:
    deadline = time.monotonic() + HANG
    while not list((run / "checkpoints").glob("step-*")):
        assert agent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
