"""Sets that are read from a real S3 server through a cache that holds a part of them."""

import resource
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from microdit.data import shard_cache
from microdit.data.dataset import EncodedDataset, MixedDataset
from microdit.data.sampler import SamplerPhase
from microdit.data.shard_cache import NEVER, FetchAhead, ShardCache
from microdit.data.shards import DamagedShard
from microdit.data.transfer import push
from microdit.errors import UserError
from microdit.io import places
from microdit.io.places import Place, StoreError
from tests.data.random_sets import random_set
from tests.io.store_server import Fault, always, faults_in_order, random_faults
from tests.training.processes import HANG

ROWS, SHARDS, STEPS = 8, 12, 24


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "set"
    random_set(folder, SHARDS, ROWS)
    return folder


@pytest.fixture
def remote(local, bucket):
    """The set in a bucket, of which counts start now."""
    push(local, bucket / "set")
    return bucket / "set"


@pytest.fixture
def cache(tmp_path, local) -> ShardCache:
    """A cache that holds a third of the set."""
    return ShardCache(tmp_path / "cache", size_of(local) / 3 / 1e9)


def size_of(folder: Path) -> int:
    """The bytes of all shards; those that a cache deletes meanwhile count nothing."""
    total = 0
    for path in folder.glob("*.arrow"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def mixture(folder, cache: ShardCache | None, local: Path, steps: int = STEPS, **options) -> MixedDataset:
    data = EncodedDataset(folder, cache=cache)
    phases = [SamplerPhase(steps, ROWS, (1,))]
    return MixedDataset([data], phases, 0, block_bytes=size_of(local) / SHARDS * 1.5, **options)


def gets(proxy, remote: Place) -> list[str]:
    """The shards that were asked for in this test's bucket: threads of earlier tests may still ask for theirs."""
    folder = "GET /" + remote.url.removeprefix("s3://")
    return [request.rpartition("/")[2] for request in proxy.seen if request.startswith(folder) and ".arrow" in request]


def assert_equal_batches(one: MixedDataset, two: MixedDataset, steps) -> None:
    for step in steps:
        first, second = one.batch(step), two.batch(step)
        assert torch.equal(first.latents_BCHW, second.latents_BCHW)
        assert torch.equal(first.text_BLE, second.text_BLE)


def test_batches_are_those_of_the_local_set_and_the_cache_stays_small(local, remote, cache, proxy):
    data, largest = mixture(remote, cache, local), 0
    for step in range(STEPS):
        assert_equal_batches(data, mixture(local, None, local), [step])
        largest = max(largest, size_of(cache.folder))
    data.close()
    assert largest <= cache.bytes
    counts = Counter(gets(proxy, remote))
    assert len(counts) == SHARDS
    assert sum(counts.values()) <= 3 * SHARDS  # two epochs, and a few that had to go before their turn


def test_any_step_is_read_first_and_from_an_empty_cache(local, remote, cache, tmp_path):
    expected = mixture(local, None, local)
    data = mixture(remote, cache, local)
    assert_equal_batches(data, expected, [17, 18, 3])
    data.close()
    shutil.rmtree(cache.folder)
    again = mixture(remote, ShardCache(cache.folder, cache.bytes / 1e9), local)
    assert_equal_batches(again, expected, [19])
    again.close()


def test_shards_come_ahead_of_their_use(local, remote, tmp_path, proxy):
    data = mixture(remote, ShardCache(tmp_path / "cache", 2 * size_of(local) / 1e9), local)
    data.batch(0)
    until = time.monotonic() + HANG
    while len(set(gets(proxy, remote))) < SHARDS and time.monotonic() < until:
        time.sleep(0.02)
    data.close()
    assert Counter(gets(proxy, remote)) == {f"shard-{number:05d}.arrow": 1 for number in range(SHARDS)}


def test_processes_share_a_cache(local, remote, tmp_path, proxy):
    """Two data sets with caches of their own objects, as two processes have, copy each shard once."""
    both = [mixture(remote, ShardCache(tmp_path / "cache", 2 * size_of(local) / 1e9), local) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda data: [data.stored(step, 0, 2) for step in range(12)], both))
    for data in both:
        data.close()
    assert max(Counter(gets(proxy, remote)).values()) == 1


def test_the_cache_may_be_smaller_than_two_shards(local, remote, tmp_path):
    largest = max(path.stat().st_size for path in local.glob("*.arrow"))
    data = mixture(remote, ShardCache(tmp_path / "cache", 1.2 * largest / 1e9), local)
    assert_equal_batches(data, mixture(local, None, local), range(14))
    data.close()


