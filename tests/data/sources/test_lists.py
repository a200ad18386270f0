import csv
import json
import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.data.sources.folders import folder_source, list_folder, list_source
from microdit.data.sources.lists import digest_of, find_lines, repeated_in
from microdit.data.sources.open import open_source
from microdit.errors import UserError
from tests.data.pictures import picture, problems_of, records_of, write_file

WANTED = ("text",)


def write_list(folder, kind, bom=b""):
    """Return lines of all kinds, whose sizes in bytes exceed their numbers of characters by different amounts."""
    texts = ["words", "f\u00fcr \u65e5\u672c", "\U0001f600", 'said "so", and', "", "two\nlines", "w" * 300]
    rows = [(f"{number % 11}.png" if number % 5 else "", texts[number % len(texts)]) for number in range(60)]
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, "text": text}, ensure_ascii=number % 2 == 0) for number, (name, text) in enumerate(rows)]
        content = "\n".join(f"{line}\n{' ' if number % 7 == 0 else ''}" for number, line in enumerate(lines)).encode() + b'{"broken\n\xff'
    else:
        quoted = [f'{name},"{text.replace(chr(34), chr(34) * 2)}"' for name, text in rows]
        content = "\r\n".join(["", "file_name,text", *quoted[:30], "", *quoted[30:], "\udcff.png,x"]).encode(errors="surrogateescape")
    return write_file(folder / f"metadata.{kind}", bom + content)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_line_is_the_same_from_wherever_reading_begins(tmp_path, kind, bom):
    path = write_list(tmp_path, kind, bom)
    whole, _ = find_lines(path, WANTED, 10**6)
    every = whole.read(0, 10**6, WANTED)
    assert len(every) == len(whole) >= 60
    assert {item.captions["text"] for item in every if item.captions} >= {"words", "f\u00fcr \u65e5\u672c", "\U0001f600", "two\nlines"}
    for step in (1, 2, 7, 61):
        lines, _ = find_lines(path, WANTED, step)
        assert [item for start in range(0, len(lines), 3) for item in lines.read(start, start + 3, WANTED)] == every
        assert len(lines.positions) == -(-len(lines) // step)


def test_what_is_listed_twice_is_found_among_all(tmp_path):
    generator = random.Random(0)
    names = [f"{generator.randrange(3000)}" for _ in range(5000)]
    met, expected = set(), []
    for name in names:
        expected.append(name in met)
        met.add(name)
    assert repeated_in(bytearray().join(map(digest_of, names))).tolist() == expected


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_parts_of_a_list_are_the_same_whatever_their_size(tmp_path, monkeypatch, kind):
    """Includes a part that holds the last lines and the first images that no line names."""
    for number in range(20):
        write_file(tmp_path / f"{number}.png", picture(number))
    write_list(tmp_path, kind)
    once = records_of(folder_source(tmp_path, {"text": 1.0}))
    assert sum(record.problem == "listed twice" for record in once) > 30
    assert {f"{number}.png" for number in range(11, 20)} <= {record.key for record in once if record.problem == "no caption"}
    for size in (1, 7, 32):
        monkeypatch.setattr("microdit.data.sources.folders.PART_SIZE", size)
        assert records_of(folder_source(tmp_path, {"text": 1.0})) == once


def test_a_list_that_changes_after_it_was_read_is_a_sentence(tmp_path):
    write_file(tmp_path / "a.png", picture())
    path = write_file(tmp_path / "metadata.jsonl", b'{"file_name": "a.png", "text": "words"}\n')
    source, status = folder_source(tmp_path), path.stat()
    path.write_bytes(b'{"file_name": "a.png", "text": "other"}\n')  # of the same size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(UserError, match=r"metadata.jsonl has changed since its lines were indexed, .*: run the same command again"):
        list(source.parts[0].records())
    path.unlink()
    with pytest.raises(UserError, match=r"metadata.jsonl cannot be used: no such file"):
        list(source.parts[0].records())


def test_lines_leave_nothing_in_memory_but_where_parts_begin(tmp_path):
    for number in range(3):
        write_file(tmp_path / f"{number}.png", b"")
    lines = "".join(json.dumps({"file_name": f"{number}.png", "text": "w" * 500}) + "\n" for number in range(2500))
    write_file(tmp_path / "metadata.jsonl", lines.encode())
    listing = list_folder(tmp_path, WANTED)
    assert (len(listing), len(listing.images), listing.lists[0].repeated.size, len(listing.lists[0].positions)) == (2500, 0, 0, 3)
    records = problems_of([record for part in folder_source(tmp_path).parts for record in part.records()])
    assert list(records.values()).count("no such file") == 2497


def fill(folder, content, name="metadata.csv", pictures="abc"):
    for letter in pictures:
        write_file(folder / f"{letter}.png", picture())
    return write_file(folder / name, content if isinstance(content, bytes) else content.encode())


def captions(source):
    return {record.key: next(iter(record.captions.values()), record.problem) for record in records_of(source)}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a.png,a red, fat cat", "metadata line has more fields than the header"),
        ('a.png,"a \\"red\\", fat cat"', "quotes in the metadata line are not closed as they should be"),
        ('a.png,"a \\"red\\" cat"', "quotes in the metadata line are not closed as they should be"),
        ('a.png,"a red" cat', "quotes in the metadata line are not closed as they should be"),
    ],
)
def test_a_caption_is_never_cut_in_silence(tmp_path, line, reason):
    fill(tmp_path, f'file_name,text\n{line}\nb.png,green,,\nc.png,5" wide\n')
    assert captions(folder_source(tmp_path)) == {"metadata.csv#2": reason, "b.png": "green", "c.png": '5" wide', "a.png": "no caption"}


