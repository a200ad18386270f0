"""Runs in a real S3 server, by the command: stopped and killed on some machines, continued on others, with the losses of the disk."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from microdit.checkpoint import FOLDER, STATE
from microdit.config.load import load_recipe
from microdit.data.transfer import push
from microdit.distributed import start_world, stop_world
from microdit.io.console import QUIET
from microdit.io.leases import _content, _object
from microdit.io.places import Place
from microdit.reports.remote_run import checkpoint_files
from microdit.training.multi_phase import RunSettings, train_one
from tests.io.store_server import CREDENTIALS, Fault, always, random_faults
from tests.training.processes import RECIPE, on_each, recorded, start, wait_for

RESTART = 75
LOOSE = 5e-3  # relative difference by rounding between one process and two, after forty steps
CACHE = ["data.order=blocks", "data.cache.gigabytes=0.002"]
SHORT = ["phases.0.steps=4", "phases.1.steps=2", "record.checkpoint_every=2", "record.keep_checkpoints=3"]


@pytest.fixture(scope="module")
def losses_on_disk(tmp_path_factory, encoded_emoji) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("on-disk")
    running = start(folder / "logs", ["train", RECIPE, f"data.path={encoded_emoji}", *CACHE, "--out", folder / "run"])
    assert running.wait() == [0], running.output
    return recorded(folder / "run", "loss")


@pytest.fixture
def train(encoded_emoji, bucket, tmp_path):
    """Begin training into the bucket, on a machine of this name."""

    def begin(machine: str, *more: object, ranks: int = 1, data: object = encoded_emoji):
        where = ["--out", bucket / "runs/x", "--workspace", tmp_path / machine, f"data.cache.folder={tmp_path / machine}-cache"]
        return start(tmp_path / "logs", ["train", RECIPE, f"data.path={data}", *where, *more], ranks)

    return begin


def steps_in(run: Place) -> list[int]:
    """The steps of the whole checkpoints, newest first."""
    return [int(name[5:]) for name, sizes in checkpoint_files(run).items() if STATE in sizes]


def losses_in(run: Place, folder: Path) -> dict[int, float]:
    (run / "metrics.jsonl").download(folder / "metrics.jsonl")
    return recorded(folder, "loss")


def test_stopped_killed_and_continued_it_has_the_losses_of_the_disk(train, encoded_emoji, bucket, proxy, tmp_path, losses_on_disk):
    run = bucket / "runs/x"
    push(encoded_emoji, bucket / "set")
    stopped = train("first", *CACHE, data=bucket / "set")
    wait_for(lambda: recorded(tmp_path / "first", "loss"), stopped)
    os.kill(stopped.processes[0].pid, signal.SIGTERM)
    assert stopped.wait() == [RESTART], stopped.output
    assert f"saved in {run}" in stopped.output
    first = steps_in(run)[0]
    assert json.loads((run / "status.json").read())["state"] == "stopped"
    killed = train("second", *CACHE, "record.checkpoint_every=5", "--resume", data=bucket / "set")
    wait_for(lambda: steps_in(run)[0] > first, killed)
    killed.kill()
    proxy.seen.clear()
    resumed = train("third", *CACHE, "--resume", data=bucket / "set")
    assert resumed.wait() == [0], resumed.output
    assert losses_in(run, tmp_path / "there") == losses_on_disk
    assert f"Trained. Pictures: microdit sample {run}" in resumed.output
    fetched = [request for request in proxy.seen if request.startswith("GET") and ".safetensors" in request]
    assert fetched
    assert all("/shards/" in request for request in fetched)  # no weights that only sampling needs
    assert json.loads((run / "status.json").read())["state"] == "finished"
    assert len(steps_in(run)) == 2  # record.keep_checkpoints
    assert steps_in(run)[0] == 40
    record = (run / "run.json").read() + (run / "recipe.yaml").read()
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in record


@pytest.mark.slow  # test_survival.py damages checkpoints on a disk
def test_half_and_damaged_checkpoints_are_passed_over(train, bucket, tmp_path):
    run = bucket / "runs/x"
    assert train("first", *SHORT).wait() == [0]
    before = losses_in(run, tmp_path / "before")
    assert steps_in(run) == [6, 4, 2]
    (run / FOLDER / "step-00000006" / STATE).delete()  # as if killed while it was copied
    shard = run / FOLDER / "step-00000004/shards/shard-00001.safetensors"
    content = bytearray(shard.read())
    content[-1] ^= 1
    shard.write(bytes(content))
    resumed = train("second", *SHORT, "--resume", ranks=2)
    assert resumed.wait() == [0, 0], resumed.output
    assert "step-00000004 is damaged, and passed over" in resumed.output
    assert "6 steps from step 2" in resumed.output
    assert losses_in(run, tmp_path / "after") == pytest.approx(before, rel=LOOSE)
    assert steps_in(run) == [6, 4, 2]
    again = train("second", *SHORT, "--resume")
    assert again.wait() == [0], again.output
    assert f"{run} is finished." in again.output


def test_two_runs_in_one_place_are_refused(train, bucket):
    run = bucket / "runs/x"
    elsewhere = json.loads(_content()) | {"host": "elsewhere", "process": 7, "time": 0}  # that machine's clock is far behind
    _object(run, 1).write(json.dumps(elsewhere).encode())
    refused = train("first", *SHORT)
    assert refused.wait() == [1]
    assert f"{run} is in use by process 7 on elsewhere, which renewed its lease" in refused.output
    _object(run, 1).write(_content(released=True))
    assert train("first", *SHORT).wait() == [0]
    begun_again = train("second", *SHORT)
    assert begun_again.wait() == [1]
    assert f"{run} holds a run already: continue with --resume, or choose another --out." in begun_again.output


def test_a_run_whose_last_checkpoint_cannot_be_copied_does_not_end_well(train, bucket, proxy):
    proxy.fault = always(Fault("refused"), where=f"PUT /{bucket.name}/runs/x/checkpoints/")
    failed = train("first", *SHORT)
    assert failed.wait() == [1]
    assert f"The checkpoint of step 2 could not be copied to {bucket / 'runs/x/checkpoints'}" in failed.output
    assert f"Trained to the end, but the last checkpoint is not in {bucket / 'runs/x'}" in failed.output
    assert "Trained. Pictures" not in failed.output
    proxy.reset()
    assert steps_in(bucket / "runs/x") == []


@pytest.mark.slow  # encodes the demo's data
def test_the_demos_data_trains_from_the_store_as_from_the_disk(bucket, tmp_path):
    """Through an empty cache of 2 MB, which holds one of its shards at a time; killed, and resumed in another place."""
    recipe = ["emoji-fast", *CACHE, "phases.0.steps=12", "phases.0.batch_size=64", "record.checkpoint_every=4"]
    for source, name in (("emoji", "emoji"), ("scenes:1000", "scenes")):
        encoded = start(tmp_path / "logs", ["data", "encode", source, "--out", tmp_path / name])
        assert encoded.wait() == [0], encoded.output
        pushed = start(tmp_path / "logs", ["data", "push", tmp_path / name, bucket / name])
        assert pushed.wait() == [0], pushed.output

    def train(data: object, out: object, machine: str, *more: object):
        sets = [f"data.sets.{name}.path={data}/{name}" for name in ("emoji", "scenes")]
        cache = f"data.cache.folder={tmp_path / machine}-shards"
        return start(tmp_path / "logs", ["train", *recipe, *sets, cache, "record.metrics_every=1", "--out", out, *more])

    disk = train(tmp_path, tmp_path / "disk", "disk")
    assert disk.wait() == [0], disk.output
    run = bucket / "runs/demo"
    killed = train(bucket, run, "one", "--workspace", tmp_path / "one")
    wait_for(lambda: steps_in(run), killed)
    killed.kill()
    resumed = train(bucket, run, "two", "--workspace", tmp_path / "two", "--resume")
    assert resumed.wait() == [0], resumed.output
    assert len(losses_in(run, tmp_path / "there")) == 12
    assert losses_in(run, tmp_path / "there") == recorded(tmp_path / "disk", "loss")


def test_a_workspace_with_other_files_is_refused_and_loses_none(train, bucket, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused = train("mine", *SHORT)
    assert refused.wait() == [1]
    assert f"--workspace {tmp_path / 'mine'} holds other files" in refused.output
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert not steps_in(bucket / "runs/x")


def test_commands_read_runs_from_there(train, bucket, tmp_path):
    run = bucket / "runs/x"
    trained = train("first", *SHORT, "record.sample_prompts=[red heart]", "record.sample_steps=2")
    assert trained.wait() == [0], trained.output
    listed = start(tmp_path / "logs", ["runs", bucket / "runs"])
    assert listed.wait() == [0]
    assert "finished" in listed.output
    reported = start(tmp_path / "logs", ["report", run, "--out", tmp_path / "page.html"])
    assert reported.wait() == [0], reported.output
    assert "data:image/png" in (tmp_path / "page.html").read_text()
    sampled = start(tmp_path / "logs", ["sample", run, "red heart", "--steps", "2", "--out", tmp_path / "heart.png"])
    assert sampled.wait() == [0], sampled.output
    assert (tmp_path / "heart.png").is_file()
    missing = start(tmp_path / "logs", ["export", bucket / "nothing", tmp_path / "model"])
    assert missing.wait() == [1]
    assert f"{bucket / 'nothing'} holds no run" in missing.output


def _train_with_a_disk_of_its_own(url: str, address: str, data: str, folder: str, resume: bool) -> None:
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=address, AWS_CONFIG_FILE=os.devnull)
    world = start_world("cpu")
    own = Path(folder) / f"machine-{world.rank}"
    recipe = load_recipe(RECIPE, [f"data.path={data}", *CACHE, "record.checkpoint_every=10", *([] if resume else ["engine.sharding=fsdp"])])
    train_one(recipe, Place(url, 20.0), RunSettings(resume, workspace=own), QUIET, world)
    stop_world()


@pytest.mark.slow  # test_setup_remote_data.py resumes one of two processes from an empty cache
def test_two_machines_without_a_disk_in_common(bucket, proxy, encoded_emoji, tmp_path, losses_on_disk):
    run = bucket / "runs/x"
    more = [run.url, proxy.address, str(encoded_emoji), str(tmp_path)]
    killed = on_each(_train_with_a_disk_of_its_own, 2, 1, tmp_path / "logs-1", *more, False)
    wait_for(lambda: steps_in(run), killed)
    killed.kill()
    resumed = on_each(_train_with_a_disk_of_its_own, 2, 1, tmp_path / "logs-2", *more, True)
    assert resumed.wait() == [0, 0], resumed.output
    assert losses_in(run, tmp_path / "there") == pytest.approx(losses_on_disk, rel=LOOSE)
    shards = {name for name in checkpoint_files(run)["step-00000040"] if name.startswith("shards/")}
    assert len(shards) == 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_runs_killed_at_ten_moments_of_copies_have_the_losses_of_the_disk(train, bucket, proxy, tmp_path, losses_on_disk, ranks):
    proxy.fault = random_faults(ranks, 0.03, ("error", "cut", "flip", "lost"))
    numbers = random.Random(ranks)
    for machine in range(10):
        running = train(f"machine-{machine}", *CACHE, "record.checkpoint_every=3", "--resume", ranks=ranks)
        metrics = tmp_path / f"machine-{machine}/metrics.jsonl"
        if machine % 2:  # while it trains and copies, else while it starts and fetches
            wait_for(lambda metrics=metrics, running=running: metrics.exists() or not running.alive, running)
        time.sleep(numbers.uniform(0.0, 0.5 if machine % 2 else 4.0))
        running.kill()
        if set(running.wait()) == {0}:  # the machine is so fast that the run is finished
            break
    assert machine >= 4, "the run is too short to be killed often"
    last = train("last", *CACHE, "record.checkpoint_every=3", "--resume", ranks=ranks)
    assert set(last.wait()) == {0}, last.output
    proxy.reset()
    assert losses_in(bucket / "runs/x", tmp_path / "there") == pytest.approx(losses_on_disk, rel=LOOSE)
