import os
import socket
import subprocess
import sys
import time

import pytest

from microdit.errors import UserError
from microdit.io.locks import check_unlocked, in_turn, in_use, is_held, locked


def test_the_second_is_refused_with_the_first_ones_process_and_host(tmp_path):
    with locked(tmp_path / "deep" / "lock", "The folder"):
        with (
            pytest.raises(UserError, match=f"^The folder is in use by process {os.getpid()} on {socket.gethostname()}: wait for it"),
            locked(tmp_path / "deep" / "lock", "The folder"),
        ):
            pytest.fail("two at once")
        with locked(tmp_path / "deep" / "another", "Another"):
            pass
        with pytest.raises(UserError, match=f"^It is in use by process {os.getpid()} on "):
            check_unlocked(tmp_path / "deep" / "lock", "It")
    check_unlocked(tmp_path / "deep" / "lock", "The folder")
    with locked(tmp_path / "deep" / "lock", "The folder"):
        pass


def test_a_process_that_is_killed_lets_go(tmp_path):
    hold = """import sys, time, pathlib
from microdit.io.locks import locked
with locked(pathlib.Path(sys.argv[1]), "It"):
    print(1, flush=True)
    time.sleep(600)"""
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "lock")], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match=f"It is in use by process {process.pid} on "), locked(tmp_path / "lock", "It"):
            pytest.fail("two at once")
        process.kill()
    with locked(tmp_path / "lock", "It"):
        pass


def test_several_use_it_at_once_and_one_can_ask_whether_any_does(tmp_path):
    path = tmp_path / "lock"
    assert not is_held(path)
    with in_use(path), in_use(path):
        assert is_held(path)
    with locked(path, "It"):
        assert is_held(path)
    assert not is_held(path)


def test_who_waits_for_a_turn_gets_it(tmp_path):
    seen, path = tmp_path / "seen", tmp_path / "lock"
    seen.write_text("")
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            with in_turn(path):
                before = seen.read_text()
                time.sleep(0.01)  # long enough for another to come in between, if it could
                seen.write_text(f"{before}{number}")
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert sorted(seen.read_text()) == ["0", "1", "2", "3"]
