"""SIGTERM before training began: what is started again by whoever reads exit codes."""

import subprocess
import sys

from tests.training.processes import RECIPE

TERMINATED_AT_TORCH = """
import os, signal, sys
def notice(event, args):
    if event == "import" and args[0] == "torch":
        os.kill(os.getpid(), signal.SIGTERM)
sys.addaudithook(notice)
from microdit.__main__ import main
main()
"""


def test_asked_to_stop_while_starting_it_asks_to_be_started_again(tmp_path):
    """The signal comes while torch is imported, the longest part of a start."""
    command = [sys.executable, "-c", TERMINATED_AT_TORCH, "train", str(RECIPE), "data.path=data", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 75, done.stderr
    assert done.stderr == "Stopped before training began. Start again with --resume.\n"
    assert not (tmp_path / "run").exists()
