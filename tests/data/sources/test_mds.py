"""Folders that mosaicml-streaming 0.13 wrote (tests/fixtures/mds), read without it."""

import gzip
import io
import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from microdit.data.decode import decode
from microdit.data.sources.base import Record
from microdit.data.sources.mds import MdsShard, mds_source, read_shards, records_of_shard, values_of
from microdit.data.sources.open import open_source
from microdit.data.sources.untrusted_files import find_files
from microdit.errors import UserError
from tests.data.mds_files import write_mds
from tests.data.pictures import problems_of, records_of, write_file

FIXTURES = Path(__file__).parents[2] / "fixtures" / "mds"


@pytest.fixture(params=["plain", "zstd", "gz", "bytes"])
def folder(request):
    return FIXTURES / request.param


@pytest.fixture
def plain(tmp_path):
    return Path(shutil.copytree(FIXTURES / "plain", tmp_path / "plain"))


def test_pictures_and_captions_are_those_that_were_written(folder):
    source = open_source(str(folder))
    records = records_of(source)
    assert len(records) == 5
    for number, record in enumerate(records):
        expected = Image.new("RGB", (12, 8), (number * 37 % 256, number * 91 % 256, number))
        found = decode(record.image)
        assert found.size == (12, 8)
        assert max(abs(a - b) for a, b in zip(found.getpixel((5, 5)), expected.getpixel((5, 5)), strict=True)) <= 3
        if record.problem:
            assert (number, record.problem) == (2, "no caption")
        else:
            assert next(iter(record.captions.values())).startswith(f"{next(iter(source.caption_weights))} {number}")
    assert source.passed_over == {}


def test_each_shard_is_a_part_and_fields_inside_can_be_captions(plain):
    write_file(plain / "notes.md", b"")
    source = open_source(str(plain), {"caption": 0.5, "more.alt": 0.5})
    assert [part.name for part in source.parts] == [f"shard.0000{number}.mds" for number in range(3)]
    assert records_of(source)[3].captions == {"caption": "caption 3 \u00fc", "more.alt": "alt 3"}
    assert source.passed_over == {".md": 1}
    before = source.parts[1].fingerprint()
    write_file(plain / "shard.00001.mds", b"")
    assert source.parts[1].fingerprint() != before


def test_a_shard_that_is_missing_or_cut_is_named(plain):
    (plain / "shard.00000.mds").unlink()
    content = (plain / "shard.00001.mds").read_bytes()
    write_file(plain / "shard.00001.mds", content[:-300])
    assert problems_of(records_of(open_source(str(plain)))) == {
        "shard.00000.mds/0#end": "no such file",
        "shard.00001.mds/0": "no caption",
        "shard.00001.mds/1#end": "shard is damaged from here on",
        "shard.00002.mds/0": "",
    }


def test_damage_anywhere_gives_records_or_a_named_end(plain):
    generator = random.Random(0)
    path = plain / "shard.00000.mds"
    whole = path.read_bytes()
    outcomes = set()
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            content[generator.randrange(60 if generator.random() < 0.7 else len(content))] = generator.randrange(256)
        path.write_bytes(content)
        records = list(open_source(str(plain)).parts[0].records())
        outcomes.add(records[-1].problem)
        assert len(records) <= 3
    assert "shard is damaged from here on" in outcomes


def test_files_outside_are_not_read(plain):
    write_file(plain.parent / "secret.mds", (plain / "shard.00000.mds").read_bytes())
    index = (plain / "index.json").read_text()
    write_file(plain / "index.json", index.replace("shard.00000.mds", "../secret.mds").encode())
    assert "link leads out of the source" in problems_of(records_of(open_source(str(plain)))).values()


@pytest.mark.parametrize("suffix", ["gz", "zstd", "br"])
def test_compressed_shards_are_streams(plain, suffix):
    index = json.loads((plain / "index.json").read_text())
    for shard in index["shards"]:
        name = shard["raw_data"]["basename"]
        shard["zip_data"] = {"basename": f"{name}.{suffix}", "bytes": 1, "hashes": {}}
        content = (plain / name).read_bytes()
        packed = gzip.compress(content) if suffix == "gz" else pa.compress(content, codec="zstd", asbytes=True)
        write_file(plain / f"{name}.{suffix}", packed)
        (plain / name).unlink()
    write_file(plain / "index.json", json.dumps(index).encode())
    problems = list(problems_of(records_of(open_source(str(plain)))).values())
    assert problems == (["shard is compressed as .br, which is not read"] * 3 if suffix == "br" else ["", "", "no caption", "", ""])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"column_encodings": ["str", "bytes", "jpeg", "int32"]}, r"several columns of pictures: caption \(str\)"),
        (
            {"column_encodings": ["str", "ndarray:float16", "json", "int32"]},
            "no column of pictures: .* Use a folder with the pictures",
        ),
        ({"column_encodings": ["int", "jpeg", "int", "int32"]}, "has no caption, text, prompt"),
        ({"samples": -1}, "is damaged, or of another format than MDS"),
        ({"column_sizes": [None]}, "is damaged, or of another format than MDS"),
        ({"raw_data": None}, "is damaged, or of another format than MDS"),
    ],
)
def test_folders_without_pictures_or_captions_are_refused(plain, change, sentence):
    index = json.loads((plain / "index.json").read_text())
    names = ["caption", "other", "more", "width"]
    index["shards"] = [
        {**shard, "column_names": names if "several" in sentence else shard["column_names"], **change} for shard in index["shards"]
    ]
    write_file(plain / "index.json", json.dumps(index).encode())
    with pytest.raises(UserError, match=sentence):
        mds_source(plain, find_files(plain))


def test_pixels_that_make_no_sense_are_no_picture(tmp_path):
    folder = Path(shutil.copytree(FIXTURES / "gz", tmp_path / "gz"))
    path = folder / "shard.00000.mds.gz"
    content = gzip.decompress(path.read_bytes())
    write_file(path, gzip.compress(content.replace(b"RGB", b"CMY")))
    assert set(problems_of(records_of(open_source(str(folder)))).values()) == {"no image"}
    assert Image.open(io.BytesIO(records_of(open_source(str(FIXTURES / "gz")))[0].image), formats=["PNG"]).size == (12, 8)


def test_the_tests_own_writer_writes_what_the_library_wrote(tmp_path):
    """So that folders of other columns, written by it, are like the library's."""
    shards = read_shards(FIXTURES / "plain")
    samples = [[[value for *_, value in values_of(sample, shard)] for sample in raw_samples(FIXTURES / "plain", shard)] for shard in shards]
    columns = dict(zip(shards[0].columns, zip(shards[0].encodings, shards[0].sizes, strict=True), strict=True))
    write_mds(tmp_path / "again", columns, samples, size_limit=2000)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == {
        path.name: path.read_bytes() for path in (FIXTURES / "plain").iterdir()
    }


def raw_samples(folder: Path, shard: MdsShard) -> list[bytes]:
    found: list[bytes] = []
    list(records_of_shard(folder, shard, lambda key, sample: found.append(sample) or Record(key, {}, b"")))
    return found
