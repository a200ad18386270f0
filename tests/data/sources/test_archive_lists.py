"""A caption list at the root of an archive captions its images, or is rejected by name."""

import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microdit.data.sources.archive_lists import LARGEST_LIST, LATE, PARQUET, SECOND
from microdit.data.sources.archives import archive_source
from tests.data.pictures import picture, problems_of, records_of, write_tar

ARCHIVES = ["a.tar", "a.tgz", "a.zip"]
IMAGES = [("a.png", picture(1, "PNG")), ("birds/b.PNG", picture(2, "PNG")), ("photo", picture(3))]


def write(path, files):
    if path.suffix != ".zip":
        return write_tar(path, files, "w:gz" if path.suffix == ".tgz" else "w")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return path


def json_lines(*lines):
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("name", ["metadata.jsonl", "./metadata.jsonl", "metadata.csv"])
def test_the_images_take_their_captions_from_the_list(tmp_path, archive, name):
    texts = {file: f"text of {file}" for file, _ in IMAGES}
    content = json_lines(*({"file_name": file, "text": text} for file, text in texts.items()))
    if name.endswith(".csv"):
        content = "\n".join(["file_name,text", *(f"{file},{text}" for file, text in texts.items())]).encode()
    records = records_of(archive_source([write(tmp_path / archive, [(name, content), *IMAGES])]))
    assert [(record.key, record.captions, record.image, record.problem, record.passed_over) for record in records] == [
        (key, {"caption": texts[file]}, image, "", {}) for key, (file, image) in zip(("a", "birds/b", "photo"), IMAGES, strict=True)
    ]


@pytest.mark.parametrize("archive", ARCHIVES)
def test_every_line_counts_once_and_other_images_keep_what_is_beside_them(tmp_path, archive):
    lines = [
        {"file_name": "a.png", "text": "from the list"},
        {"file_name": "a.png", "text": "again"},
        {"file_name": "gone.png", "text": "of nothing"},
        {"file_name": "../a.png", "text": "outside"},
        {"file_name": "c.png", "text": ""},
        {"file_name": "b.seg.png", "text": "passed over"},
    ]
    files = [("metadata.jsonl", json_lines(*lines) + b"{\n"), ("a.png", picture(1, "PNG")), ("a.txt", b"beside")]
    files += [("b.png", picture(2, "PNG")), ("b.seg.png", picture(4, "PNG")), ("b.txt", b"beside"), ("c.png", picture(3, "PNG"))]
    records = records_of(archive_source([write(tmp_path / archive, files)]))
    assert {record.key: record.captions["caption"] for record in records if not record.problem} == {"a": "from the list", "b": "beside"}
    assert {key: problem for key, problem in problems_of(records).items() if problem} == {
        "c": "no caption",
        "metadata.jsonl#2": "listed twice",
        "metadata.jsonl#4": "file lies outside the folder",
        "metadata.jsonl#7": "metadata line is not JSON",
        "gone.png": "no such file",
    }
    assert [record.passed_over for record in records if record.passed_over] == [{".seg.png": 1}]


def test_captions_of_the_list_are_chosen_by_name(tmp_path):
    content = json_lines({"file_name": "a.png", "text": "long", "alt": "short"})
    path = write(tmp_path / "a.zip", [*IMAGES[:1], ("metadata.jsonl", content)])
    (record,) = records_of(archive_source([path], {"text": 0.5, "alt": 0.5}))
    assert record.captions == {"text": "long", "alt": "short"}
    assert "metadata.jsonl has no column title." in problems_of(records_of(archive_source([path], {"title": 1.0})))["metadata.jsonl"]


def test_a_list_that_cannot_be_used_is_rejected_by_name(tmp_path):
    good = json_lines({"file_name": "a.png", "text": "words"})
    pq.write_table(pa.table({"file_name": ["a.png"], "text": ["words"]}), tmp_path / "table")
    image = IMAGES[0]
    cases = {
        "late.tar": ([image, ("metadata.jsonl", good)], "metadata.jsonl", LATE),
        "table.tar": ([("metadata.parquet", (tmp_path / "table").read_bytes()), image], "metadata.parquet", PARQUET),
        "table.zip": ([image, ("metadata.parquet", (tmp_path / "table").read_bytes())], "metadata.parquet", PARQUET),
        "large.tar": ([("metadata.csv", bytes(LARGEST_LIST + 1)), image], "metadata.csv", "file is too large"),
        "large.zip": ([image, ("metadata.csv", bytes(LARGEST_LIST + 1))], "metadata.csv", "file is too large"),
    }
    for name, (files, key, problem) in cases.items():
        assert problems_of(records_of(archive_source([write(tmp_path / name, files)]))) == {"a": "no caption", key: problem}
    both = [("metadata.csv", b"file_name,text\na.png,first\n"), ("metadata.jsonl", good), image]
    records = records_of(archive_source([write(tmp_path / "both.tar", both)]))
    assert problems_of(records) == {"metadata.jsonl": SECOND, "a": ""}
    records = records_of(archive_source([write(tmp_path / "other.tar", [("metadata.csv", b"size,hash\n1,2\n"), image])]))
    assert problems_of(records)["metadata.csv"].startswith("metadata.csv names no files in a column with a usual name.")


def test_a_list_in_which_a_quote_swallows_lines_is_rejected_with_its_line(tmp_path):
    lines = b'file_name,text\na.png,"an open quote\n' + b"b.png,words\n" * 12_000
    records = records_of(archive_source([write(tmp_path / "a.zip", [("metadata.csv", lines), *IMAGES])]))
    (problem,) = {record.problem for record in records if record.key.startswith("metadata")}
    assert problem.startswith("metadata.csv, line 2: a quote is opened there and not closed")
    assert not any(record.captions for record in records)


def test_lines_behind_the_damage_of_an_archive_are_not_missing(tmp_path):
    content = json_lines(*({"file_name": file, "text": "words"} for file in ("a.png", "birds/b.PNG")))
    path = write(tmp_path / "a.tar", [("metadata.jsonl", content), *IMAGES[:2]])
    path.write_bytes(path.read_bytes()[: 4 * 512 + 100])
    assert problems_of(records_of(archive_source([path])))["a.tar#end"] == "archive is damaged from here on"
    assert "birds/b.PNG" not in problems_of(records_of(archive_source([path])))


def test_lists_in_folders_of_an_archive_are_counted(tmp_path):
    path = write(tmp_path / "a.zip", [("birds/metadata.csv", b"file_name,text\n"), *IMAGES[:1], ("a.txt", b"words")])
    (record,) = records_of(archive_source([path]))
    assert (record.problem, record.passed_over) == ("", {".csv": 1})