@pytest.mark.parametrize("rest", ["b.png,green\nc.png,blue\n", 'b.png,green\nc.png,"blue"\n'])
def test_a_quote_that_swallows_lines_is_refused_with_its_line(tmp_path, rest):
    fill(tmp_path, f'file_name,text\na.png,"an open quote\n{rest}')
    with pytest.raises(
        UserError, match=r"metadata.csv, line 2: a quote is opened there and not closed as it should be before line 4\. Close it"
    ):
        folder_source(tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.tsv"])
@pytest.mark.parametrize("length", [5, 200_000, 5_000_000])  # many lines, a field that is too long, a line that is
def test_a_quote_that_swallows_more_than_a_field_may_hold_is_refused(tmp_path, name, length):
    mark = "," if name.endswith("csv") else "\t"
    rest = f"b.png{mark}{'w' * length}\n" * (200_000 // length + 1)
    fill(tmp_path, f'file_name{mark}text\na.png{mark}"an open quote\n{rest}', name)
    with pytest.raises(UserError, match=rf"{name}, line 2: a quote is opened there and not closed as it should be before line"):
        folder_source(tmp_path)


def test_a_line_that_is_too_long_alone_costs_no_other(tmp_path):
    fill(tmp_path, f'file_name,text\na.png,"{"w" * 200_000}"\nb.png,{"w" * 5_000_000}\nc.png,blue\n')
    too_long = "metadata line is too long"
    assert captions(folder_source(tmp_path)) == {
        "metadata.csv#2": too_long,
        "metadata.csv#3": too_long,
        "c.png": "blue",
        "a.png": "no caption",
        "b.png": "no caption",
    }


def test_two_columns_of_one_name_are_refused(tmp_path):
    fill(tmp_path, "file_name,text,text,,\na.png,red,other,,\n")
    with pytest.raises(UserError, match=r"metadata.csv, line 1: several columns are named text\. Rename all but one"):
        folder_source(tmp_path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "names", ["File Name|Caption", "FILENAME|Prompt", "path|title", "image|description", "image_path|TEXT", "url|name"]
)
def test_separators_and_usual_names_are_found(tmp_path, delimiter, names):
    lines = [names, "a.png|a red, fat cat; really", "b.png|green"]
    rows = [line.split("|") for line in lines]
    fill(tmp_path, "\r\n".join(delimiter.join(f'"{field}"' for field in row) for row in rows), pictures="ab")
    assert captions(folder_source(tmp_path)) == {"a.png": "a red, fat cat; really", "b.png": "green"}
    lines, _ = find_lines(tmp_path / "metadata.csv", WANTED, 1)
    assert [item.file for start in range(2) for item in lines.read(start, start + 1, WANTED)] == ["a.png", "b.png"]


def test_columns_with_other_names_are_chosen(tmp_path):
    path = fill(tmp_path, "picture,beschreibung\na.png,rot\n", "list.csv", "a")
    with pytest.raises(
        UserError, match=r"names no files in a column with a usual name\. Its columns are beschreibung, picture\. .*--file-column"
    ):
        list_source(path)
    with pytest.raises(UserError, match=r"has no caption, text, prompt\. Its columns are beschreibung, picture\. .*--caption NAME"):
        list_source(path, None, "picture")
    assert captions(list_source(path, {"beschreibung": 1.0}, "picture")) == {"a.png": "rot"}
    with pytest.raises(UserError, match=r"has no column alt\. Its columns are"):
        list_source(path, {"alt": 1.0}, "picture")


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.jsonl", "list.json", "list.ndjson", "list.txt"])
def test_a_list_is_a_source_by_itself(tmp_path, name):
    rows = [("a.png", "red"), (str(tmp_path / "in" / "b.png"), "green"), ("../outside.png", "x"), ("a.png", "again"), ("gone.png", "y")]
    if name.endswith(("csv", "tsv")):
        content = "\n".join("\t".join(row) for row in (("file", "text"), *rows))
    else:
        content = "\n".join(json.dumps({"file": file, "text": text}) for file, text in rows)
    write_file(tmp_path / "in" / "b.png", picture())
    path = fill(tmp_path, content, name, "ac")
    found = captions(open_source(str(path)))
    assert (found["a.png"], found["in/b.png"]) == ("red", "green")
    assert sorted(problems_of(records_of(open_source(str(path)))).values()) == [
        *("", "", "file lies outside the folder", "listed twice", "no such file"),
    ]


def test_a_list_of_addresses_is_refused_with_the_command_that_fetches_them(tmp_path):
    path = fill(tmp_path, "url,text\nhttps://example.org/a.jpg,red\n", "list.csv", "")
    with pytest.raises(
        UserError, match=r"img2dataset --url_list \S*list.csv --input_format csv --url_col url --caption_col text .*folder list as"
    ):
        open_source(str(path))
    fill(tmp_path, '{"url": "https://example.org/a.jpg", "text": "red"}\n{"url": "b.png", "text": "green"}', "some.jsonl", "b")
    assert captions(open_source(str(tmp_path / "some.jsonl"))) == {
        "some.jsonl#1": "metadata line names a URL and no file",
        "b.png": "green",
    }


def test_lines_that_name_their_captions_differently_are_refused(tmp_path):
    fill(tmp_path, '{"file_name":"a.png","text":"red"}\n{"file_name":"b.png","caption":"blue"}\n', "metadata.jsonl", "ab")
    with pytest.raises(UserError, match=r"name their captions differently: text in 1, caption in 1 of 2\. .* --caption NAME=0.7"):
        folder_source(tmp_path)
    assert captions(folder_source(tmp_path, {"text": 0.5, "caption": 0.5})) == {"a.png": "red", "b.png": "blue"}
    fill(tmp_path, '{"file_name":"a.png","text":"red"}\n{"file_name":"b.png","caption":"b","text":"blue"}\n', "metadata.jsonl", "ab")
    assert captions(folder_source(tmp_path)) == {"a.png": "red", "b.png": "blue"}


def test_captions_in_lists_and_in_fields_inside(tmp_path):
    values = ["", "a red thing"], [["green one", "two"]], {"a": 1}, 5, None, "plain"
    lines = [
        json.dumps({"file_name": f"{n}.png", "text": value, "more": {"deep": {"text": f"deep {n}"}}}) for n, value in enumerate(values)
    ]
    fill(tmp_path, "\n".join(lines), "metadata.jsonl", "012345")
    assert list(captions(folder_source(tmp_path)).values()) == [
        *("a red thing", "green one", "caption is not text", "caption is not text", "no caption", "plain"),
    ]
    assert captions(folder_source(tmp_path, {"more.deep.text": 1.0}))["3.png"] == "deep 3"


def test_line_separators_of_unicode_are_part_of_captions(tmp_path):
    fill(tmp_path, '{"file_name":"a.png","text":"one\u2028two\x85three"}\n', "metadata.jsonl", "a")
    assert captions(folder_source(tmp_path)) == {"a.png": "one\u2028two\x85three"}
    (tmp_path / "metadata.jsonl").unlink()
    fill(tmp_path, "file_name,text\na.png,one\u2028two\x85three\n", pictures="a")
    assert captions(folder_source(tmp_path)) == {"a.png": "one\u2028two\x85three"}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("metadata.csv", "file_name,text\na.png,red\n".encode("utf-16"), "probably UTF-16. Convert it: iconv -f UTF-16 -t UTF-8"),
        ("metadata.csv", "file_name,text\na.png,red\n".encode("utf-16-le"), "probably UTF-16"),
        ("metadata.jsonl", b'[\n{"file_name": "a.png", "text": "red"}\n]\n', r"is one JSON list, .* Convert it: jq -c '\.\[\]'"),
    ],
)
def test_lists_in_other_forms_are_refused_with_a_converting_command(tmp_path, name, content, sentence):
    fill(tmp_path, content, name, "a")
    with pytest.raises(UserError, match=sentence):
        folder_source(tmp_path)


LINES = st.lists(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), max_size=8), min_size=1, max_size=4), max_size=6
)


@given(rows=LINES, lineterminator=st.sampled_from(["\n", "\r\n"]), delimiter=st.sampled_from(",;\t"))
def test_what_the_csv_module_writes_is_read_or_named(tmp_path_factory, rows, lineterminator, delimiter):
    folder = tmp_path_factory.mktemp("set")
    write_file(folder / "z.png", b"")
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=lineterminator)
        writer.writerow(["file_name", "text"])
        writer.writerow(["z.png", "words"])
        for number, row in enumerate(rows):
            writer.writerow([f"{number}.png", *row])
    records = {record.key: record for record in records_of(folder_source(folder))}
    assert len(records) == len(rows) + 1
    for number, row in enumerate(rows):
        record = records.get(f"{number}.png")
        if record is None:
            assert any(row[1:])
            assert any(other.problem == "metadata line has more fields than the header" for other in records.values())
        elif record.captions:
            assert record.captions["text"] == row[0].strip()
