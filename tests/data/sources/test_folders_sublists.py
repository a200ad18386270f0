"""Caption lists in subfolders are read for the images of their folder, or named where they are not."""

import json
from contextlib import ExitStack

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.data.look import look
from microdit.data.sources.folders import folder_source, listed_once
from microdit.data.sources.open import open_source
from microdit.errors import UserError
from tests.data.pictures import picture, problems_of, records_of, write_file


def lines_of(*lines):
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def fill(folder):
    """Write two subfolders with lists that name their captions differently, and images with captions beside them."""
    for number, name in enumerate(("a.png", "birds/a.png", "birds/b.png", "birds/in/c.png", "cats/a.png", "dogs/a.png")):
        write_file(folder / name, picture(number, "PNG"))
    for name in ("a.txt", "birds/a.txt", "birds/b.txt", "dogs/a.txt"):
        write_file(folder / name, f"beside {name}".encode())
    lines = [{"file_name": name, "text": f"list of birds: {name}"} for name in ("a.png", "in/c.png", "gone.png", "a.png")]
    lines += [{"file_name": "../dogs/a.png", "text": "outside"}]
    write_file(folder / "birds" / "metadata.jsonl", lines_of(*lines) + b"{\n")
    write_file(folder / "cats" / "metadata.csv", b"file_name,title\na.png,list of cats\n")
    return folder


def test_lists_caption_the_images_of_their_subfolders(tmp_path):
    source = open_source(str(fill(tmp_path / "set")))
    records = records_of(source)
    assert {record.key: record.captions["caption"] for record in records if not record.problem} == {
        "birds/a.png": "list of birds: a.png",
        "birds/in/c.png": "list of birds: in/c.png",
        "cats/a.png": "list of cats",
        "a.png": "beside a.txt",
        "birds/b.png": "beside birds/b.txt",
        "dogs/a.png": "beside dogs/a.txt",
    }
    assert {key: problem for key, problem in problems_of(records).items() if problem} == {
        "birds/gone.png": "no such file",
        "birds/metadata.jsonl#4": "listed twice",
        "birds/metadata.jsonl#5": "file lies outside the folder",
        "birds/metadata.jsonl#6": "metadata line is not JSON",
    }
    assert all(record.image == (tmp_path / "set" / record.key).read_bytes() for record in records if not record.problem)
    assert source.passed_over == {".txt": 1}  # beside an image that a list names


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_parts_of_any_size_and_other_processes_hold_the_same_records(tmp_path, monkeypatch, size):
    folder = fill(tmp_path / "set")
    expected = records_of(folder_source(folder))
    monkeypatch.setattr("microdit.data.sources.folders.PART_SIZE", size)
    with ExitStack() as stack:
        ranks = [stack.enter_context(listed_once(tmp_path / "out", tmp_path / ".part", 2)) for _ in range(2)]
        sources = [folder_source(folder), *(folder_source(folder, None, rank) for rank in ranks)]
        assert [records_of(source) for source in sources] == [expected] * 3
        assert len({tuple(part.fingerprint() for part in source.parts) for source in sources}) == 1


def test_captions_are_chosen_by_name_in_all_lists(tmp_path):
    write_file(tmp_path / "set" / "x" / "a.png", picture(1, "PNG"))
    write_file(tmp_path / "set" / "x" / "metadata.jsonl", lines_of({"file_name": "a.png", "text": "long", "alt": "short"}))
    (record,) = records_of(open_source(str(tmp_path / "set"), {"text": 0.5, "alt": 0.5}))
    assert record.captions == {"text": "long", "alt": "short"}
    with pytest.raises(UserError, match=r"x/metadata.jsonl has no column title"):
        open_source(str(tmp_path / "set"), {"title": 1.0})
    write_file(tmp_path / "set" / "x" / "metadata.csv", b"file_name,text\n")
    with pytest.raises(UserError, match=r"set/x holds both metadata.csv and metadata.jsonl"):
        open_source(str(tmp_path / "set"))


def test_lists_that_are_not_read_are_named(tmp_path):
    folder = fill(tmp_path / "set")
    pq.write_table(pa.table({"file_name": ["a.png"], "text": ["words"]}), folder / "dogs" / "metadata.parquet")
    source = open_source(str(folder))
    assert source.note.startswith("These caption lists are not read: dogs/metadata.parquet. In subfolders, ")
    assert source.passed_over == {".parquet": 1, ".txt": 1}
    write_file(folder / "metadata.jsonl", lines_of({"file_name": "a.png", "text": "at the top"}))
    source = open_source(str(folder))
    assert source.note.startswith("These caption lists are not read: birds/metadata.jsonl, cats/metadata.csv, dogs/metadata.parquet.")
    assert source.passed_over == {".txt": 4, ".csv": 1, ".jsonl": 1, ".parquet": 1}
    assert problems_of(records_of(source)) == {"a.png": ""} | dict.fromkeys(
        ("birds/a.png", "birds/b.png", "birds/in/c.png", "cats/a.png", "dogs/a.png"), "no caption"
    )
    assert source.note in look(source)[2]["warnings"]
    (folder / "metadata.jsonl").unlink()
    pq.write_table(pa.table({"file_name": ["a.png"], "text": ["words"]}), folder / "metadata.parquet")
    assert open_source(str(folder)).note == source.note


IMAGES = ["a.png", "in/a.png", "in/b.png", "in/deep/c.png", "other/a.png"]
NAMED = st.lists(st.sampled_from(["a.png", "b.png", "deep/c.png", "c.png", "gone.png", "../a.png"]), min_size=1, max_size=5)


@given(lists=st.dictionaries(st.sampled_from(["in", "in/deep", "other"]), NAMED), texts=st.sets(st.sampled_from(IMAGES)))
def test_every_image_line_and_file_counts_once(tmp_path_factory, lists, texts):
    """Each image is one record, each other line is one too, and each text is read beside an image that no line names, or passed over."""
    folder = tmp_path_factory.mktemp("set")
    for name in IMAGES:
        write_file(folder / name, b"")
    for name in texts:
        write_file((folder / name).with_suffix(".txt"), b"words")
    for place, names in lists.items():
        write_file(folder / place / "metadata.jsonl", lines_of(*({"file_name": name, "text": "words"} for name in names)))
    source = folder_source(folder)
    named = [f"{place}/{name}" for place, names in lists.items() for name in names]
    listed = {name for name in named if name in IMAGES}
    records = records_of(source)
    keys = [record.key for record in records]
    assert len(keys) == len(set(keys))
    assert set(IMAGES) <= set(keys)
    assert len(records) == len(named) + len(IMAGES) - len(listed)
    assert source.passed_over == ({".txt": len(texts & listed)} if texts & listed else {})
    assert {record.key for record in records if record.captions and record.problem == ""} == listed | texts