def test_what_is_needed_last_goes_first(local, remote, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "THREADS", 0)
    data = EncodedDataset(remote)
    shards = [data.remote(number) for number in range(SHARDS)]
    cache = ShardCache(tmp_path / "cache", 4.2 * shards[0].bytes / 1e9)
    ahead = FetchAhead(cache, lambda step: [shards[step]], SHARDS)

    def there() -> list[int]:
        return [number for number, shard in enumerate(shards) if cache.path(shard).is_file()]

    ahead.at(0)
    while ahead._look_further():
        pass
    assert [ahead.next_step(shard.sha256) for shard in shards[:4]] == [0, 1, 2, NEVER]  # three fill the window
    for number in (0, 1, 2, 9):
        assert cache.fetch(shards[number], needed=-1)
    assert cache.fetch(shards[10], needed=3)
    assert there() == [0, 1, 2, 10]
    cache.bytes = int(3.2 * shards[0].bytes)
    assert cache.fetch(shards[11], needed=1)
    assert there() == [0, 1, 11]
    cache.bytes = int(2.2 * shards[0].bytes)
    assert not cache.fetch(shards[3], needed=3)
    assert there() == [0, 1]
    ahead.at(1)
    assert cache.fetch(shards[2], needed=2)
    assert there() == [1, 2]


def test_faults_change_nothing(local, remote, cache, proxy, monkeypatch):
    monkeypatch.setattr(places, "FIRST_WAIT", 0.01)
    proxy.fault = random_faults(0, 0.6, ("error", "cut", "flip", "slow", "late"))
    data = mixture(remote, cache, local)
    assert_equal_batches(data, mixture(local, None, local), range(8))
    data.close()
    assert proxy.faults > 2


def test_a_store_that_fails_for_good_is_a_sentence_that_names_the_shard(local, remote, tmp_path, proxy, waited):
    data = mixture(remote, ShardCache(tmp_path / "cache"), local)
    proxy.fault = always(Fault("cut", 10), where=".arrow")
    with pytest.raises(StoreError, match=r"set/shard-\d{5}\.arrow could not be read: .* See whether S3 at"):
        data.batch(0)
    data.close()


def test_other_bytes_in_the_store_are_damage(local, remote, cache, monkeypatch):
    monkeypatch.setattr(places, "FIRST_WAIT", 0.01)
    for path in local.glob("*.arrow"):
        (remote / path.name).write(b"\0" * path.stat().st_size)
    with pytest.raises(DamagedShard, match=r"set/shard-00000\.arrow came 4 times with another SHA-256"):
        EncodedDataset(remote, cache=cache).read(0, 0)
    assert EncodedDataset(remote, cache=cache).verify() == [f"shard-{number:05d}.arrow" for number in range(SHARDS)]


def test_a_copy_that_the_disk_damaged_is_copied_again(local, remote, cache, proxy):
    data = EncodedDataset(remote, cache=cache)
    expected = [bytes(blob) for blob in EncodedDataset(local).read(0, 1)]
    data.read(0, 0)
    (copy,) = cache.folder.glob("*.arrow")
    copy.write_bytes(b"\0" * copy.stat().st_size)
    assert [bytes(blob) for blob in data.read(0, 1)] == expected
    assert len(gets(proxy, remote)) == 2


def test_a_full_disk_is_a_sentence(local, remote, cache):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # what a full disk does, the system does here
    try:
        with pytest.raises(UserError, match=r"cache cannot take shard-00000\.arrow \(0\.0 MB\): .*\. Make room there, or choose another"):
            EncodedDataset(remote, cache=cache).read(0, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(cache.folder.glob(".*.part")) == []


def test_a_cache_that_cannot_hold_a_shard_is_refused(remote, tmp_path):
    data = EncodedDataset(remote, cache=ShardCache(tmp_path / "cache", 1e-6))
    with pytest.raises(UserError, match=r"shard-00000\.arrow has .* GB, and .*cache may hold 1e-06: raise data\.cache\.gigabytes"):
        data.cache.check(data.remote(0))


def test_a_set_that_is_being_written_is_a_sentence(local, bucket, cache):
    (bucket / "set" / "plan.json").upload(local / "plan.json")
    with pytest.raises(UserError, match=r"no encoded data set in s3://.*/set \(no card\.json\): it is being written"):
        EncodedDataset(bucket / "set", cache=cache)
    with pytest.raises(
        UserError, match=r"no encoded data set in s3://.*/other \(no card\.json\): .* 'microdit data push' copies one there"
    ):
        EncodedDataset(bucket / "other", cache=cache)


def test_a_manifest_with_names_that_lead_elsewhere_is_refused(local, remote, cache):
    (remote / "card.json").write((local / "card.json").read_bytes().replace(b'"shard-00003.arrow"', b'"../other.arrow"'))
    with pytest.raises(UserError, match=r"card\.json is damaged"):
        EncodedDataset(remote, cache=cache)


def test_a_shard_that_the_store_shows_late_is_waited_for(local, remote, cache, proxy, monkeypatch):
    monkeypatch.setattr(places, "FIRST_WAIT", 0.01)
    data = EncodedDataset(remote, cache=cache)
    proxy.fault = faults_in_order(*[Fault("late")] * 3, where=".arrow")
    assert len(data.read(0, 0)) == 2
    assert proxy.faults == 3
