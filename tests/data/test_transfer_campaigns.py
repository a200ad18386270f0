"""A thousand faults, and processes killed at any moment: nothing is lost, and nothing hangs."""

import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from microdit.data.dataset import EncodedDataset, MixedDataset
from microdit.data.sampler import SamplerPhase
from microdit.data.shard_cache import ShardCache
from microdit.data.transfer import pull, push
from microdit.io import places
from tests.data.random_sets import files, random_set
from tests.io.store_server import random_faults
from tests.training.processes import start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "set"
    random_set(folder, shards=12, rows=40)
    return folder


def test_a_thousand_faults_lose_nothing_and_never_hang(local, bucket, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(places, "LONGEST_WAIT", 0.2)
    proxy.fault = random_faults(0, 0.4, ("error", "busy", "cut", "flip", "lost", "slow", "expired"))
    expected = MixedDataset([EncodedDataset(local)], [SamplerPhase(12, 40, (1,))], 0, block_bytes=1e5)
    rounds = 0
    while proxy.faults < 1000:
        began = time.monotonic()
        push(local, bucket / f"set-{rounds}")
        pull(bucket / f"set-{rounds}", tmp_path / "back")
        assert files(tmp_path / "back") == files(local)
        cache = ShardCache(tmp_path / f"cache-{rounds}", 3e-4)
        data = MixedDataset([EncodedDataset(bucket / f"set-{rounds}", cache=cache)], [SamplerPhase(12, 40, (1,))], 0, block_bytes=1e5)
        for step in range(12):
            assert torch.equal(data.batch(step).latents_BCHW, expected.batch(step).latents_BCHW)
        data.close()
        assert time.monotonic() - began < 40 * bucket.deadline
        shutil.rmtree(tmp_path / "back", ignore_errors=True)
        rounds += 1


@pytest.mark.parametrize("command", ["push", "pull"])
def test_a_copy_killed_at_ten_moments_is_whole_in_the_end(local, bucket, proxy, tmp_path, command):
    if command == "pull":
        push(local, bucket / "set")
    arguments = ["data", "push", local, bucket / "set"] if command == "push" else ["data", "pull", bucket / "set", "back"]
    proxy.bytes_per_second = 1e5
    numbers = random.Random(0)
    for _ in range(10):
        running = start(tmp_path / "logs", arguments, cwd=tmp_path)
        time.sleep(numbers.uniform(0.5, 4.0))
        running.kill()
    proxy.reset()
    assert start(tmp_path / "logs", arguments, cwd=tmp_path).wait() == [0] or command == "pull"
    if command == "push":
        pull(bucket / "set", tmp_path / "back")
    assert files(tmp_path / "back") == files(local)
