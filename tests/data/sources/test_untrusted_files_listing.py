import os
import random

from microdit.data.sources.untrusted_files import find_files
from tests.data.pictures import write_file


def test_a_name_takes_its_bytes_and_eight_more(tmp_path):
    names = sorted(f"{number % 7}/{number:04}.png" for number in range(1000))
    for name in names:
        write_file(tmp_path / name, b"")
    pictures = find_files(tmp_path).images
    assert pictures.offsets.nbytes + pictures.names.nbytes == sum(map(len, names)) + 8 * 1001
    assert [listed.file for listed in pictures[:]] == names
    assert [listed.file for listed in pictures[995:2000]] == names[995:]
    assert pictures[1000:] == pictures[5:5] == []


def test_names_are_sorted_as_whole_paths_and_any_bytes_are_names(tmp_path):
    names = ["a/b.png", "a.png", "a0/b.png", "a-/b.png", "\u00fc/\u65e5.jpg", "\U0001f600.gif", os.fsdecode(b"no\xff utf-8.png"), "K.PNG"]
    random.Random(0).shuffle(names)
    for name in names:
        write_file(tmp_path / name, b"")
    for name in (".hidden.png", "a/notes.txt", "png", "jpg"):
        write_file(tmp_path / name, b"")
    write_file(tmp_path / ".folder" / "seen.png", b"")
    listed = [item.key for item in find_files(tmp_path).images[:]]
    assert listed == sorted(names, key=os.fsencode)
    found = find_files(tmp_path)
    assert found.others.to_pylist() == [b"a/notes.txt", b"jpg", b"png"]
    assert found.passed_over == {"hidden file": 1, "hidden folder": 1}


def test_more_names_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr("microdit.data.sources.untrusted_files.BLOCK", 3)
    names = sorted(f"{number}.png" for number in range(11))
    for name in names:
        write_file(tmp_path / name, b"")
    assert [item.key for item in find_files(tmp_path).images[:]] == names
    assert find_files(write_file(tmp_path / "empty" / "x", b"").parent).images[:] == []
