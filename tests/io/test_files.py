import json
import os
import socket
import subprocess
import time

import pytest

from microdit.errors import UserError
from microdit.io.files import (
    aside_of,
    from_checked_json,
    opened_aside,
    read_json,
    stale_asides,
    to_checked_json,
    to_checked_lines,
    write_aside,
)
from tests.damage import ALL_BITS, flips

CONTENT = {
    "step": 60,
    "loss": 0.1,
    "nothing": None,
    "name": "gr\u00fcn \ud800",
    "sha256": "of something else",
    "files": {"a": [1, {"b": True}]},
    "nan": float("inf"),
}


def test_it_is_json_to_others_and_the_same_content_to_us():
    raw = to_checked_json(CONTENT)
    assert from_checked_json(raw) == CONTENT
    assert json.loads(raw).items() >= CONTENT.items()
    assert from_checked_json(to_checked_json({})) == {}


def test_lines_are_json_to_others_and_the_same_content_to_us():
    contents = [CONTENT, {}, {"text": "two\nlines \u2028 and \r"}]
    lines = to_checked_lines(contents).split(b"\n")
    assert [from_checked_json(line) for line in lines[:-1]] == contents
    assert lines[-1] == b""
    assert json.loads(lines[2])["text"] == contents[2]["text"]


@pytest.mark.parametrize("raw", [to_checked_json(CONTENT), to_checked_lines([CONTENT]).rstrip()], ids=["file", "line"])
def test_every_flipped_bit_is_noticed(tmp_path, raw):
    path = tmp_path / "content.json"
    path.write_bytes(raw)
    for _ in flips(path, bits=ALL_BITS):
        with pytest.raises(ValueError):  # noqa: PT011 - half of them are no JSON any more, in many ways
            from_checked_json(path.read_bytes())
    assert from_checked_json(path.read_bytes()) == CONTENT


@pytest.mark.parametrize("cut", [0, 1, 20, -70, -5, -1])
def test_a_cut_file_is_noticed(cut):
    for raw in (to_checked_json(CONTENT), to_checked_lines([CONTENT]).rstrip()):
        with pytest.raises(ValueError):  # noqa: PT011
            from_checked_json(raw[:cut])


@pytest.mark.parametrize("content", [b"", b"[]", b"1", b"\xff", b"[" * 100_000, b'{"a": ' * 100_000])
def test_what_is_no_object_is_refused(content):
    with pytest.raises(ValueError):  # noqa: PT011
        from_checked_json(content)


def test_what_has_no_checksum_is_read_as_it_is():
    assert from_checked_json(b'{"step": 60}') == {"step": 60}
    with pytest.raises(ValueError, match="its checksum differs"):
        from_checked_json(to_checked_json(CONTENT).replace(b'"self_sha256": ', b'"other": '))
    with pytest.raises(ValueError, match="its checksum differs"):
        from_checked_json(to_checked_json(CONTENT) + b"\n")


def test_concurrent_writers_leave_the_old_or_the_new_file(tmp_path):
    path = tmp_path / "deep" / "file"
    write_aside(path, b"first")
    with opened_aside(path) as file:
        file.write(b"second")
        if os.fork() == 0:  # another process writes it meanwhile
            write_aside(path, b"third")
            os._exit(0)
        os.wait()
        assert path.read_bytes() == b"third"
    assert path.read_bytes() == b"second"

    def fails():
        with opened_aside(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_what_processes_that_are_gone_left_half_written_is_stale(tmp_path):
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    here, old = socket.gethostname(), time.time() - 100_000
    left = tmp_path / f".file.{here}-{gone.pid}.part"
    elsewhere, lately = tmp_path / ".file.elsewhere-1.part", tmp_path / ".file.elsewhere-2.part"
    other = tmp_path / f".other[1].{here}-{gone.pid}.part"
    for path in (left, elsewhere, lately, other, aside_of(tmp_path / "file"), tmp_path / f".file.{here}-1.part", tmp_path / ".set.part"):
        path.touch()
    os.utime(elsewhere, (old, old))
    assert sorted(stale_asides(tmp_path)) == sorted([left, elsewhere, other])
    assert sorted(stale_asides(tmp_path, "file")) == sorted([left, elsewhere])
    assert stale_asides(tmp_path, "other[1]") == [other]


def test_a_json_file_is_read_or_named_with_what_is_to_be_done(tmp_path):
    path = tmp_path / "config.json"
    for content, why in ((None, "No such file"), (b"[1]", "it is not a JSON object"), (b"{", "Expecting"), (b"\xff\xfe\xfd", "decode")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=rf"config.json cannot be read: .*{why}.*\. Fetch it anew\."):
            read_json(path, "Fetch it anew.")
    path.write_bytes(b'{"a": {"b": 1}}')
    assert read_json(path, "Fetch it anew.") == {"a": {"b": 1}}
