import resource
import signal

import pytest

from microdit.errors import UserError
from microdit.io.files import from_checked_json, to_checked_lines
from microdit.io.line_file import LineFile


def test_lines_are_on_the_disk_at_once_and_found_again(tmp_path):
    file = LineFile(tmp_path / "new" / "lines.jsonl")
    for number in range(3):
        file.append({"number": number, "text": "\u2028 猫\r\n\x85 \ud83d \0"})
        assert len(file.path.read_bytes().splitlines()) == number + 1
    file.close()
    assert [from_checked_json(line)["number"] for line in LineFile(file.path).lines] == [0, 1, 2]


@pytest.mark.parametrize("kept", range(1, 12))
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path, kept):
    """Of this version, with a checksum, and of an earlier one without."""
    path = tmp_path / "lines.jsonl"
    first, last, new = (to_checked_lines([{name: "é"}]) for name in "abc")
    for number, line in enumerate([last, b'{"b": "\xc3\xa9"}\n']):
        content = first + line[: min(kept * len(line) // 11, len(line) - 1)]
        path.write_bytes(content)
        file = LineFile(path)
        file.append({"c": "é"})
        file.close()
        whole = kept == 11
        assert path.read_bytes() == first + (line if whole else b"") + new, number
        assert len(file.lines) == 1 + whole


def test_a_full_disk_leaves_no_half_line(tmp_path):
    """A limit on the size of files stands for the disk: writing stops in the middle of a line."""
    file = LineFile(tmp_path / "lines.jsonl")
    file.append({"a": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[0][1]))
    try:
        with pytest.raises(UserError, match=r"lines\.jsonl cannot be written: .* Free some space and run the same command again"):
            file.append({"text": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    file.append({"b": 2})
    assert file.path.read_bytes() == to_checked_lines([{"a": 1}, {"b": 2}])


def test_a_file_has_one_writer(tmp_path):
    first = LineFile(tmp_path / "lines.jsonl")
    with pytest.raises(UserError, match="Another process is writing to"):
        LineFile(first.path)
    first.close()
    LineFile(first.path).append({"a": 1})


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        LineFile(tmp_path / "file" / "lines.jsonl")
