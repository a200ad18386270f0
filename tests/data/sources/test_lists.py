import json
import os
import random

import pytest

from microdit.data.sources.folders import folder_source, list_folder
from microdit.data.sources.lists import digest_of, find_lines, repeated_in
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
    assert (len(listing), len(listing.images), listing.lines.repeated.size, len(listing.lines.positions)) == (2500, 0, 0, 3)
    records = problems_of([record for part in folder_source(tmp_path).parts for record in part.records()])
    assert list(records.values()).count("no such file") == 2497
