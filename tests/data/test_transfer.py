"""Sets copied to a real S3 server and back."""

import shutil
from pathlib import Path

import pytest

from microdit.data.dataset import EncodedDataset
from microdit.data.transfer import pull, push
from microdit.errors import UserError
from microdit.io import places
from microdit.io.places import StoreError
from tests.commands import microdit
from tests.data.random_sets import files, random_set
from tests.io.store_server import Fault, always, random_faults


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "set"
    random_set(folder, shards=8, rows=4)
    return folder


def test_a_set_comes_back_as_it_was(local, bucket, tmp_path):
    push(local, bucket / "set")
    pull(bucket / "set", tmp_path / "back")
    assert files(tmp_path / "back") == files(local)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back"]


def test_a_second_push_copies_nothing_and_another_set_is_refused(local, bucket, tmp_path, proxy):
    push(local, bucket / "set")
    proxy.reset()
    push(local, bucket / "set")
    assert not any(request.startswith("PUT") for request in proxy.seen)
    random_set(tmp_path / "other", shards=8, rows=4, seed=1)
    with pytest.raises(UserError, match=r"set holds another data set already"):
        push(tmp_path / "other", bucket / "set")


def test_an_interrupted_push_goes_on_and_counts_only_at_its_end(local, bucket, proxy, waited):
    proxy.fault = always(Fault("error"), where="shard-00007.arrow")
    with pytest.raises(StoreError, match=r"shard-00007\.arrow could not be written"):
        push(local, bucket / "set")
    proxy.reset()
    with pytest.raises(UserError, match="it is being written"):
        EncodedDataset(bucket / "set")
    push(local, bucket / "set")
    assert (
        sum(request.startswith("PUT") and ".arrow" in request for request in proxy.seen) <= 4
    )  # the last one, and those at work beside it
    assert EncodedDataset(bucket / "set").verify() == []


def test_an_interrupted_pull_keeps_what_is_whole(local, bucket, proxy, waited, tmp_path):
    push(local, bucket / "set")
    proxy.fault = always(Fault("cut", 3), where="shard-00005.arrow")
    with pytest.raises(StoreError, match=r"shard-00005\.arrow could not be read"):
        pull(bucket / "set", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    kept = list((tmp_path / ".back.pull").glob("*.arrow"))
    kept[0].write_bytes(b"\0" * kept[0].stat().st_size)
    proxy.reset()
    pull(bucket / "set", tmp_path / "back")
    assert files(tmp_path / "back") == files(local)
    assert sum(request.startswith("GET") and ".arrow" in request for request in proxy.seen) == 8 - len(kept) + 1


def test_faults_lose_nothing_either_way(local, bucket, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "FIRST_WAIT", 0.01)
    proxy.fault = random_faults(1, 0.2, ("busy", "cut", "flip", "lost", "slow"))
    push(local, bucket / "set")
    pull(bucket / "set", tmp_path / "back")
    assert files(tmp_path / "back") == files(local)
    assert proxy.faults > 5


def test_the_commands_copy_verify_and_explain(local, bucket, tmp_path):
    place = bucket / "set"
    for arguments in (["push", local, place], ["verify", place], ["pull", place, "back"]):
        done = microdit("data", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.output
    assert files(tmp_path / "back") == files(local)
    refused = microdit("data", "push", local, "data/other", cwd=tmp_path)
    assert "data/other is a folder of this machine: name a place in an object store" in refused.output
    missing = microdit("data", "pull", "s3://no-such-bucket-here/set", "other", cwd=tmp_path)
    assert missing.returncode == 1
    assert "there is no such bucket in S3 at 127.0.0.1" in missing.output
    shutil.rmtree(tmp_path / "back")
