"""Places in object stores, against a real S3 server with faults in between."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from microdit.errors import UserError
from microdit.io import places
from microdit.io.places import MissingObject, Place, StoreError, WrongBytes, is_remote, location
from tests.io.store_server import CREDENTIALS, Fault, Proxy, always, faults_in_order
from tests.training.processes import HANG


@pytest.fixture
def two_parts(tmp_path: Path, monkeypatch) -> Path:
    """A file of 5 MB and a bit, with parts of 2 MB, so that it is moved in three."""
    monkeypatch.setattr(places, "PART", 5 << 20)
    path = tmp_path / "sent"
    path.write_bytes(os.urandom((11 << 20) + 7))
    return path


@pytest.fixture
def no_waits(monkeypatch) -> None:
    monkeypatch.setattr(places, "FIRST_WAIT", 0.01)


def test_names_of_stores_are_places_and_all_others_are_paths(tmp_path):
    assert location("s3://bucket/data/") == Place("s3://bucket/data")
    assert location("hf://datasets/someone/set") == Place("hf://datasets/someone/set")
    assert location(f"file://{tmp_path}") == tmp_path
    assert location("data/emoji") == Path("data/emoji")
    assert [is_remote(name) for name in ("s3://b/x", "gs://b", "az://b", "hf://b", "s3:/b", "data", "file:///x")] == [True] * 4 + [
        False
    ] * 3


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("ftp://host/x", "starts with ftp://, and the stores known are s3://, gs://, az://, hf://"),
        ("s3://", "write s3://BUCKET/FOLDER"),
        ("s3://key:secret@bucket/x", "without keys or options"),
        ("s3://bucket/x?X-Amz-Signature=1", "without keys or options"),
    ],
)
def test_a_name_that_is_no_place_is_a_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence):
        location(name)


def test_objects_are_written_read_listed_and_deleted(bucket):
    folder = bucket / "a folder"
    (folder / "one").write(b"0123456789")
    (folder / "deep" / "two").write(b"")
    (bucket / "a folder beside").write(b"x")
    assert (folder / "one").read() == b"0123456789"
    assert (folder / "one").read(2, 5) == b"234"
    assert ((folder / "one").size(), folder.size(), (folder / "none").exists()) == (10, None, False)
    assert folder.list() == {"deep/two": 0, "one": 10}
    assert (bucket / "nothing").list() == {}
    (folder / "one").delete()
    (folder / "one").delete()
    assert folder.list() == {"deep/two": 0}
    with pytest.raises(MissingObject, match=r"a folder/one cannot be read: there is no such object in S3 at 127\.0\.0\.1:\d+\."):
        (folder / "one").read()


def test_one_of_several_creates_an_object(bucket):
    lease = bucket / "lease"
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda number: lease.create(f"process {number}".encode()), range(4)))
    assert sum(made) == 1
    assert lease.read() == f"process {made.index(True)}".encode()


def test_a_creation_whose_answer_is_lost_is_recognised(bucket, proxy, no_waits):
    proxy.fault = faults_in_order(Fault("lost"), where="PUT")
    assert (bucket / "lease").create(b"process 1")
    assert not (bucket / "lease").create(b"process 2")


def test_a_creation_that_arrives_changed_is_written_again(bucket, proxy):
    proxy.fault = faults_in_order(Fault("flip", 3), where="PUT")
    assert (bucket / "lease").create(b"process 1")
    assert (bucket / "lease").read() == b"process 1"


def test_files_are_moved_in_parts(bucket, proxy, two_parts, tmp_path):
    (bucket / "file").upload(two_parts)
    assert sum("partNumber=" in request for request in proxy.seen) == 3
    (bucket / "file").download(tmp_path / "got", sha256=hashlib.sha256(two_parts.read_bytes()).hexdigest())
    assert (tmp_path / "got").read_bytes() == two_parts.read_bytes()
    assert sum(request.startswith("GET") for request in proxy.seen) == 3


@pytest.mark.parametrize("kind", ["error", "busy", "cut", "slow", "lost", "expired"])
def test_faults_that_pass_are_lived_through(bucket, proxy, no_waits, tmp_path, kind):
    content = os.urandom(100_000)
    proxy.fault = faults_in_order(*[Fault(kind, 0.1 if kind == "slow" else 10)] * 2)
    (bucket / "file").write(content)
    proxy.fault = faults_in_order(*[Fault(kind, 0.1 if kind == "slow" else 10)] * 2)
    (bucket / "file").download(tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == content
    assert proxy.faults == 4


def test_only_what_failed_is_requested_again(bucket, proxy, no_waits, two_parts, tmp_path):
    (bucket / "file").upload(two_parts)
    proxy.reset()
    proxy.fault = faults_in_order(*[Fault("cut", 1000)] * 3, where="GET")
    (bucket / "file").download(tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == two_parts.read_bytes()
    assert proxy.sent < two_parts.stat().st_size + 10_000


def test_wrong_bytes_are_never_stored_or_kept(bucket, proxy, no_waits, tmp_path):
    content = os.urandom(100_000)
    (tmp_path / "sent").write_bytes(content)
    proxy.fault = faults_in_order(Fault("flip", 5), where="PUT")
    (bucket / "file").upload(tmp_path / "sent")
    assert (bucket / "file").read() == content
    proxy.fault = faults_in_order(Fault("flip", 5), where="GET")
    (bucket / "file").download(tmp_path / "got", sha256=hashlib.sha256(content).hexdigest())
    assert (tmp_path / "got").read_bytes() == content
    (bucket / "file").write(content[::-1])
    with pytest.raises(WrongBytes, match=r"file came 4 times with another SHA-256"):
        (bucket / "file").download(tmp_path / "other", sha256=hashlib.sha256(content).hexdigest())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got", "sent"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("error", "the store answered"),
        ("cut", "the connection failed"),
        ("flip", "the bytes that came do not match the store's checksum"),
        ("expired", "the credentials have expired"),
    ],
)
def test_what_keeps_failing_ends_at_the_deadline_with_a_sentence(bucket, proxy, waited, kind, reason):
    (bucket / "file").write(b"0123456789")
    proxy.fault = always(Fault(kind, 3))
    with pytest.raises(StoreError, match=rf"file could not be read: .* failed, the last because {reason}") as error:
        (bucket / "file").read()
    assert HANG / 2 < waited.now <= HANG
    assert not any(secret in str(error.value) for secret in CREDENTIALS.values() if secret.startswith("test"))


def test_a_store_that_does_not_answer_is_not_waited_for_beyond_the_deadline(bucket, proxy):
    (bucket / "file").write(b"0123456789")
    proxy.fault = always(Fault("slow", HANG))
    with pytest.raises(StoreError, match=r"file could not be read: .* failed, the last because the store did not answer in time"):
        replace(bucket / "file", deadline=3.0).read()


def test_an_object_that_is_listed_late_is_waited_for(bucket, proxy, no_waits):
    (bucket / "file").write(b"0123456789")
    proxy.fault = faults_in_order(*[Fault("late")] * 3, where="GET")
    assert (bucket / "file").read(listed=True) == b"0123456789"
    proxy.fault = faults_in_order(Fault("late"), where="GET")
    with pytest.raises(MissingObject):
        (bucket / "file").read()


def test_a_bucket_that_does_not_exist_is_a_sentence(bucket, tmp_path):
    other = Place("s3://no-such-bucket-here") / "x"
    (tmp_path / "file").write_bytes(b"1")
    for use in (other.read, other.size, other.list, lambda: other.write(b"1"), lambda: other.upload(tmp_path / "file")):
        with pytest.raises(StoreError, match=r"no such bucket in S3 at .*: |there is no such bucket in S3 at") as error:
            use()
        assert "AWS_ENDPOINT_URL" in str(error.value)


def test_refused_and_missing_credentials_are_sentences_at_once(bucket, proxy, monkeypatch):
    proxy.fault = always(Fault("refused"))
    with pytest.raises(StoreError, match=r"x cannot be read: S3 at .* refuses it \(AccessDenied\)") as error:
        (bucket / "x").read()
    assert "test-secret-key" not in str(error.value)
    proxy.reset()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    places._file_system.cache_clear()
    with pytest.raises(StoreError, match=r"x cannot be read: no credentials for S3 at .* were found \(AWS_ACCESS_KEY_ID"):
        (bucket / "x").read()
    places._file_system.cache_clear()


def test_a_server_that_is_gone_is_a_sentence(proxy: Proxy, waited, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    places._file_system.cache_clear()
    with pytest.raises(StoreError, match=r"could not be read: .* See whether S3 at 127\.0\.0\.1:9 can be reached"):
        Place("s3://bucket/x", deadline=HANG).read()
    places._file_system.cache_clear()
