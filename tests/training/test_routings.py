"""Every row of the routing table, trained by the real command."""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from microdit.data.dataset import Batch
from microdit.diffusion.edm import EDM
from microdit.models.config import Size, resolve
from microdit.models.microdit import MicroDiT
from microdit.models.routing import METHODS
from microdit.training.noise import NoiseSettings, sample_noise
from microdit.training.parallel import DenoisingLoss
from tests.conftest import routed
from tests.training.processes import losses, train, wait_for

ROW = {
    "none": ["phases.0.mask_ratio=0"],
    "naive": [],
    "deferred": [],
    "maskdit": ["model.decoder_depth=2", "phases.0.mask_ratio=0.5"],
    "tread": ["model.depth=7", "phases.0.mask_ratio=0.5"],
    "sprint": ["model.depth=5", "phases.0.mask_pattern=grid"],
}
SHORT = ("phases.0.steps=4", "phases.1.steps=2")
LEARNING = ("phases.0.learning_rate=4e-3", "phases.1.learning_rate=2e-3", "phases.1.batch_size=8")


def row(routing: str) -> list[str]:
    return [f"model.routing={routing}", *ROW[routing], *LEARNING]


@pytest.mark.parametrize("routing", METHODS)
def test_every_row_learns(tmp_path, encoded_emoji, routing):
    """By the loss with noise that is always the same, masked for 25 steps and on all patches for 15."""
    run = tmp_path / "run"
    running = train(run, encoded_emoji, *row(routing), f"data.held_out={encoded_emoji}", "record.held_out_every=4")
    assert running.wait() == [0], running.output
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [record["held_out_loss"] for record in records if "held_out_loss" in record]
    assert len(held_out) == 10
    assert held_out[-1] < 0.93 * held_out[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, encoded_emoji) -> Callable[[str], dict[int, float]]:
    """The losses of one process, by routing: each is trained once."""

    @cache
    def trained(routing: str) -> dict[int, float]:
        run = tmp_path_factory.mktemp("alone") / "run"
        running = train(run, encoded_emoji, *row(routing), *SHORT)
        assert running.wait() == [0], running.output
        return losses(run)

    return trained


DDP, FSDP = ["engine.sharding=ddp", "engine.micro_batch=2"], ["engine.sharding=fsdp", "engine.activation_checkpointing=true"]


@pytest.mark.parametrize(
    ("routing", "engine"),
    [
        *((routing, FSDP) for routing in ("maskdit", "tread", "sprint")),
        ("sprint", DDP),  # whose mask token goes unused, as maskdit's
        *(pytest.param(routing, DDP, marks=pytest.mark.slow) for routing in ("maskdit", "tread")),
    ],
    ids=lambda value: value[0].rpartition("=")[2] if isinstance(value, list) else value,
)
def test_two_processes_learn_the_same_as_one(tmp_path, encoded_emoji, alone, routing, engine):
    """The second phase drops nothing, so that mask tokens go unused: DDP waits for their gradients all the same."""
    spread = train(tmp_path / "spread", encoded_emoji, *row(routing), *SHORT, *engine, ranks=2)
    assert spread.wait() == [0, 0], spread.output
    ours, theirs = losses(tmp_path / "spread"), alone(routing)
    assert ours[1] == pytest.approx(theirs[1], abs=1e-6)
    assert ours == pytest.approx(theirs, abs=1e-3)  # what rounding may grow to


NETWORKS = {
    "joint": ["attention=joint", "positions=both", "norm=rms", "qk_norm=per_head", "conditioning=shared", "preamble_depth=1"],
    "like-minit2i": [
        *("attention=joint", "positions=both", "norm=rms", "qk_norm=per_head", "conditioning=none", "preamble_depth=1", "unread_text=true"),
        *("attention_bias=true", "patch_channels=8", "caption_embedding=linear", "caption_length=12"),
    ],
}


@pytest.mark.parametrize(
    ("network", "engine"),
    [
        ("joint", FSDP),
        ("like-minit2i", DDP),
        pytest.param("joint", DDP, marks=pytest.mark.slow),
        pytest.param("like-minit2i", FSDP, marks=pytest.mark.slow),
    ],
    ids=lambda value: value[0].rpartition("=")[2] if isinstance(value, list) else value,
)
def test_other_networks_train_and_two_processes_learn_the_same_as_one(tmp_path, encoded_emoji, network, engine):
    settings = [*row("sprint"), *(f"model.{setting}" for setting in NETWORKS[network]), *SHORT]
    one, spread = train(tmp_path / "one", encoded_emoji, *settings), train(tmp_path / "two", encoded_emoji, *settings, *engine, ranks=2)
    assert one.wait() == [0], one.output
    assert spread.wait() == [0, 0], spread.output
    ours, theirs = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert ours[1] == pytest.approx(theirs[1], abs=1e-6)
    assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("network", [{}, {"attention": "joint", "positions": "both", "norm": "rms", "qk_norm": "per_head"}], ids=str)
@pytest.mark.parametrize("routing", ["maskdit", "tread", "sprint"])
def test_tokens_come_back_in_bfloat16(routing, network):
    size = Size(dim=32, depth=7, head_dim=8, mixer_dim=16, mixer_depth=1, num_experts=0, **network)
    torch.manual_seed(0)
    model = MicroDiT(resolve(routed(size, routing), caption_channels=12))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    batch = Batch(torch.randn(4, 4, 16, 16), torch.randn(4, 5, 12), torch.ones(4, 5, dtype=torch.bool))
    for ratio in (0.75, 0.0):
        drawn = sample_noise(batch, NoiseSettings(EDM(), ratio, 0.1, METHODS[routing].path_drop), 0, 0, range(4), (8, 8))
        exact, rough = (DenoisingLoss(of, EDM(), True)(drawn).total_B for of in (model, copy.deepcopy(model).bfloat16()))
        assert rough.dtype == torch.float32
        assert 0 < (rough - exact).abs().max() < 0.05 * exact.max()


def test_sprint_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, encoded_emoji):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    running = train(whole, encoded_emoji, *row("sprint"))
    assert running.wait() == [0], running.output
    running = train(killed, encoded_emoji, *row("sprint"))
    wait_for(lambda: (killed / "checkpoints" / "step-00000020").is_dir() and 22 in losses(killed), running)
    running.kill()
    running = train(killed, encoded_emoji, *row("sprint"), "--resume")
    assert running.wait() == [0], running.output
    assert losses(killed) == losses(whole)
    ours, theirs = (weights(run, "model") for run in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    start = weights(whole, "model", 20)
    assert not torch.equal(start["restore.mask_token"], ours["restore.mask_token"])


def test_a_grid_needs_an_even_number_of_patches(tmp_path, encoded_emoji):
    running = train(tmp_path / "run", encoded_emoji, "phases.0.mask_pattern=grid", "model.patch_size=16")
    assert running.wait() == [1], running.output
    assert "phases.0.mask_pattern grid divides patches into cells of 2 x 2" in running.output
    assert "1 x 1 patches at model.patch_size 16" in running.output


def weights(run: Path, name: str, step: int = 40) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")
