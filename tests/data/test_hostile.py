"""Hostile records: each is rejected with a reason, and none affects other records, memory or speed."""

import random
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from microdit.data.dataset import EncodedDataset
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.look import look
from microdit.data.sources.open import open_source
from microdit.encoders.autoencoder import Pixels
from tests.data import hostile
from tests.data.pictures import problems_of, records_of, write_tar


@contextmanager
def at_most(megabytes: int) -> Iterator[None]:
    """Check that Python never holds more than this much memory within the block."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_records_add_up(tmp_path, text_encoder, count):
    generator = random.Random(0)
    shares = {"folder": 0.3, "tars/a.tar": 0.3, "zips/a.zip": 0.2, "jsonl": 0.08, "csv": 0.04, "tables/a.parquet": 0.08}
    counts = {name: round(share * count) for name, share in shares.items()}
    usable = {
        "folder": hostile.fill_folder(tmp_path / "folder", counts["folder"], generator),
        "tars/a.tar": hostile.fill_tar(tmp_path / "tars" / "a.tar", counts["tars/a.tar"], generator),
        "zips/a.zip": hostile.fill_zip(tmp_path / "zips" / "a.zip", counts["zips/a.zip"], generator),
        "jsonl": hostile.fill_list(tmp_path / "jsonl", counts["jsonl"], generator, "jsonl"),
        "csv": hostile.fill_list(tmp_path / "csv", counts["csv"], generator, "csv"),
        "tables/a.parquet": hostile.fill_table(tmp_path / "tables" / "a.parquet", counts["tables/a.parquet"], generator),
    }
    more = {"folder": 1, "jsonl": 2, "csv": 2}  # one that is huge, and a picture that no line names
    assert sum(counts.values()) == count
    assert all(usable.values())
    settings = EncodeSettings((8,), "fp16", "ids", min_side=8)
    with at_most(60 + count // 100):
        for name in counts:
            source = open_source(str(tmp_path / name.partition("/")[0]))
            out = tmp_path / "out" / name.partition("/")[0]
            card = encode_source(source, out, settings, Pixels(), text_encoder)
            seen = counts[name] + more.get(name, 0)
            assert (card["seen"], card["rows"], sum(card["rejected"].values())) == (seen, usable[name], seen - usable[name]), name
            assert all(len(reason) < 80 for reason in card["rejected"])
            assert set(EncodedDataset(out).column("captions")[0]) == {"words"}
            _, _, numbers = look(source, limit=10 * count)
            assert (numbers["records"], numbers["usable"], sum(numbers["problems"].values())) == (seen, usable[name], seen - usable[name])


@pytest.mark.parametrize("megabytes", [20, 3000])
@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_a_header_that_unpacks_to_more_than_headers_hold_is_not_unpacked(tmp_path, kind, megabytes):
    path = hostile.header_bomb(tmp_path / "a.tar.gz", kind, megabytes)
    with at_most(5):
        assert problems_of(records_of(open_source(str(path)))) == {"0": "", "a.tar.gz#end": "archive is damaged from here on"}


def test_chains_of_headers_do_not_end_in_a_recursion(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(
        hostile.extended({b"comment": b"x"}) * 500 + hostile.member("0.png", b"x") + hostile.member("0.txt", b"y") + bytes(512)
    )
    assert problems_of(records_of(open_source(str(path)))) == {"0": ""}


def test_a_zip_that_lies_about_a_size_takes_no_more_than_it_said(tmp_path):
    path = hostile.lying_zip(tmp_path / "a.zip", says=1000, holds=40_000_000)
    with at_most(5):
        assert problems_of(records_of(open_source(str(path)))) == {"0": "file cannot be read"}


def test_large_files_are_not_held_together(tmp_path, monkeypatch, text_encoder):
    """Twelve files of 190 MB in a zip archive, at a hundredth of the size with a hundredth of the limits."""
    monkeypatch.setattr("microdit.data.decode.MOST_BYTES", 2_560_000)
    files = [(f"{n:02}.{suffix}", content) for n in range(12) for suffix, content in (("png", bytes(1_900_000)), ("txt", b"words"))]
    path = write_tar(tmp_path / "a.tar", [*files, ("z.png", hostile.good_picture(0)), ("z.txt", b"words")])
    first = write_tar(tmp_path / "first.tar", [("z.png", hostile.good_picture(0)), ("z.txt", b"words")])
    encode_source(open_source(str(first)), tmp_path / "first", EncodeSettings((8,), "fp16", "ids"), Pixels(), text_encoder)  # imports all
    with at_most(11):
        card = encode_source(open_source(str(path)), tmp_path / "out", EncodeSettings((8,), "fp16", "ids"), Pixels(), text_encoder)
    assert (card["seen"], card["rows"]) == (13, 1)
