"""What a run does when things go wrong: real processes, really killed."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

RECIPE = Path(__file__).parent / "recipe.yaml"


def command(run: Path, data: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "microdit.cli", "train", str(RECIPE), f"data.path={data}", "--out", str(run), *more]


def train(run: Path, data: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(run, data, *more), capture_output=True, text=True, check=False)


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == sorted({r["step"] for r in records})
    return {r["step"]: r["loss"] for r in records}


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it was interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, encoded_emoji) -> Path:
    """40 steps without a break."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    result = train(run, encoded_emoji)
    assert result.returncode == 0, result.stderr
    return run


def test_a_run_leaves_a_record(whole_run):
    assert sorted(losses(whole_run)) == list(range(1, 41))
    assert {p.name for p in whole_run.iterdir()} >= {"recipe.yaml", "metrics.jsonl", "tensorboard", "checkpoints"}
    state = json.loads((whole_run / "checkpoints" / "step-00000040" / "state.json").read_text())
    assert state["images_seen"] == 25 * 8 + 15 * 6


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, encoded_emoji, whole_run):
    run = tmp_path / "killed"
    process = subprocess.Popen(command(run, encoded_emoji), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (run / "checkpoints" / "step-00000020").is_dir() and 23 in losses(run), process)
    process.kill()
    process.wait()
    assert not (run / "checkpoints" / "step-00000040").exists()
    result = train(run, encoded_emoji, "--resume")
    assert result.returncode == 0, result.stderr
    assert "from step 20" in result.stdout
    assert losses(run) == losses(whole_run)
    for name in ("model", "ema", "optimizer"):
        ours, theirs = (load_file(r / "checkpoints" / "step-00000040" / f"{name}.safetensors") for r in (run, whole_run))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, encoded_emoji, whole_run, number):
    run = tmp_path / "stopped"
    process = subprocess.Popen(command(run, encoded_emoji), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (run / "metrics.jsonl").exists() and 3 in losses(run), process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Go on with --resume" in stderr
    assert "Traceback" not in stderr
    assert train(run, encoded_emoji, "--resume").returncode == 0
    assert losses(run) == losses(whole_run)


def test_a_full_disk_ends_in_a_sentence_and_leaves_the_last_checkpoint(tmp_path, encoded_emoji, whole_run):
    run = tmp_path / "full"
    assert train(run, encoded_emoji, "phases.1.steps=1").returncode == 0
    before = {p.name: p.read_bytes() for p in (run / "checkpoints" / "step-00000026").iterdir()}
    largest = max(len(content) for content in before.values())

    def limit_file_size() -> None:  # the kernel refuses to write on, as it does when a disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))

    full = subprocess.run(command(run, encoded_emoji, "--resume"), capture_output=True, text=True, check=False, preexec_fn=limit_file_size)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert "could not be written" in full.stderr
    assert "make room on the disk" in full.stderr
    assert {p.name: p.read_bytes() for p in (run / "checkpoints" / "step-00000026").iterdir()} == before
    assert not any(p.name.startswith(".") for p in (run / "checkpoints").iterdir())
    assert train(run, encoded_emoji, "--resume").returncode == 0


def test_a_damaged_checkpoint_is_passed_over_with_a_word(tmp_path, encoded_emoji, whole_run):
    run = tmp_path / "damaged"
    shutil.copytree(whole_run, run)
    weights = run / "checkpoints" / "step-00000040" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = train(run, encoded_emoji, "--resume")
    assert result.returncode == 0, result.stderr
    assert "is damaged" in result.stdout
    assert "from step 20" in result.stdout
    assert losses(run) == losses(whole_run)
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").write_text("{")
    result = train(run, encoded_emoji, "--resume")
    assert result.returncode == 1
    assert "Every checkpoint" in result.stderr


def test_a_run_is_never_overwritten_and_another_architecture_is_refused(encoded_emoji, whole_run):
    again = train(whole_run, encoded_emoji)
    assert again.returncode == 1
    assert "holds a run already: go on with --resume" in again.stderr
    other = train(whole_run, encoded_emoji, "--resume", "model.dim=64")
    assert other.returncode == 1
    assert "of another architecture" in other.stderr
    assert "dim: 32 in the checkpoint, 64 in the recipe" in other.stderr
    assert "Traceback" not in again.stderr + other.stderr


def test_a_loss_that_is_not_finite_stops_the_run_before_it_does_harm(tmp_path, encoded_emoji):
    run = tmp_path / "nan"
    result = train(run, encoded_emoji, "phases.0.learning_rate=1e30", "record.checkpoint_every=1")
    assert result.returncode == 1
    assert "not finite at step" in result.stderr
    newest = max((run / "checkpoints").iterdir())
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "model.safetensors").values())


def test_missing_data_is_named(tmp_path):
    result = train(tmp_path / "run", tmp_path / "nowhere")
    assert result.returncode == 1
    assert "There is no encoded data set in" in result.stderr
    assert not (tmp_path / "run").exists()
