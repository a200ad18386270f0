"""Encodings into a real S3 server: the same files as on a disk, from several machines, and after interruptions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from microdit.data.dataset import EncodedDataset
from microdit.data.encode import EncodeSettings, encode_source, is_encoded
from microdit.data.encode_plan import EncodeEvents
from microdit.data.sources.base import Part, Source
from microdit.data.sources.builtin import emoji_source
from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError
from microdit.io import leases
from microdit.io.places import Place, StoreError
from tests.io.store_server import Fault, always

SETTINGS = EncodeSettings((8,), batch_size=2)
PARTS = 5


@pytest.fixture(scope="module")
def source() -> Source:
    records = list(emoji_source("held_out").parts[0].records())[: 3 * PARTS]
    records[4] = replace(records[4], image=b"no picture")
    parts = [Part(f"part {first}", lambda first=first: iter(records[first : first + 3])) for first in range(0, 3 * PARTS, 3)]
    return Source("five parts", parts)


@pytest.fixture(scope="module")
def local(source, text_encoder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("encoded") / "local"
    encode_source(source, out, SETTINGS, Pixels(), text_encoder)
    return out


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine with an empty cache; called again, another one."""

    def move(name: str) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return tmp_path / name

    move("first")
    return move


def encode(source, out: Place, text_encoder, share=(0, 1), done: list[int] | None = None):
    """Encode, and add to `done` the numbers of parts that are reported."""
    events = EncodeEvents(lambda records, parts: None if done is None else done.append(parts))
    return encode_source(source, out, SETTINGS, Pixels(), text_encoder, share, events)


def files(place: Path | Place) -> dict[str, bytes]:
    if isinstance(place, Place):
        return {name: (place / name).read() for name in place.list()}
    return {path.name: path.read_bytes() for path in place.iterdir()}


def test_the_files_are_those_of_a_local_encoding(source, local, bucket, text_encoder, machine):
    manifest = encode(source, bucket / "set", text_encoder)
    assert files(bucket / "set") == files(local)
    assert manifest["rows"] == 3 * PARTS - 1
    assert is_encoded(source, bucket / "set", SETTINGS, Pixels(), text_encoder)
    assert list(machine("first").rglob("*.arrow")) == []
    with pytest.raises(UserError, match=r"set exists already: delete it, or choose another --out\."):
        encode(source, bucket / "set", text_encoder)


def test_machines_without_a_shared_disk_make_one_set(source, local, bucket, text_encoder, machine):
    assert encode(source, bucket / "set", text_encoder, (1, 2)) is None
    with pytest.raises(UserError, match="no encoded data set"):
        EncodedDataset(bucket / "set")
    machine("second")
    assert encode(source, bucket / "set", text_encoder, (0, 2)) is not None
    assert files(bucket / "set") == files(local)
    assert encode(source, bucket / "set", text_encoder, (1, 2)) is None  # started again when all is done


def test_an_interrupted_encoding_goes_on_behind_the_last_whole_shard(source, local, bucket, text_encoder, machine, proxy, waited):
    out = bucket / "set"
    proxy.fault = always(Fault("error"), where="PUT /" + out.url.removeprefix("s3://") + "/shard-00003.arrow")
    with pytest.raises(StoreError, match=r"set/shard-00003\.arrow could not be written"):
        encode(source, out, text_encoder)
    proxy.reset()
    machine("second")
    done: list[int] = []
    assert encode(source, bucket / "set", text_encoder, done=done) is not None
    assert done[0] >= 3  # parts that were there
    assert files(bucket / "set") == files(local)


def test_a_changed_part_is_encoded_again(source, bucket, text_encoder):
    assert encode(source, bucket / "set", text_encoder, (0, 2)) is None
    changed = replace(source, parts=[Part(part.name, part.records, known=lambda: "changed") for part in source.parts])
    for rank in (1, 0):
        encode(changed, bucket / "set", text_encoder, (rank, 2))
    entries = [json.loads((bucket / "set" / f"shard-{number:05d}.json").read()) for number in range(PARTS)]
    assert {entry["fingerprint"] for entry in entries} == {changed.parts[0].fingerprint()}
    assert len(EncodedDataset(bucket / "set")) == 3 * PARTS - 1


def test_another_encoding_in_the_same_place_is_refused(source, bucket, text_encoder):
    encode(source, bucket / "set", text_encoder, (0, 2))
    with pytest.raises(UserError, match=r"set was started with other settings \(latents differ\): delete it, or use the same settings"):
        encode_source(source, bucket / "set", replace(SETTINGS, latents="fp16"), Pixels(), text_encoder, (1, 2))
    with pytest.raises(UserError, match=r"This process sees another source five parts .*\(4 parts here, 5 there\)"):
        encode(replace(source, parts=source.parts[:4]), bucket / "set", text_encoder, (1, 2))


def test_a_second_encoding_of_the_same_share_is_refused(source, local, bucket, text_encoder, machine, monkeypatch):
    monkeypatch.setattr(leases, "RENEWED", 0.1)  # seconds
    monkeypatch.setattr(leases, "LOOKS", 0.3)

    def try_from_another_machine(records: int, parts: int) -> None:
        if parts == 1 and not refused:
            machine("second")
            with pytest.raises(UserError, match=r"rank-0-of-1 is in use by process \d+ on ") as error:
                encode(source, bucket / "set", text_encoder)
            refused.append(str(error.value))
            machine("first")

    refused: list[str] = []
    events = EncodeEvents(try_from_another_machine)
    assert encode_source(source, bucket / "set", SETTINGS, Pixels(), text_encoder, events=events) is not None
    assert len(refused) == 1
    assert files(bucket / "set") == files(local)
    assert (bucket / ".set.part").list() == {}  # no lease is left beside a set that is complete


def test_an_encoding_that_lost_its_machine_is_taken_over(source, local, bucket, text_encoder, monkeypatch):
    monkeypatch.setattr(leases, "EXPIRES", 2.0)
    monkeypatch.setattr(leases, "LOOKS", 0.3)
    dead = json.dumps({"host": "elsewhere", "process": 7, "released": False}).encode()
    (bucket / ".set.part" / "rank-0-of-1" / ".lease" / "00000001.json").write(dead)
    sentences: list[str] = []
    encode_source(source, bucket / "set", SETTINGS, Pixels(), text_encoder, warn=sentences.append)
    assert any("was last used by process 7 on elsewhere; waiting" in sentence for sentence in sentences)
    assert files(bucket / "set") == files(local)
