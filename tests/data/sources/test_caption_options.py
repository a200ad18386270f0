"""Captions from names, and what is kept of them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microdit.data.sources.caption_options import CaptionOptions
from microdit.data.sources.open import open_source
from microdit.errors import UserError
from tests.data.pictures import picture, problems_of, records_of, write_file, write_tar


def read(source, captions=None, **options):
    return records_of(open_source(str(source), captions, options=CaptionOptions(**options)))


def texts(records):
    return {record.key: next(iter(record.captions.values()), record.problem) for record in records}


def fill(folder, **captions):
    for name, text in captions.items():
        write_file(folder / f"{name}.png", picture())
        write_file(folder / f"{name}.txt", text.encode())
    return folder


def test_names_of_files_and_folders_are_captions(tmp_path):
    for name in ("a_red-heart.JPG", "dogs/big_dogs/1.png", "dogs/2.png"):
        write_file(tmp_path / name, picture())
    assert texts(read(tmp_path, captions_from="file")) == {
        "a_red-heart.JPG": "a red heart",
        "dogs/2.png": "2",
        "dogs/big_dogs/1.png": "1",
    }
    none = "picture lies in no folder whose name could be its caption"
    records = read(tmp_path, captions_from="folder")
    assert texts(records) == {"a_red-heart.JPG": none, "dogs/2.png": "dogs", "dogs/big_dogs/1.png": "big dogs"}
    assert records[1].image == picture()
    tar = write_tar(tmp_path / "set" / "a.tar", [("cats/1.jpg", picture()), ("cats/2.jpg", picture())])
    assert texts(read(tar, captions_from="folder")) == {"cats/1": "cats", "cats/2": "cats"}
    with pytest.raises(UserError, match="--captions-from file replaces all captions"):
        read(tmp_path, {"caption": 1.0}, captions_from="file")


def test_pictures_that_a_list_does_not_name_are_named_by_their_folder(tmp_path):
    write_file(tmp_path / "cats" / "1.png", picture())
    write_file(tmp_path / "metadata.jsonl", json.dumps({"file_name": "gone.png", "text": "x"}).encode())
    records = read(tmp_path, captions_from="folder")
    assert problems_of(records) == {"gone.png": "no such file", "cats/1.png": ""}
    assert {record.key: record.image for record in records}["cats/1.png"] == picture()


def test_the_first_line_alone_may_be_the_caption(tmp_path):
    fill(tmp_path, a="\n first line \nsecond line\n")
    assert texts(read(tmp_path)) == {"a.png": "first line \nsecond line"}
    assert texts(read(tmp_path, lines="first")) == {"a.png": "first line"}


def test_a_pattern_keeps_its_group_and_rejects_what_does_not_match(tmp_path):
    fill(tmp_path, a="prompt: a red heart | seed 5", b="a blue heart", c="PROMPT: owl")
    no_match = "caption does not match --caption-regex"
    assert texts(read(tmp_path, regex=r"prompt: ([^|]*)")) == {"a.png": "a red heart", "b.png": no_match, "c.png": "owl"}
    assert texts(read(tmp_path, regex=r"\w+ heart")) == {"a.png": "red heart", "b.png": "blue heart", "c.png": no_match}
    with pytest.raises(UserError, match=r"The pattern \( is no regular expression"):
        CaptionOptions(regex="(")


def test_boilerplate_is_dropped(tmp_path):
    fill(tmp_path, a="The image shows a red heart. Stock photo", b="This picture depicts an owl", c="stock photo")
    options = {"drop": (r"^(the|this) \w+ (shows|depicts) ", r"\W*stock photo$")}
    assert texts(read(tmp_path, **options)) == {
        "a.png": "a red heart",
        "b.png": "an owl",
        "c.png": "--caption-drop leaves nothing of the caption",
    }


def test_each_of_several_captions_is_edited(tmp_path):
    fields = {"alt": "stock photo", "long": "stock photo of an owl"}
    write_file(tmp_path / "a.png", picture())
    write_file(tmp_path / "a.json", json.dumps(fields).encode())
    (record,) = read(tmp_path, {"alt": 0.5, "long": 0.5}, drop=(r"stock photo( of )?",))
    assert (record.captions, record.problem) == ({"long": "an owl"}, "")


def test_other_options_are_other_records(tmp_path):
    """An encoding that is continued with other options must encode anew."""
    fill(tmp_path, a="words")
    made = [CaptionOptions(), CaptionOptions(lines="first"), CaptionOptions(regex="w"), CaptionOptions(drop=("w",))]
    prints = [open_source(str(tmp_path), options=options).parts[0].fingerprint() for options in made]
    assert len(set(prints)) == len(made)
    assert prints[0] == open_source(str(tmp_path)).parts[0].fingerprint()


def test_sources_without_captions_need_none_where_they_come_from_elsewhere(tmp_path):
    write_file(tmp_path / "set" / "red_hearts" / "1.png", picture(1))
    write_file(tmp_path / "set" / "list.csv", b"file_name,width\nred_hearts/1.png,8\n")
    pq.write_table(pa.table({"image": [picture()], "width": [8]}), tmp_path / "t.parquet")
    write_file(tmp_path / "new.jsonl", b'{"key": "t.parquet/0", "text": "joined"}\n{"key": "1", "text": "by name"}\n')
    options = {"joined": str(tmp_path / "new.jsonl"), "index_folder": tmp_path / "index"}
    assert texts(read(tmp_path / "set" / "list.csv", captions_from="folder")) == {"red_hearts/1.png": "red hearts"}
    assert texts(read(tmp_path / "set" / "list.csv", **options)) == {"red_hearts/1.png": "by name"}
    assert texts(read(tmp_path / "t.parquet", **options)) == {"t.parquet/0": "joined"}
    assert texts(read(tmp_path / "t.parquet", {"text": 1.0}, **options)) == {"t.parquet/0": "joined"}
    assert set(texts(read("scenes:3", captions_from="file"))) == {record.key for record in read("scenes:3")}
    with pytest.raises(UserError, match="has no caption, text, prompt"):
        read(tmp_path / "set" / "list.csv")
