import os
import signal
import socket
import subprocess
import sys

import pytest

from microdit.errors import UserError
from microdit.io.locks import LOCK, sole_writer

HOLDER = """
import sys
from pathlib import Path
from microdit.io.locks import locked
with locked(Path(sys.argv[1]), "it"):
    print(flush=True)
    input()
"""


def test_a_second_writer_is_told_who_is_at_it(tmp_path):
    run = tmp_path / "run"
    with sole_writer(run):
        said = rf"{run} is in use by process {os.getpid()} on {socket.gethostname()}: wait for it, or stop"
        with pytest.raises(UserError, match=said), sole_writer(run):
            pytest.fail("two hold it")
        assert [path.name for path in run.iterdir()] == [LOCK]
    assert not run.exists()  # nothing was written


def test_the_folder_is_unlocked_however_the_block_ends(tmp_path):
    def write(name: str) -> None:
        with sole_writer(tmp_path / "run"):
            (tmp_path / "run" / name).touch()
            raise KeyError

    for name in ("0", "1"):
        with pytest.raises(KeyError):
            write(name)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["0", "1"]


def test_a_writer_that_is_killed_lets_go_at_once(tmp_path):
    """Another process: the kernel takes the lock from it, and the file that it leaves keeps nobody out."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "\n"
    with pytest.raises(UserError, match=f"process {process.pid} on"), sole_writer(tmp_path):
        pytest.fail("two hold it")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with sole_writer(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_whose_file_was_removed_meanwhile_is_not_taken_for_held(tmp_path, monkeypatch):
    """Opened before the holder removed it, locked after: a file without a name would keep nobody out."""
    import fcntl

    path, real = tmp_path / LOCK, fcntl.flock

    def flock(file, operation):
        if not removed:
            removed.append(path.unlink())
        real(file, operation)

    removed: list[None] = []
    monkeypatch.setattr(fcntl, "flock", flock)
    with sole_writer(tmp_path), pytest.raises(UserError, match="is in use by"), sole_writer(tmp_path):
        pytest.fail("two hold it")


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"file/run cannot be written: .*Fix that, or choose another --out"),
        sole_writer(tmp_path / "file" / "run"),
    ):
        pytest.fail("nobody can write here")
