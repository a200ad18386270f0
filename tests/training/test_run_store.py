"""Runs in a real S3 server, by the command: killed on one machine and resumed on another, with the losses of a run on the disk."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from microdit.checkpoint import FOLDER, STATE
from microdit.io.places import Place
from microdit.reports.remote_run import checkpoint_files
from tests.commands import microdit
from tests.io.store_server import Fault, always
from tests.training.processes import RECIPE, recorded, start, wait_for

RESTART = 75
LOOSE = 5e-3  # relative difference by rounding between one process and two, after forty steps


@pytest.fixture(scope="module")
def losses_on_disk(tmp_path_factory, encoded_emoji) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("on-disk")
    running = start(folder / "logs", ["train", RECIPE, f"data.path={encoded_emoji}", "--out", folder / "run"])
    assert running.wait() == [0], running.output
    return recorded(folder / "run", "loss")


@pytest.fixture
def train(encoded_emoji, bucket, tmp_path):
    """Begin training into the bucket, on a machine of this name."""

    def begin(machine: str, *more: object, ranks: int = 1, data: object = encoded_emoji):
        where = ["--out", bucket / "runs/x", "--workspace", tmp_path / machine]
        return start(tmp_path / "logs", ["train", RECIPE, f"data.path={data}", *where, *more], ranks)

    return begin


def steps_in(run: Place) -> list[int]:
    """The steps of the whole checkpoints, newest first."""
    return [int(name[5:]) for name, sizes in checkpoint_files(run).items() if STATE in sizes]


def losses_in(run: Place, folder: Path) -> dict[int, float]:
    folder.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").download(folder / "metrics.jsonl")
    return recorded(folder, "loss")


def test_a_run_killed_on_one_machine_continues_on_another_with_the_losses_of_the_disk(train, bucket, proxy, tmp_path, losses_on_disk):
    run = bucket / "runs/x"
    running = train("first")
    wait_for(lambda: steps_in(run), running)
    running.kill()
    proxy.seen.clear()
    resumed = train("second", "--resume")
    assert resumed.wait() == [0], resumed.output
    assert losses_in(run, tmp_path / "there") == losses_on_disk
    assert "Trained. Pictures: microdit sample s3://" in resumed.output
    fetched = [request for request in proxy.seen if request.startswith("GET") and ".safetensors" in request]
    assert fetched
    assert all("/shards/" in request for request in fetched)  # no weights that only sampling needs
    assert {"recipe.yaml", "run.json", "status.json"} <= run.list().keys()
    assert json.loads((run / "status.json").read())["state"] == "finished"
    assert steps_in(run) == [40, 20]
    record = (run / "run.json").read() + (run / "recipe.yaml").read()
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in record
