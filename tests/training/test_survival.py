"""What a run does when things go wrong: real processes, really killed."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from microdit.checkpoint import find_weights
from microdit.io.files import from_checked_json
from microdit.pipelines.pipeline import MicroDiTPipeline
from tests.training.processes import RECIPE, losses, start, train, wait_for

RESTART = 75
LOOSE = 5e-3  # what rounding may grow to in forty steps, where one process and two are compared


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, encoded_emoji) -> Path:
    """40 steps without a break."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    running = train(run, encoded_emoji)
    assert running.wait() == [0], running.output
    return run


def same_weights(a: Path, b: Path, step: int = 40) -> None:
    for name in ("model", "ema"):
        ours, theirs = (load_file(run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors") for run in (a, b))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].equal(theirs[key]), (name, key)


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def test_a_run_leaves_a_record(whole_run, encoded_emoji):
    assert sorted(losses(whole_run)) == list(range(1, 41))
    assert {p.name for p in whole_run.iterdir()} >= {
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "status.json",
        "tensorboard",
        "checkpoints",
    }
    state = json.loads((whole_run / "checkpoints" / "step-00000040" / "state.json").read_text())
    assert state["images_seen"] == 25 * 8 + 15 * 6
    assert state["gpu_hours"] > 0
    assert status(whole_run)["state"] == "finished"
    about = json.loads((whole_run / "run.json").read_text())
    assert about["data"]["data"]["rows"] == 40
    assert len(about["data"]["data"]["fingerprint"]) == 16
    start = about["starts"][0]
    assert (start["world_size"], start["from_step"]) == (1, 0)
    assert {"python", "torch", "microdit"} <= set(start["versions"])


def test_losses_by_noise_level_add_up_to_the_loss(whole_run):
    records = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    bins = [[r["loss_by_noise"][i] for r in records if r["loss_by_noise"][i] is not None] for i in range(8)]
    assert all(bins)
    means = [sum(b) / len(b) for b in bins]
    assert means[0] > means[-1] or means[0] < means[-1]  # they are not one number written eight times
    for record in records:
        present = [value for value in record["loss_by_noise"] if value is not None]
        assert min(present) - 1e-6 <= record["loss"] <= max(present) + 1e-6


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, encoded_emoji, whole_run, ranks):
    """One process killed with SIGKILL; resumed by one, bit for bit; by two, sharded, up to rounding."""
    run = tmp_path / "killed"
    running = train(run, encoded_emoji)
    wait_for(lambda: (run / "checkpoints" / "step-00000020").is_dir() and 23 in losses(run), running)
    running.kill()
    assert not (run / "checkpoints" / "step-00000040").exists()
    resumed = train(run, encoded_emoji, "--resume", "engine.sharding=fsdp", ranks=ranks)
    assert resumed.wait() == [0] * ranks, resumed.output
    assert "from step 20" in resumed.output
    if ranks == 1:
        assert losses(run) == losses(whole_run)
        same_weights(run, whole_run)
    else:
        assert [losses(run)[step] for step in range(1, 21)] == [losses(whole_run)[step] for step in range(1, 21)]
        assert losses(run)[21] == pytest.approx(losses(whole_run)[21], abs=1e-6)  # from the very weights that were saved
        assert losses(run) == pytest.approx(losses(whole_run), abs=LOOSE)
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [s["from_step"] for s in starts] == [0, 20]


def test_two_sharded_processes_killed_go_on_as_one(tmp_path, encoded_emoji, whole_run):
    run = tmp_path / "killed"
    running = train(run, encoded_emoji, "engine.sharding=fsdp", ranks=2)
    wait_for(lambda: (run / "checkpoints" / "step-00000020").is_dir() and 23 in losses(run), running)
    running.kill()
    resumed = train(run, encoded_emoji, "--resume")
    assert resumed.wait() == [0], resumed.output
    assert losses(run) == pytest.approx(losses(whole_run), abs=LOOSE)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_equals_uninterrupted(tmp_path, encoded_emoji, kills):
    """Saving at every second step, so that many kills fall into a save."""
    phases = 7 * kills, 8 * kills  # more than are taken between two kills, on a busy machine too
    settings = [f"phases.0.steps={phases[0]}", f"phases.1.steps={phases[1]}", "record.checkpoint_every=2"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    uninterrupted = train(whole, encoded_emoji, *settings, f"record.checkpoint_every={sum(phases)}")
    assert uninterrupted.wait() == [0], uninterrupted.output
    draw = random.Random(0)
    for _ in range(kills):
        before = max(losses(run), default=0)
        running = train(run, encoded_emoji, "--resume", *settings)
        wait_for(lambda before=before: max(losses(run), default=0) > before, running)
        time.sleep(draw.uniform(0, 0.08))
        running.kill()
    assert kills <= max(losses(run)) < sum(phases)
    last = train(run, encoded_emoji, "--resume", *settings)
    assert last.wait() == [0], last.output
    assert losses(run) == losses(whole)
    same_weights(run, whole, step=sum(phases))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, RESTART)])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(tmp_path, encoded_emoji, whole_run, number, code):
    run = tmp_path / "stopped"
    running = train(run, encoded_emoji)
    wait_for(lambda: 3 in losses(run), running)
    os.kill(running.processes[0].pid, number)
    assert running.wait() == [code]
    assert "Continue with --resume" in running.output
    assert "Traceback" not in running.output
    assert status(run)["state"] == "stopped"
    step = status(run)["step"]
    files = {p.name for p in (run / "checkpoints" / f"step-{step:08d}").iterdir()}
    assert files == {"shards", "state.json"} | (set() if number == signal.SIGTERM else {"model.safetensors", "ema.safetensors"})
    resumed = train(run, encoded_emoji, "--resume")
    assert resumed.wait() == [0]
    assert f"from step {step}" in resumed.output
    assert losses(run) == losses(whole_run)


