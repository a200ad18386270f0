import json
import os

import pytest

from microdit.data.sources.folders import folder_source
from microdit.data.sources.open import open_source
from microdit.errors import UserError
from tests.data.pictures import keys_of, picture, problems_of, records_of, write_file


def test_images_are_found_at_any_depth_in_the_order_of_their_paths(tmp_path):
    names = ["b.JPG", "a/z.png", "a/b/c.Jpeg", "a.webp", "ümlaut ü.tif"]
    for number, name in enumerate(names):
        file = write_file(tmp_path / name, picture(number, "PNG"))
        file.with_suffix(".txt").write_text(f"caption {number}\n", encoding="utf-8-sig")
    write_file(tmp_path / "notes.md", b"not a picture")
    records = records_of(folder_source(tmp_path))
    assert [record.key for record in records] == sorted(names)
    assert {record.key: record.captions["caption"] for record in records} == {name: f"caption {n}" for n, name in enumerate(names)}
    assert all(record.image == picture(names.index(record.key), "PNG") and not record.problem for record in records)


def test_what_is_wrong_with_a_text_file_is_said_and_the_picture_counted(tmp_path):
    for name in ("good", "missing", "empty", "latin", "gone"):
        write_file(tmp_path / f"{name}.png", picture())
        write_file(tmp_path / f"{name}.txt", b"words")
    (tmp_path / "missing.txt").unlink()
    write_file(tmp_path / "empty.txt", b" \n")
    write_file(tmp_path / "latin.txt", "für".encode("latin-1"))
    source = folder_source(tmp_path)
    (tmp_path / "gone.png").unlink()
    (tmp_path / "good.png").unlink()
    (tmp_path / "good.png").mkdir()
    assert problems_of(records_of(source)) == {
        "empty.png": "no caption",
        "gone.png": "no such file",
        "good.png": "file cannot be read",
        "latin.png": "caption is not UTF-8",
        "missing.png": "no caption",
    }


def test_fields_of_a_json_file_beside_the_picture_can_be_captions(tmp_path):
    write_file(tmp_path / "a.png", picture())
    write_file(tmp_path / "a.txt", b"short")
    write_file(tmp_path / "a.json", b'{"alt": "long", "width": 3}')
    [record] = records_of(folder_source(tmp_path, {"alt": 0.7, "caption": 0.3}))
    assert record.captions == {"alt": "long", "caption": "short"}
    [record] = records_of(folder_source(tmp_path, {"width": 1.0}))
    assert (record.captions, record.problem) == ({}, "caption is not text")
    write_file(tmp_path / "a.json", b"{")
    assert problems_of(records_of(folder_source(tmp_path, {"alt": 1.0}))) == {"a.png": "sidecar is not JSON"}


def test_every_line_of_a_list_and_every_picture_counts_once(tmp_path):
    for name in ("a.png", "b.png", "in/c.png", "unlisted.png", "strange.png", "uncaptioned.png", "list.png"):
        write_file(tmp_path / name, picture())
    write_file(tmp_path.parent / "outside.png", picture())
    lines = [
        json.dumps({"file_name": "b.png", "text": "b"}).encode(),
        json.dumps({"file_name": "./in/c.png", "text": "c"}).encode(),
        json.dumps({"file_name": "a.png", "text": "a"}).encode(),
        json.dumps({"file_name": "in/../a.png", "text": "a again"}).encode(),
        json.dumps({"file_name": "gone.png", "text": "gone"}).encode(),
        json.dumps({"file_name": "../outside.png", "text": "out"}).encode(),
        json.dumps({"file_name": str(tmp_path.parent / "outside.png"), "text": "out"}).encode(),
        b"",
        b'{"file_name": "a.png", ',
        b"[1]",
        json.dumps({"text": "of what?"}).encode(),
        b'{"file_name": "strange.png", "text": "f\xfcr"}',
        b'{"file_name": "uncaptioned.png", "text": null}',
        b'{"file_name": "list.png", "text": ["first", "second"]}',
    ]
    write_file(tmp_path / "metadata.jsonl", b"\n".join(lines) + b"\n")
    source = folder_source(tmp_path)
    records = records_of(source)
    assert source.caption_weights == {"text": 1.0}
    assert problems_of(records) == {
        "b.png": "",
        "in/c.png": "",
        "a.png": "",
        "metadata.jsonl#4": "listed twice",
        "gone.png": "no such file",
        "metadata.jsonl#6": "file lies outside the folder",
        "metadata.jsonl#7": "file lies outside the folder",
        "metadata.jsonl#9": "metadata line is not JSON",
        "metadata.jsonl#10": "metadata line is not JSON",
        "metadata.jsonl#11": "metadata line names no file",
        "strange.png": "caption is not UTF-8",
        "uncaptioned.png": "no caption",
        "list.png": "",
        "unlisted.png": "no caption",
    }
    assert len(records) == len([line for line in lines if line]) + 1  # the picture that no line names
    assert [record.captions["text"] for record in records if not record.problem] == ["b", "c", "a", "first"]
    assert all(record.image == b"" for record in records if "outside" in record.problem)


