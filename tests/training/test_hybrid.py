"""Hybrid sharding, two pretended machines of two processes each, against one process alone."""

import pytest
import torch

from microdit.checkpoint import open_checkpoint
from microdit.distributed import start_world
from microdit.io.tensor_files import assembled, read_header
from microdit.training.checkpointing import load_into
from tests.training.hybrid_runs import WAYS, train_all
from tests.training.processes import on_each, recorded, tensors, train

pytestmark = pytest.mark.slow  # five processes; test_parallel.py compares FSDP and DDP with one process


@pytest.fixture(scope="module")
def runs(tmp_path_factory, encoded_emoji):
    """Folders of the same runs: of one process, and of four, beside the run from whose weights they begin."""
    place = tmp_path_factory.mktemp("hybrid")
    first = train(place / "first", encoded_emoji, "phases.0.steps=20", "phases.1.steps=1", "phases.0.learning_rate=4e-3")
    assert first.wait() == [0], first.output
    for name, ranks in (("alone", 1), ("four", 4)):
        running = on_each(train_all, ranks, 2 if ranks > 1 else 1, place / f"{name}-logs", place / name, encoded_emoji, place / "first")
        assert running.wait() == [0] * ranks, running.output
    return place / "alone", place / "four"


@pytest.mark.parametrize("way", WAYS)
def test_losses_gradients_and_steps_are_those_of_one_process(runs, way):
    """The way `roomless` sums gradients within a machine at each micro-batch, and over machines at the last one."""
    alone, four = (folder / way for folder in runs)
    begun_with = tensors(runs[0].with_name("first"), 21)
    for key in ("loss", "grad_norm", "held_out_loss"):
        assert recorded(four, key) == pytest.approx(recorded(alone, key), rel=2e-5), key
    ours, theirs = tensors(four, 2), tensors(alone, 2)
    assert ours.keys() == theirs.keys()
    assert all(not theirs[name].equal(begun_with[name]) for name in theirs if name.endswith("qkv.weight") and name.startswith("model/"))
    for name, expected in theirs.items():
        if way != "int8" or not name.startswith("optimizer/"):  # whose codes may differ by a level
            assert torch.allclose(ours[name], expected, rtol=1e-4, atol=2e-5 if way == "adamw" else 1e-4), name


def test_what_machines_hold_alike_is_written_once_and_all_write(runs):
    alone, four = (open_checkpoint(folder / "adamw" / "checkpoints" / "step-00000002") for folder in runs)
    numbers = [sum((c.folder / name).stat().st_size for name in c.shards) for c in (alone, four)]
    headers = sum(min(entry.at for entry in read_header(four.folder / name).values()) for name in four.shards)
    assert len(four.shards) == 4
    assert abs(numbers[1] - headers - numbers[0]) < headers
    sizes = [(four.folder / name).stat().st_size for name in four.shards]
    assert max(sizes) < 1.5 * min(sizes)
    for part in ("model", "ema", "ema-0.5"):
        whole, put_together = four.tensors(part), assembled([four.folder / name for name in four.shards], part)
        assert whole.keys() == put_together.keys()
        assert all(tensor.equal(put_together[name]) for name, tensor in whole.items())


def test_a_checkpoint_goes_on_by_another_sharding_and_in_one_process(runs):
    alone, four = runs
    assert recorded(four / "resumed", "loss") == pytest.approx(recorded(alone / "adamw", "loss"), rel=2e-5)
    expected = tensors(four / "adamw", 2)
    assert all(torch.allclose(tensor, expected[name], rtol=1e-4, atol=2e-5) for name, tensor in tensors(four / "resumed", 2).items())
    into = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    load_into(open_checkpoint(four / "adamw" / "checkpoints" / "step-00000002"), into, start_world("cpu"))
    assert all(tensor.equal(expected[name]) for name, tensor in into.items())