def test_a_notice_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path, encoded_emoji, whole_run):
    run = tmp_path / "stopped"
    running = train(run, encoded_emoji, "engine.sharding=fsdp", ranks=2)
    wait_for(lambda: 3 in losses(run), running)
    os.kill(running.processes[1].pid, signal.SIGTERM)
    assert running.wait() == [RESTART, RESTART]
    cut_off = find_weights(run, pytest.fail)
    assert {path.name for path in cut_off.folder.iterdir()} == {"shards", "state.json"}
    MicroDiTPipeline.from_checkpoint(cut_off)  # put together from the shards of both
    resumed = train(run, encoded_emoji, "--resume", ranks=1)
    assert resumed.wait() == [0]
    assert losses(run) == pytest.approx(losses(whole_run), abs=LOOSE)


def test_when_one_process_dies_the_other_ends_too(tmp_path, encoded_emoji):
    run = tmp_path / "dying"
    running = train(run, encoded_emoji, "engine.sharding=fsdp", "phases.0.steps=2000", ranks=2)
    wait_for(lambda: 3 in losses(run), running)
    running.processes[1].kill()
    codes = running.wait()
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, RESTART)
    assert f"process 1 on {socket.gethostname()} (process id {running.processes[1].pid})" in running.output
    assert "Traceback" not in running.output
    assert status(run)["state"] == "failed"


