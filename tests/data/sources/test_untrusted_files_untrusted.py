import io
import os
import socket
from pathlib import Path

import pytest

from microdit.data.sources.untrusted_files import bounded_lines, read_file, roots_of
from tests.data.pictures import write_file


def test_only_regular_files_inside_the_source_are_read(tmp_path):
    folder = tmp_path / "set"
    write_file(folder / "a.png", b"content")
    write_file(tmp_path / "secret.png", b"secret")
    write_file(tmp_path / "elsewhere" / "b.png", b"secret")
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "in.png").symlink_to("a.png")
    (folder / "self.png").symlink_to("self.png")
    (folder / "gone.png").symlink_to("nothing.png")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(folder / "socket.png"))
    names = ["a", "in", "pipe", "device", "out", "linked/b", "../secret", "socket", "self", "gone", "x" * 5000, "\0", "\ud800"]
    roots = roots_of(folder)
    assert {name: read_file(folder / f"{name}.png", roots) for name in names} == {
        "a": (b"content", ""),
        "in": (b"content", ""),
        "pipe": (b"", "not a regular file"),
        "device": (b"", "link leads out of the source"),
        "out": (b"", "link leads out of the source"),
        "linked/b": (b"", "link leads out of the source"),
        "../secret": (b"", "link leads out of the source"),
        "socket": (b"", "file cannot be read"),
        "self": (b"", "file cannot be read"),
        "gone": (b"", "no such file"),
        "x" * 5000: (b"", "file cannot be read"),
        "\0": (b"", "file cannot be read"),
        "\ud800": (b"", "file cannot be read"),
    }
    assert read_file(folder / "out.png", None) == (b"secret", "")
    assert read_file(tmp_path / "set" / "device.png", None) == (b"", "not a regular file")
    assert read_file(folder / "a.png", roots, most=6) == (b"", "file is too large")
    (tmp_path / "link").symlink_to(folder)
    assert read_file(tmp_path / "link" / "a.png", roots_of(tmp_path / "link")) == (b"content", "")


def test_the_folder_one_stands_in_may_change(tmp_path, monkeypatch):
    for name in ("one", "two"):
        write_file(tmp_path / name / "a.png", name.encode())
        monkeypatch.chdir(tmp_path / name)
        assert read_file(Path("a.png"), roots_of(Path())) == (name.encode(), "")
        assert read_file(tmp_path / "one" / "a.png", roots_of(Path()))[1] == ("" if name == "one" else "link leads out of the source")


def test_a_snapshot_in_the_hubs_cache_is_read(tmp_path):
    write_file(tmp_path / "blobs" / "abc", b"content")
    write_file(tmp_path / "refs" / "main", b"secret")
    snapshot = tmp_path / "snapshots" / "rev" / "data"
    snapshot.mkdir(parents=True)
    (snapshot / "a.png").symlink_to("../../../blobs/abc")
    (snapshot / "b.png").symlink_to("../../../refs/main")
    assert read_file(snapshot / "a.png", roots_of(snapshot)) == (b"content", "")
    assert read_file(snapshot / "b.png", roots_of(snapshot)) == (b"", "link leads out of the source")


@pytest.mark.parametrize("file", [io.BytesIO(b"a\n12345\n123456789\n\n1234567\nz"), io.StringIO("a\n12345\n123456789\n\n1234567\nz")])
def test_a_line_that_is_too_long_is_passed_over(file):
    assert [line if line is None else len(line) for line in bounded_lines(file, most=6)] == [2, 6, None, 1, None, 1]
