"""After an interrupted encoding and a change of the source, the same command gives what an encoding of the changed source gives."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microdit.data.dataset import EncodedDataset
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.sources.base import Part, Source
from microdit.data.sources.open import open_source
from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError
from tests.data.pictures import picture, write_file, write_json, write_tar

SETTINGS = EncodeSettings((8,), "fp16", "ids", batch_size=8)


def fill_folder(folder: Path) -> str:
    for n in range(6):
        write_file(folder / f"{n}.png", picture(n, "PNG"))
        write_file(folder / f"{n}.txt", f"caption {n}".encode())
    return str(folder)


def fill_list(folder: Path, kind: str) -> str:
    fill_folder(folder)
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"line {n}"}) if kind == "jsonl" else f"{n}.png,line {n}" for n in range(6)]
    (folder / f"metadata.{kind}").write_text("\n".join((["file_name,text"] if kind == "csv" else []) + lines) + "\n")
    return str(folder)


def fill_tars(folder: Path, suffix: str = "tar") -> str:
    for n in range(3):
        write_archive(folder / f"{n}.{suffix}", [(f"{i}.{end}", content) for i in (0, 1) for end, content in files_of(10 * n + i)])
    return str(folder)


def write_archive(path: Path, files: list[tuple[str, bytes]]) -> None:
    if path.suffix == ".tar":
        write_tar(path, files)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files:
            archive.writestr(name, content)


def files_of(number: int) -> list[tuple[str, bytes]]:
    return [("png", picture(number, "PNG")), ("txt", f"caption {number}".encode())]


def fill_tables(folder: Path) -> str:
    for n in range(3):
        write_table(folder / f"{n}.parquet", [f"row {n}"] * 2)
        write_file(folder / f"{n}-beside.png", picture(n + 100, "PNG"))
    return str(folder / "*.parquet")


def write_table(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": picture(n, "PNG"), "path": "x.png"} for n in range(len(texts))]
    cells.append({"bytes": None, "path": f"{path.stem}-beside.png"})
    pq.write_table(pa.table({"image": cells, "text": [*texts, "beside"]}), path)


def fill_sa1b(folder: Path) -> str:
    for n in range(3):
        write_tar(folder / f"sa_{n}.tar", [(f"sa_{n}.jpg", picture(n))])
        write_file(folder / "captions" / f"sa_{n}.txt", f"caption {n}".encode())
    return f"sa1b:{folder}"


def fill_diffusiondb(folder: Path) -> str:
    for n in (1, 2):
        place = folder / f"part-{n}"
        write_json(place / f"part-{n}.json", {"a.png": {"p": f"prompt {n}"}})
        write_file(place / "a.png", picture(n, "PNG"))
    return f"diffusiondb:{folder}"


def fill_textcaps(folder: Path) -> str:
    captions = [{"image_id": f"{n}", "caption_str": f"caption {n}"} for n in range(6)]
    write_json(folder / "TextCaps_0.1_train.json", {"data": captions})
    for n in range(6):
        write_file(folder / "train_images" / f"{n}.jpg", picture(n))
    return f"textcaps:{folder}"


FILLS = {
    "folder": fill_folder,
    "jsonl": lambda folder: fill_list(folder, "jsonl"),
    "csv": lambda folder: fill_list(folder, "csv"),
    "tars": fill_tars,
    "zips": lambda folder: fill_tars(folder, "zip"),
    "tables": fill_tables,
    "sa1b": fill_sa1b,
    "diffusiondb": fill_diffusiondb,
    "textcaps": fill_textcaps,
}


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


# What is done to the source, and the part that is named for it.
CHANGES = [
    ("folder", lambda folder: (folder / "0.png").unlink(), "000000000"),  # moves the border between the parts
    ("folder", lambda folder: (folder / "1.png").write_bytes(picture(9, "PNG", (20, 20))), "000000000"),
    ("folder", lambda folder: (folder / "1.txt").write_text("the right caption"), "000000000"),
    ("folder", lambda folder: (folder / "1.txt").unlink(), "000000000"),
    ("folder", lambda folder: write_file(folder / "00.png", picture(7)), "000000000"),
    (
        "folder",
        lambda folder: [next(folder.glob(f"{n}.*")).unlink() for n in (2, 2, 3, 3, 4, 4, 5, 5)],
        "000000002",
    ),  # no such part any more
    ("jsonl", lambda folder: edit(folder / "metadata.jsonl", "line 1", "another"), "000000000"),
    ("jsonl", lambda folder: (folder / "0.png").write_bytes(picture(9, "PNG", (20, 20))), "000000000"),
    ("csv", lambda folder: edit(folder / "metadata.csv", "0.png,line 0\n", ""), "000000000"),
    (
        "tars",
        lambda folder: write_tar(folder / "0.tar", [(f"{n}.{end}", content) for n in (5, 6, 7) for end, content in files_of(n)]),
        "0.tar",
    ),
    ("tars", lambda folder: shutil.move(folder / "0.tar", folder / "00.tar"), "0.tar"),
    ("tars", lambda folder: (folder / "0.tar").unlink(), "0.tar"),
    ("tars", lambda folder: (folder / "2.tar").unlink(), None),
    ("zips", lambda folder: write_archive(folder / "0.zip", [(f"5.{end}", content) for end, content in files_of(5)]), "0.zip"),
    ("tables", lambda folder: write_table(folder / "0.parquet", ["one", "two", "three"]), "0.parquet/0"),
    ("tables", lambda folder: (folder / "0-beside.png").write_bytes(picture(9, "PNG", (20, 20))), "0.parquet/0"),
    ("sa1b", lambda folder: (folder / "captions" / "sa_0.txt").write_text("the right caption"), "sa_0.tar"),
    ("diffusiondb", lambda folder: edit(folder / "part-1" / "part-1.json", "prompt 1", "the right prompt"), "part-1"),
    ("diffusiondb", lambda folder: write_file(folder / "part-1" / "b.png", picture(5)), "part-1"),
    ("textcaps", lambda folder: edit(folder / "TextCaps_0.1_train.json", "caption 0", "the right caption"), "000000000"),
]


def stop_before_the_last_part(source: Source, out: Path, text_encoder) -> None:
    def stopped():
        raise KeyboardInterrupt
        yield

    parts = [*source.parts[:-1], replace(source.parts[-1], records=stopped)]
    with pytest.raises(KeyboardInterrupt):
        encode_source(replace(source, parts=parts), out, SETTINGS, Pixels(), text_encoder)


def held(folder: Path) -> list[tuple[str, list[str]]]:
    data = EncodedDataset(folder)
    return list(zip(data.column("key"), data.column("captions"), strict=True))


@pytest.mark.parametrize(("kind", "change", "named"), CHANGES)
def test_a_changed_part_is_named_and_encoded_anew(tmp_path, text_encoder, monkeypatch, kind, change, named):
    monkeypatch.setattr("microdit.data.sources.folders.PART_SIZE", 2)
    folder, told = tmp_path / "set", []
    name = FILLS[kind](folder)
    stop_before_the_last_part(open_source(name), tmp_path / "out", text_encoder)
    change(folder)
    manifest = encode_source(open_source(name), tmp_path / "out", SETTINGS, Pixels(), text_encoder, warn=told.append)
    whole = encode_source(open_source(name), tmp_path / "whole", SETTINGS, Pixels(), text_encoder)
    assert held(tmp_path / "out") == held(tmp_path / "whole")
    assert [shard["sha256"] for shard in manifest["shards"]] == [shard["sha256"] for shard in whole["shards"]]
    assert manifest["seen"] == manifest["rows"] + sum(manifest["rejected"].values()) == whole["seen"]
    listed = sorted(path.name for path in (tmp_path / "out").glob("*"))
    assert listed == sorted(path.name for path in (tmp_path / "whole").glob("*"))
    assert told == [] if named is None else f"are encoded again: {named}" in told[0]


@pytest.mark.parametrize("kind", FILLS)
def test_what_has_not_changed_is_not_encoded_again(tmp_path, text_encoder, monkeypatch, kind):
    monkeypatch.setattr("microdit.data.sources.folders.PART_SIZE", 2)
    name, told = FILLS[kind](tmp_path / "set"), []
    stop_before_the_last_part(open_source(name), tmp_path / "out", text_encoder)
    shards = sorted((tmp_path / ".out.part").glob("*.arrow"))
    before = {path.name: path.stat().st_ino for path in shards}
    assert before
    encode_source(open_source(name), tmp_path / "out", SETTINGS, Pixels(), text_encoder, warn=told.append)
    assert told == []
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in before} == before


def test_a_part_that_changes_during_encoding_is_named_and_mended(tmp_path, text_encoder):
    name = fill_tars(tmp_path / "set")
    source = open_source(name)

    def late():
        write_tar(tmp_path / "set" / "0.tar", [(f"late.{end}", content) for end, content in files_of(5)])
        yield from source.parts[2].records()

    parts = [*source.parts[:2], replace(source.parts[2], records=late)]
    with pytest.raises(UserError, match=r"These parts changed while they were encoded: 0\.tar\. Run the same command"):
        encode_source(replace(source, parts=parts), tmp_path / "out", SETTINGS, Pixels(), text_encoder)
    encode_source(open_source(name), tmp_path / "out", SETTINGS, Pixels(), text_encoder)
    assert [key for key, _ in held(tmp_path / "out")] == ["late", "0", "1", "0", "1"]


def test_a_part_that_changes_while_it_is_read_is_named(tmp_path, text_encoder):
    name = fill_tars(tmp_path / "set")
    source = open_source(name)

    def read_and_changed():
        yield from source.parts[0].records()
        write_tar(tmp_path / "set" / "0.tar", [(f"late.{end}", content) for end, content in files_of(5)])

    parts = [replace(source.parts[0], records=read_and_changed), *source.parts[1:]]
    with pytest.raises(UserError, match=r"These parts changed while they were encoded: 0\.tar\."):
        encode_source(replace(source, parts=parts), tmp_path / "out", SETTINGS, Pixels(), text_encoder)


def test_another_choice_of_records_is_a_change(tmp_path, text_encoder):
    name, told = fill_tars(tmp_path / "set"), []
    stop_before_the_last_part(open_source(name), tmp_path / "out", text_encoder)
    manifest = encode_source(open_source(name, None, 0.4), tmp_path / "out", SETTINGS, Pixels(), text_encoder, warn=told.append)
    assert "0.tar, 1.tar" in told[0]
    assert manifest["seen"] == sum(1 for part in open_source(name, None, 0.4).parts for _ in part.records()) < 6


def test_another_source_of_the_same_name_is_a_change(tmp_path, text_encoder):
    first, second = fill_tars(tmp_path / "a" / "set"), fill_tars(tmp_path / "b" / "set")
    write_tar(tmp_path / "b" / "set" / "0.tar", [(f"other.{end}", content) for end, content in files_of(5)])
    stop_before_the_last_part(open_source(first), tmp_path / "out", text_encoder)
    encode_source(open_source(second), tmp_path / "out", SETTINGS, Pixels(), text_encoder)
    assert [key for key, _ in held(tmp_path / "out")] == ["other", "0", "1", "0", "1"]


def test_a_shard_that_does_not_say_what_it_was_made_of_is_made_anew(tmp_path, text_encoder):
    name, told = fill_tars(tmp_path / "set"), []
    for damage in (b"{", b"[]", b'{"part": "0.tar"}'):
        stop_before_the_last_part(open_source(name), tmp_path / "out", text_encoder)
        (tmp_path / ".out.part" / "shard-00000.json").write_bytes(damage)
    encode_source(open_source(name), tmp_path / "out", SETTINGS, Pixels(), text_encoder, warn=told.append)
    assert "shard-00000.json" in told[0]
    assert len(held(tmp_path / "out")) == 6


def test_parts_that_are_made_and_not_read_never_change():
    assert Part("a", lambda: iter(())).fingerprint() == Part("b", lambda: iter(())).fingerprint()
