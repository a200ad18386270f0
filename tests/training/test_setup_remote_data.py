"""Training from a real S3 server, by the command: the losses are those of training from the disk."""

import os
import random
import time
from pathlib import Path

import pytest

from microdit.config.load import load_recipe
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.sources.base import Part, Source
from microdit.data.sources.builtin import emoji_source
from microdit.data.transfer import push
from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError
from microdit.training.setup import data_order, open_dataset
from tests.io.store_server import Fault, always, random_faults
from tests.training.processes import HANG, RECIPE, recorded, start

SHARDS, ROWS = 8, 5


@pytest.fixture(scope="module")
def local(text_encoder, tmp_path_factory) -> Path:
    records = list(emoji_source("held_out").parts[0].records())[: SHARDS * ROWS]
    parts = [Part(f"part {first}", lambda first=first: iter(records[first : first + ROWS])) for first in range(0, len(records), ROWS)]
    out = tmp_path_factory.mktemp("encoded") / "set"
    encode_source(Source("in parts", parts), out, EncodeSettings((16,), "fp16", "fp16"), Pixels(), text_encoder)
    return out


@pytest.fixture
def train(local, tmp_path):
    """Begin training, from the disk or from a place, with a cache that holds half of the set, on a machine of this name."""
    size = sum(path.stat().st_size for path in local.glob("*.arrow"))

    def begin(run: str, data: object, machine: str, *more: object, ranks: int = 1):
        cache = [f"data.cache.gigabytes={size / 2 / 1e9}", f"data.cache.folder={tmp_path / machine}"]
        return start(tmp_path / "logs", ["train", RECIPE, f"data.path={data}", *cache, "--out", tmp_path / run, *more], ranks)

    return begin


def test_killed_on_one_machine_it_goes_on_on_another_with_equal_losses(local, bucket, proxy, train, tmp_path):
    assert train("disk", local, "none", "data.order=blocks").wait() == [0]
    push(local, bucket / "set")
    proxy.fault = random_faults(0, 0.05, ("error", "cut", "flip"))
    running = train("store", bucket / "set", "first", f"data.held_out={bucket / 'set'}", ranks=2)
    until = time.monotonic() + HANG
    while not (tmp_path / "store/checkpoints/step-20").exists() and running.alive:
        assert time.monotonic() < until
        time.sleep(0.02)
    running.kill()
    assert train("store", bucket / "set", "second", f"data.held_out={bucket / 'set'}", "--resume").wait() == [0]
    from_disk, from_store = recorded(tmp_path / "disk", "loss"), recorded(tmp_path / "store", "loss")
    assert from_store == pytest.approx(from_disk, rel=1e-5)
    assert load_recipe(tmp_path / "store" / "recipe.yaml").data.order == "blocks"
    record = (tmp_path / "store" / "run.json").read_text() + (tmp_path / "store" / "recipe.yaml").read_text()
    assert not any(os.environ[name] in record for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))


def test_another_order_is_a_change_and_another_cache_folder_is_none(local, bucket, train):
    push(local, bucket / "set")
    few = ["phases.0.steps=1", "phases.1.steps=1", "record.checkpoint_every=1"]
    assert train("run", bucket / "set", "first", *few).wait() == [0]
    assert train("run", bucket / "set", "second", *few, "--resume").wait() == [0]
    changed = train("run", bucket / "set", "second", *few, "data.cache.gigabytes=1", "--resume")
    assert changed.wait() == [1]
    assert "data.cache.gigabytes: " in changed.output
    moved = train("run", local, "second", *few, "data.order=full", "--resume")
    assert moved.wait() == [1]
    assert "data.order: blocks then, full now" in moved.output


def test_a_store_that_fails_ends_the_run_with_its_sentence(local, bucket, proxy, train):
    push(local, bucket / "set")
    proxy.fault = always(Fault("refused"), where=".arrow")
    failed = train("run", bucket / "set", "first")
    assert failed.wait() == [1]
    assert "refuses it (AccessDenied)" in failed.output
    assert "Traceback" not in failed.output


def test_the_order_is_blocks_by_default_where_the_data_is_remote(local, bucket, tmp_path):
    push(local, bucket / "set")
    cache = [f"data.cache.folder={tmp_path}", "data.cache.gigabytes=0.0001"]
    remote = load_recipe(RECIPE, [f"data.path={bucket / 'set'}", *cache])
    assert data_order(remote) == "blocks"
    assert data_order(load_recipe(RECIPE, [f"data.path={local}"])) == "full"
    with pytest.raises(UserError, match=r"data\.order full reads from all shards at any time, .* GB in all: choose data\.order=blocks, or"):
        open_dataset(load_recipe(RECIPE, [f"data.path={bucket / 'set'}", "data.order=full", *cache]), print)
    with pytest.raises(UserError, match=r"may hold 1e-06: raise data\.cache\.gigabytes, best to"):
        open_dataset(
            load_recipe(RECIPE, [f"data.path={bucket / 'set'}", f"data.cache.folder={tmp_path}", "data.cache.gigabytes=1e-6"]), print
        )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_ten_moments_runs_have_the_uninterrupted_losses(local, bucket, proxy, train, tmp_path, ranks):
    assert train("disk", local, "none", "data.order=blocks").wait() == [0]
    push(local, bucket / "set")
    proxy.fault = random_faults(0, 0.05, ("error", "cut", "flip"))
    numbers = random.Random(ranks)
    for machine in range(10):
        running = train("store", bucket / "set", f"machine-{machine}", "record.checkpoint_every=3", "--resume", ranks=ranks)
        time.sleep(numbers.uniform(1.0, 6.0))
        running.kill()
    assert set(train("store", bucket / "set", "last", "record.checkpoint_every=3", "--resume", ranks=ranks).wait()) == {0}
    assert recorded(tmp_path / "store", "loss") == pytest.approx(recorded(tmp_path / "disk", "loss"), rel=1e-5)
