"""Compressed archives that expand to far more than any honest one, with the allowance of every file at a hundredth."""

import bz2
import gzip
import random
import zipfile

import pyarrow as pa
import pytest

from microdit.data.sources import compressed
from microdit.data.sources.compressed import EXPANDS
from microdit.data.sources.open import open_source
from tests.data import hostile
from tests.data.mds_files import write_mds
from tests.data.pictures import picture, problems_of, records_of

ZEROS = 60_000_000  # bytes
PACK = {"gz": gzip.compress, "bz2": bz2.compress, "zst": lambda content: pa.compress(content, codec="zstd", asbytes=True)}


def pair(name: str, image: bytes = b"") -> bytes:
    return hostile.member(f"{name}.png", image or picture()) + hostile.member(f"{name}.txt", b"words")


@pytest.fixture(autouse=True)
def small_allowance(monkeypatch):
    monkeypatch.setattr(compressed, "FREE_EXPANSION", 20_000_000)


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["film.mp4", "film.png"])
def test_a_member_of_nothing_but_zeros_ends_the_archive(tmp_path, suffix, name):
    path = tmp_path / f"a.tar.{suffix}"
    content = pair("a") + hostile.member(name, bytes(ZEROS)) + pair("b") + bytes(1024)
    path.write_bytes(PACK[suffix](content))
    assert problems_of(records_of(open_source(str(path)))) == {"a": "", f"a.tar.{suffix}#end": EXPANDS}
    (tmp_path / "a.tar").write_bytes(content)  # unpacked, it is read
    assert [problem for problem in problems_of(records_of(open_source(str(tmp_path / "a.tar")))).values() if not problem] == ["", ""]


@pytest.mark.parametrize("suffix", PACK)
def test_what_expands_no_more_than_drawings_do_is_read_to_its_end(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(compressed, "FREE_EXPANSION", 100_000)
    path = tmp_path / f"a.tar.{suffix}"
    film = random.Random(0).randbytes(100_000) + bytes(5_000_000)  # expands to 50 times its size
    path.write_bytes(PACK[suffix](hostile.member("film.mp4", film) + pair("b") + bytes(1024)))
    assert problems_of(records_of(open_source(str(path)))) == {"b": ""}


def test_pictures_in_a_zip_expand_no_more_together_than_in_a_tar(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        for number in range(5):
            archive.writestr(f"{number}.png", bytes(8_000_000))
            archive.writestr(f"{number}.txt", b"words")
    assert problems_of(records_of(open_source(str(path)))) == {"0": "", "1": "", "a.zip#end": EXPANDS}


@pytest.mark.parametrize("suffix", PACK)
def test_a_shard_of_zeros_ends_where_it_expands(tmp_path, suffix):
    columns = {"image": ("jpeg", None), "caption": ("str", None)}
    write_mds(tmp_path, columns, [[(image, b"words") for image in (picture(), bytes(ZEROS), picture())]])
    shard, index = tmp_path / "shard.00000.mds", tmp_path / "index.json"
    packed = f"{shard.name}.{'zstd' if suffix == 'zst' else suffix}"
    (tmp_path / packed).write_bytes(PACK[suffix](shard.read_bytes()))
    shard.unlink()
    index.write_text(index.read_text().replace('"zip_data": null', f'"zip_data": {{"basename": "{packed}"}}'))
    assert list(problems_of(records_of(open_source(str(tmp_path)))).values()) == ["", EXPANDS]