def test_a_csv_list_may_hold_several_captions(tmp_path):
    for name in ("a.png", "b.png"):
        write_file(tmp_path / name, picture())
    write_file(tmp_path / "metadata.csv", 'file_name,alt,text\na.png,"one, and\nmore",two\nb.png,only\n'.encode("utf-8-sig"))
    records = records_of(folder_source(tmp_path, {"text": 0.7, "alt": 0.3}))
    assert [record.captions for record in records] == [{"text": "two", "alt": "one, and\nmore"}, {"alt": "only"}]
    assert problems_of(records_of(folder_source(tmp_path))) == {"a.png": "", "b.png": "no caption"}


def test_parts_hold_a_thousand_pictures(tmp_path):
    for number in range(1003):
        write_file(tmp_path / f"{number:04}.png", b"")
    source = folder_source(tmp_path)
    assert [len(keys_of(part)) for part in source.parts] == [1000, 3]
    assert keys_of(source.parts[1]) == ["1000.png", "1001.png", "1002.png"]


def test_folders_that_cannot_be_read_are_refused_with_the_fix(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        folder_source(tmp_path)
    write_file(tmp_path / "a.png", picture())
    write_file(tmp_path / "metadata.jsonl", b'{"file_name": "a.png", "alt": "x"}')
    with pytest.raises(UserError, match=r"metadata.jsonl has no caption, text, prompt\. Its columns are alt, file_name\. Say which"):
        folder_source(tmp_path)
    write_file(tmp_path / "metadata.csv", b"file_name,text\n")
    with pytest.raises(UserError, match=r"both metadata.jsonl and metadata.csv"):
        folder_source(tmp_path)


def test_what_lies_outside_is_counted_and_not_read(tmp_path):
    folder, other = tmp_path / "set", tmp_path / "other"
    for place in (folder / "in", other):
        write_file(place / "a.png", picture())
        write_file(place / "a.txt", b"words")
    (folder / "again").symlink_to(folder)  # its pictures are met at their own place
    (folder / "linked").symlink_to(other)
    for name, to in (("b", other / "a"), ("c", folder / "in" / "a")):
        for suffix in (".png", ".txt"):
            (folder / f"{name}{suffix}").symlink_to(to.with_suffix(suffix))
    write_file(folder / "d.png", picture())
    (folder / "d.txt").symlink_to(other / "a.txt")
    write_file(folder / "e.png", picture())
    os.mkfifo(folder / "e.txt")
    outside = "link leads out of the source"
    assert problems_of(records_of(folder_source(folder))) == {
        "b.png": outside,
        "c.png": "",
        "d.png": outside,
        "e.png": "not a regular file",
        "in/a.png": "",
        "linked": outside,
    }


def test_a_list_that_lies_outside_is_refused(tmp_path):
    write_file(tmp_path / "set" / "a.png", picture())
    write_file(tmp_path / "metadata.csv", b"file_name,text\na.png,words\n")
    (tmp_path / "set" / "metadata.csv").symlink_to(tmp_path / "metadata.csv")
    with pytest.raises(UserError, match=r"metadata.csv cannot be used: link leads out of the source"):
        folder_source(tmp_path / "set")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_line_that_is_too_long_costs_itself(tmp_path, kind):
    for name in ("a.png", "b.png", "c.png"):
        write_file(tmp_path / name, picture())
    texts = {"a.png": "words", "b.png": "w" * 10_000_000, "c.png": "more words", "no.png": "x" * 150_000}
    lines = [json.dumps({"file_name": name, "text": text}) if kind == "jsonl" else f"{name},{text}" for name, text in texts.items()]
    write_file(tmp_path / f"metadata.{kind}", "\n".join([*(["file_name,text"] if kind == "csv" else []), *lines]).encode())
    first = 2 if kind == "csv" else 1
    assert problems_of(records_of(folder_source(tmp_path))) == {
        "a.png": "",
        f"metadata.{kind}#{first + 1}": "metadata line is too long",
        "c.png": "",
        "no.png" if kind == "jsonl" else "metadata.csv#5": "caption is too long" if kind == "jsonl" else "metadata line is too long",
        "b.png": "no caption",  # no line names it
    }


def test_a_circular_link_is_a_rejected_record_or_an_error(tmp_path):
    for name in ("pictures/a.png", "tars/a.tar", "tables/a.parquet"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(tmp_path / name)
    write_file(tmp_path / "pictures" / "b.png", picture())
    write_file(tmp_path / "pictures" / "b.txt", b"words")
    found = problems_of(records_of(open_source(str(tmp_path / "pictures"))))
    assert (list(found), bool(found["a.png"]), found["b.png"]) == (["a.png", "b.png"], True, "")
    (problem,) = problems_of(records_of(open_source(str(tmp_path / "tars")))).values()
    assert problem
    with pytest.raises(UserError, match=r"a\.parquet"):
        open_source(str(tmp_path / "tables"))


def test_fingerprints_are_those_of_data_sets_that_were_encoded_earlier(tmp_path):
    for number in range(2):
        write_file(tmp_path / f"{number}.png", b"x" * (number + 1))
        os.utime(tmp_path / f"{number}.png", ns=(10**9 * number, 10**9 * number))
    write_file(tmp_path / "metadata.jsonl", b'{"file_name": "1.png", "text": "a cat"}\n{"text": "none"}\n')
    (part,) = open_source(str(tmp_path)).parts
    assert part.known() == "25d6b590c76bc958e75124ee8a4f5e190164f3b1c1516d042b3b3334c7919694"
    assert part.fingerprint() == "d04a38e556090cb5e03c2747c7ec3a5da119edd2745f9ac44b7c3727d5fb3de3"
