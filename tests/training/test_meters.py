"""What a run says of itself: costs, work left, metrics, held-out loss."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from microdit.config.load import load_recipe
from microdit.diffusion.edm import EDM
from microdit.distributed import start_world
from microdit.errors import UserError
from microdit.io.console import PlainConsole
from microdit.models.config import Size, resolve
from microdit.planning.workload import FlopCounter
from microdit.training.logging import Cost, RunRecord, last_cost
from microdit.training.meters import Meters, StepResult, progress_text
from microdit.training.noise import TrainingBatch
from microdit.training.parallel import DenoisingLoss, SampleLosses
from microdit.training.validation import HeldOut
from tests.conftest import busy_model
from tests.training.processes import HANG, RECIPE


def test_costs_go_on_from_earlier_starts():
    cost = Cost(processes=8, price_per_hour=2.5, earlier_hours=10.0, earlier_dollars=30.0)
    cost.started -= 3600  # an hour ago
    assert cost.gpu_hours() == pytest.approx(18, abs=0.01)
    assert cost.dollars() == pytest.approx(30 + 8 * 2.5, abs=0.05)
    assert cost.to_go(1800) == pytest.approx(10)
    assert Cost(processes=1).dollars() is None
    assert Cost(processes=1, earlier_dollars=3.0).dollars() == 3.0


def test_all_time_is_booked_under_some_part(monkeypatch):
    now = iter([10.0, 13.0, 14.5, 20.5])
    monkeypatch.setattr("microdit.training.logging.time.monotonic", lambda: next(now))
    cost = Cost(processes=8, started=8.0)
    for part in ("start", "steps", "checkpoints", "steps"):
        cost.lap(part)
    cost.add("encoding", 5.0)
    assert cost.seconds == {"start": 2.0, "steps": 9.0, "checkpoints": 1.5, "encoding": 5.0}


def test_the_work_left_is_the_sum_of_the_steps_left():
    phases = "[{name: a, steps: 50, batch_size: 8, learning_rate: 1e-3, mask_schedule: [[0, 0.75], [1, 0]]}, "
    phases += "{name: b, steps: 10, batch_size: 4, learning_rate: 1e-3, mask_ratio: 0.5}]"
    recipe = load_recipe(RECIPE, [f"phases={phases}"])
    config = resolve(recipe.model, patch_size=4)
    work = FlopCounter(recipe, config)
    for step in (0, 20, 50, 55, 60):
        steps = [recipe.phase_at(s) for s in range(step, 60)]
        assert work.remaining(step, 64, 5) == pytest.approx(sum(work.of_step(phase, inside, 64, 5) for phase, inside in steps), rel=0.01)
    assert work.of_step(*recipe.phase_at(0), 64, 5) < work.of_step(*recipe.phase_at(49), 64, 5)


@pytest.mark.parametrize("block", [1, 2])
def test_the_work_left_counts_alignment_in_the_steps_that_have_it(block):
    phases = (
        "[{name: a, steps: 12, batch_size: 8, learning_rate: 1, mask_ratio: 0.5}, {name: b, steps: 8, batch_size: 4, learning_rate: 2}]"
    )
    recipe = load_recipe(RECIPE, [f"phases={phases}", f"alignment={{encoder: efficientnet, block: {block}, until: 0.75, width: 16}}"])
    work = FlopCounter(recipe, resolve(recipe.model, patch_size=4), 1280)
    steps = [work.of_step(*recipe.phase_at(step), 64, 5, recipe.aligned_at(step)) for step in range(20)]
    plain = [work.of_step(*recipe.phase_at(step), 64, 5) for step in range(20)]
    assert [ours > theirs for ours, theirs in zip(steps, plain, strict=True)] == [True] * 15 + [False] * 5
    for first in (0, 5, 12, 14, 15, 19):
        assert work.remaining(first, 64, 5) == pytest.approx(sum(steps[first:]), rel=1e-12)
    alone = [FlopCounter(recipe.alone(phase), resolve(recipe.model, patch_size=4), 1280) for phase in recipe.phases]
    assert sum(one.remaining(0, 64, 5) for one in alone) == pytest.approx(sum(steps), rel=1e-12)


def test_meters_give_means_and_rates():
    meters = Meters(0, 10, peak=1e9, processes=2, device=torch.device("cpu"), console=PlainConsole(quiet=True))
    meters._window.started -= 2.0  # two seconds ago
    for index, loss in enumerate((1.0, 3.0)):
        sums = StepResult([4 * loss] + [0.0] * 7, [4.0] + [0.0] * 7, alignment=loss / 10 if index else None)
        meters.step("p", index + 1, sums, flops=2e8, waited=0.1, accepted=True)
    meters.step("p", 3, StepResult([float("nan")] + [0.0] * 7, [4.0] + [0.0] * 7), flops=2e8, waited=0.0, accepted=False)
    numbers = meters.read()
    assert numbers["loss"] == 2.0
    assert numbers["alignment"] == 0.3
    assert numbers["loss_by_noise"] == [2.0] + [None] * 7
    assert numbers["images_per_second"] == pytest.approx(6, rel=0.05)
    assert numbers["data_wait"] == pytest.approx(0.1, rel=0.05)
    assert numbers["mfu"] == pytest.approx(3e8 / 2e9, rel=0.05)
    assert meters.seconds_left(6e8) == pytest.approx(2, rel=0.05)
    assert meters.read()["loss"] is None
    assert progress_text(0.5, 100.0, 0.41, 3700, 1.5, 2.25) == "loss 0.5000  100 images/s  41% MFU  1:01:40 left  $1.50, $2.25 to go"
    assert "2 d 3 h left" in progress_text(None, 1.0, 0.1, 2 * 86400 + 3 * 3600, None, None)


def test_metrics_wait_while_the_disk_is_full_and_are_written_later(tmp_path):
    said: list[str] = []
    record = RunRecord(tmp_path, load_recipe(RECIPE), said.append, 0)
    record.metrics({"step": 1, "loss": 0.5})
    content = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()  # nobody can write here, root included
    record.metrics({"step": 2, "loss": 0.4})
    record.metrics({"step": 3, "loss": None})
    assert len(said) == 1
    assert "Training goes on" in said[0]
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "metrics.jsonl").write_text(content)
    record.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_repeated_steps_are_forgotten_but_their_cost_is_kept(tmp_path):
    lines = [{"step": step, "gpu_hours": step / 10, "dollars": step / 5} for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "gpu_h')
    assert last_cost(tmp_path) == (0.4, 0.8)
    RunRecord(tmp_path, load_recipe(RECIPE), print, forget_after=2).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_the_held_out_loss_is_the_same_every_time_and_falls_into_all_bins(encoded_emoji):
    world = start_world("cpu")
    model = busy_model(Size(32, 2, 8, 16, 1, num_experts=2, round_ffn_to=8), caption_channels=384, in_channels=3).float()
    loss = DenoisingLoss(model, EDM(), mask_padding=True)
    held_out = HeldOut(encoded_emoji, 16, 40, EDM(), world)
    first, second = held_out.measure(loss), held_out.measure(loss)
    assert first == second
    assert all(value is not None for value in first["held_out_by_noise"])
    assert first["held_out_loss"] == pytest.approx(sum(first["held_out_by_noise"]) / 8)  # five samples in each bin
    with pytest.raises(UserError, match="no encoded data set"):
        HeldOut(Path("nowhere"), 16, 40, EDM(), world)


def test_held_out_samples_have_evenly_spread_noise_levels(encoded_emoji):
    batches: list[TrainingBatch] = []

    class Keeping(nn.Module):
        def forward(self, batch: TrainingBatch) -> SampleLosses:
            batches.append(batch)
            return SampleLosses(torch.zeros(len(batch)), torch.zeros(len(batch)))

    HeldOut(encoded_emoji, 16, 40, EDM(), start_world("cpu")).measure(Keeping())
    noise = torch.cat([batch.noise_BCHW for batch in batches]).flatten(1)
    sigma = torch.cat([batch.sigma_B for batch in batches])
    assert (torch.corrcoef(noise) - torch.eye(40)).abs().max() < 6 / noise.shape[1] ** 0.5
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    levels = torch.special.ndtr((sigma.double().log() + 0.6) / 1.2)
    assert torch.allclose(levels, (torch.arange(40) + 0.5).double() / 40, atol=1e-6)
    assert all(batch.caption_kept_B.all() and batch.keep_ids_BK is None for batch in batches)


def test_the_wandb_project_gets_the_metrics(tmp_path, monkeypatch):
    """The real package, in its own offline mode: what it would send lies in a file."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    record = RunRecord(tmp_path, load_recipe(RECIPE, ["record.wandb_project=emoji"]), print, 0)
    record.metrics({"step": 1, "loss": 0.125, "phase": "masked"})
    deadline = time.monotonic() + HANG
    while wandb.run.summary.get("loss") != 0.125 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert wandb.run.summary["loss"] == 0.125
    record.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    shutil.rmtree(tmp_path / "wandb")
