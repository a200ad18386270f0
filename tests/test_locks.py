import os
import socket
import subprocess
import sys

import pytest

from microdit.errors import UserError
from microdit.locks import locked, refuse_locked


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
            refuse_locked(tmp_path / "deep" / "lock", "It")
    refuse_locked(tmp_path / "deep" / "lock", "The folder")
    with locked(tmp_path / "deep" / "lock", "The folder"):
        pass


def test_a_process_that_is_killed_lets_go(tmp_path):
    hold = """import sys, time, pathlib
from microdit.locks import locked
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