def test_a_full_disk_does_not_stop_training_and_the_old_checkpoint_stays(tmp_path, encoded_emoji, whole_run):
    """The system refuses files above a size; later there is room again."""
    run = tmp_path / "full"
    first = train(run, encoded_emoji, "phases.0.steps=20", "phases.1.steps=20")
    wait_for(lambda: (run / "checkpoints" / "step-00000020").is_dir(), first)
    first.kill()
    folder = run / "checkpoints" / "step-00000020"
    before = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    largest = max(len(content) for content in before.values())
    more = ["--resume", "record.checkpoint_every=5", "record.keep_checkpoints=9", "phases.0.steps=20", "phases.1.steps=3000"]
    arguments = ["train", RECIPE, f"data.path={encoded_emoji}", "--out", run, "--accept-changes", *more]
    running = start(tmp_path / "logs", arguments, file_size=largest // 2)
    wait_for(lambda: "Training goes on" in running.output and max(losses(run)) >= 40, running)
    assert {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    resource.prlimit(running.processes[0].pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wait_for(lambda: len(list((run / "checkpoints").glob("step-*"))) > 1, running)
    os.kill(running.processes[0].pid, signal.SIGTERM)
    assert running.wait() == [RESTART]
    assert "could not be written" in running.output
    assert "make room on the disk" in running.output
    assert "Traceback" not in running.output
    assert status(run)["checkpoints_failed"] >= 1
    assert not any(p.name.startswith(".") for p in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "state"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(tmp_path, encoded_emoji, whole_run, damage):
    run = tmp_path / "damaged"
    shutil.copytree(whole_run, run)
    newest = run / "checkpoints" / "step-00000040"
    shard = next((newest / "shards").iterdir())
    content = shard.read_bytes()
    if damage == "flip":
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "delete":
        shard.unlink()
    else:
        (newest / "state.json").write_text("{")
    resumed = train(run, encoded_emoji, "--resume")
    assert resumed.wait() == [0], resumed.output
    assert "step-00000040 is damaged" in resumed.output
    assert "from step 20" in resumed.output
    assert losses(run) == losses(whole_run)


def test_a_finished_run_is_left_as_it_is(encoded_emoji, whole_run):
    before = {path: path.stat().st_mtime_ns for path in whole_run.rglob("*")}
    again = train(whole_run, encoded_emoji, "--resume")
    assert again.wait() == [0], again.output
    assert f"{whole_run} is finished" in again.output
    assert {path: path.stat().st_mtime_ns for path in whole_run.rglob("*")} == before


def test_if_every_checkpoint_is_damaged_nothing_begins_silently_anew(tmp_path, encoded_emoji, whole_run):
    run = tmp_path / "damaged"
    shutil.copytree(whole_run, run)
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").write_text("{")
    resumed = train(run, encoded_emoji, "--resume")
    assert resumed.wait() == [1]
    assert "Every checkpoint" in resumed.output


def test_a_run_is_never_overwritten_and_another_recipe_is_refused(tmp_path, encoded_emoji, whole_run):
    def refused(*more: object) -> str:
        running = train(whole_run, encoded_emoji, *more)
        assert running.wait() == [1]
        assert "Traceback" not in running.output
        return running.output

    before = (whole_run / "recipe.yaml").read_bytes()
    assert "holds a run already: continue with --resume" in refused()
    other = refused("--resume", "model.dim=64")
    assert "of another architecture" in other
    assert "dim: 32 in the checkpoint, 64 in the recipe" in other
    changed = refused("--resume", "phases.1.learning_rate=1e-3", "optimizer.betas=[0.9, 0.95]", "record.metrics_every=7")
    assert "phases.1.learning_rate: 0.0005 then, 0.001 now" in changed
    assert "optimizer.betas" in changed
    assert "metrics_every" not in changed
    assert "--accept-changes" in changed
    assert (whole_run / "recipe.yaml").read_bytes() == before
    run = tmp_path / "longer"
    shutil.copytree(whole_run, run)
    accepted = train(run, encoded_emoji, "--resume", "--accept-changes", "phases.1.steps=20")
    assert accepted.wait() == [0], accepted.output
    assert max(losses(run)) == 45


def test_a_run_from_before_new_recipe_keys_resumes(tmp_path, encoded_emoji, whole_run):
    run = tmp_path / "older"
    shutil.copytree(whole_run, run)
    state = run / "checkpoints" / "step-00000040" / "state.json"
    content = from_checked_json(state.read_bytes())
    del content["recipe"]["model"]["init_scale"], content["recipe"]["phases"][0]["mask_schedule"], content["recipe"]["optimizer"]
    state.write_text(json.dumps(content))
    same = train(run, encoded_emoji, "--resume")
    assert same.wait() == [0], same.output
    other = train(run, encoded_emoji, "--resume", "optimizer.eps=1e-6")
    assert other.wait() == [1]
    assert "optimizer.eps: 1e-08 then, 1e-06 now" in other.output
    content["recipe"]["optimizer"] = {"no_more_known": 1}
    state.write_text(json.dumps(content))
    unknown = train(run, encoded_emoji, "--resume")
    assert unknown.wait() == [1]
    assert "optimizer.no_more_known: 1 then, None now" in unknown.output


def test_a_recipe_may_add_the_encoders_that_it_used_all_along(tmp_path, encoded_emoji, whole_run):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    named = ["data.resolution=16", "data.autoencoder=pixels", "data.text_encoder=minilm"]
    same = train(run, encoded_emoji, "--resume", *named)
    assert same.wait() == [0], same.output
    other = train(run, encoded_emoji, "--resume", "data.autoencoder=icon")
    assert other.wait() == [1]
    assert "data.autoencoder is icon, but" in other.output


def test_a_step_that_is_not_finite_is_not_taken_and_the_weights_go_back(tmp_path, encoded_emoji):
    """An absurd rate in one step ruins the weights; the steps after it cannot be taken; then all goes on from the checkpoint."""
    phases = (
        "[{name: good, steps: 20, batch_size: 8, learning_rate: 1e-3}, {name: bad, steps: 1, batch_size: 8, learning_rate: 1e30},"
        " {name: after, steps: 20, batch_size: 8, learning_rate: 1e-3}]"
    )
    run = tmp_path / "rolled"
    running = train(run, encoded_emoji, f"phases={phases}", "record.checkpoint_every=10", "guard.rollback_after=3")
    assert running.wait() == [0], running.output
    assert "Rolled back to the weights of step 20" in running.output
    assert "3 of 24 steps were skipped so far" in running.output
    assert (status(run)["skipped"], status(run)["rollbacks"]) == (3, 1)
    recorded = losses(run)
    assert [step for step, loss in recorded.items() if loss is None] == [22, 23, 24]
    assert recorded[41] < 1.2
    newest = run / "checkpoints" / "step-00000041"
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "model.safetensors").values())


def test_a_run_whose_last_step_ruins_the_weights_is_not_called_finished(tmp_path, encoded_emoji):
    phases = "[{name: good, steps: 4, batch_size: 8, learning_rate: 1e-3}, {name: bad, steps: 1, batch_size: 8, learning_rate: 1e38}]"
    run = tmp_path / "ruined"
    running = train(run, encoded_emoji, f"phases={phases}", "optimizer.weight_decay=1000")
    assert running.wait() == [1], running.output
    assert "Some weights are not finite after step 5" in running.output
    assert "the last checkpoint is not in" in running.output
    assert status(run)["state"] == "failed"


def test_a_loss_that_stays_bad_ends_the_run_in_a_sentence(tmp_path, encoded_emoji):
    run = tmp_path / "nan"
    running = train(run, encoded_emoji, "phases.0.learning_rate=1e30", "phases.0.warmup_steps=0", "record.checkpoint_every=1")
    assert running.wait() == [1]
    assert "were skipped" in running.output
    assert "lower learning rate" in running.output
    for folder in (run / "checkpoints").glob("step-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


def test_missing_data_is_named(tmp_path):
    running = train(tmp_path / "run", tmp_path / "nowhere")
    assert running.wait() == [1]
    assert "There is no encoded data set in" in running.output
    assert not (tmp_path / "run").exists()
