import os
from contextlib import ExitStack
from functools import partial

import pytest

from microdit.data.dataset import EncodedDataset
from microdit.data.encode import EncodeSettings, encode_source, unfinished
from microdit.data.sources.folders import list_folder, listed_once
from microdit.data.sources.open import open_source
from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError
from tests.data.pictures import picture, records_of, write_file

SETTINGS = EncodeSettings((8,), "fp16", "ids", batch_size=8)


def fill(folder, with_list):
    for number in range(5):
        write_file(folder / f"{number}.png", picture(number, "PNG"))
        write_file(folder / f"{number}.txt", b"words")
    os.symlink(folder.parent, folder / "out")
    if with_list:
        lines = [f'{{"file_name": "{name}.png", "text": "line {name}"}}\n' for name in (3, 1, 3, "gone")]
        write_file(folder / "metadata.jsonl", "".join(lines).encode())
    return folder


@pytest.fixture
def ranks(tmp_path):
    """Return a function that enters `listed_once` for one more process per call."""
    with ExitStack() as stack:
        out = tmp_path / "set"
        yield lambda: stack.enter_context(listed_once(out, unfinished(out), 2))


@pytest.fixture
def listed(monkeypatch):
    """Return a list that grows each time a folder is listed."""
    times = []
    monkeypatch.setattr("microdit.data.sources.folders.list_folder", lambda *arguments: times.append(1) or list_folder(*arguments))
    return times


@pytest.mark.parametrize("with_list", [False, True])
def test_the_second_process_reads_the_listing_of_the_first(tmp_path, monkeypatch, ranks, listed, with_list):
    monkeypatch.setattr("microdit.data.sources.folders.PART_SIZE", 2)
    folder = str(fill(tmp_path / "source", with_list))
    alone = open_source(folder)
    first, second = (open_source(folder, list_once=ranks()) for _ in range(2))
    assert len(listed) == 2  # `alone`, and the first
    assert [source.caption_weights for source in (first, second)] == [alone.caption_weights] * 2
    assert records_of(first) == records_of(second) == records_of(alone)
    assert len({tuple(part.fingerprint() for part in source.parts) for source in (alone, first, second)}) == 1


def test_whoever_comes_when_nobody_is_at_work_lists_anew(tmp_path, listed):
    folder, out = fill(tmp_path / "source", with_list=False), tmp_path / "set"
    for number in (6, 7):  # with the link
        with listed_once(out, unfinished(out), 2) as list_once:
            assert len(open_source(str(folder), list_once=list_once).parts[0].records.args[0]) == number
        write_file(folder / f"{number}.png", picture(number, "PNG"))
    with listed_once(out, unfinished(out), 1) as list_once:
        assert list_once is None  # alone


@pytest.mark.parametrize("change", ["other", "gone", "list"])
def test_processes_that_see_different_folders_are_told_so(tmp_path, ranks, change):
    folder = fill(tmp_path / "source", with_list=change == "list")
    open_source(str(folder), list_once=ranks())
    if change == "other":
        write_file(folder / "1.png", picture(9, "PNG", (20, 20)))
    elif change == "gone":
        (folder / "1.png").unlink()
    else:
        (folder / "metadata.jsonl").write_text("")
    with pytest.raises(UserError, match=r"(on this host, .*, differs from what .* has listed|or differs between the processes)"):
        open_source(str(folder), list_once=ranks())


def test_a_listing_that_is_damaged_is_not_read(tmp_path, ranks):
    folder = str(fill(tmp_path / "source", with_list=False))
    open_source(folder, list_once=ranks())
    path = tmp_path / ".set.part" / ".listing.safetensors"
    path.write_bytes(path.read_bytes().replace(b"1.png", b"2.png"))
    with pytest.raises(UserError, match=r"The listing in .*\.set\.part is damaged \(its checksum differs\): stop all processes"):
        open_source(folder, list_once=ranks())


def test_a_disk_that_refuses_the_listing_is_a_sentence(tmp_path, ranks):
    write_file(tmp_path / ".set.part", b"not a folder")
    with pytest.raises(UserError, match=r"The listing of .*source could not be passed on in .*\.set\.part: .*, or choose another --out"):
        open_source(str(fill(tmp_path / "source", with_list=False)), list_once=ranks())


@pytest.mark.parametrize("with_list", [False, True])
def test_two_ranks_with_one_listing_encode_what_one_process_does(tmp_path, monkeypatch, text_encoder, with_list):
    monkeypatch.setattr("microdit.data.sources.folders.PART_SIZE", 2)
    folder, out = str(fill(tmp_path / "source", with_list)), tmp_path / "set"
    whole = encode_source(open_source(folder), tmp_path / "whole", SETTINGS, Pixels(), text_encoder)
    encode = partial(encode_source, out=out, settings=SETTINGS, autoencoder=Pixels(), text_encoder=text_encoder)
    with listed_once(out, unfinished(out), 2) as first, listed_once(out, unfinished(out), 2) as second:
        sources = [open_source(folder, list_once=once) for once in (first, second)]
        assert encode(sources[0], share=(0, 2)) is None
        card = encode(sources[1], share=(1, 2))
        late = open_source(folder, list_once=first)  # a rank that comes when all is done
        assert encode(late, share=(0, 2)) is None
    assert [shard["sha256"] for shard in card["shards"]] == [shard["sha256"] for shard in whole["shards"]]
    assert card["seen"] == card["rows"] + sum(card["rejected"].values())
    assert EncodedDataset(out).column("key") == EncodedDataset(tmp_path / "whole").column("key")
    assert not list(out.glob(".*"))
    assert not unfinished(out).exists()
