"""microdit app as a person starts it."""

import os
import re
import signal

import httpx

from tests.commands import microdit
from tests.training.processes import start, wait_for


def test_the_command_serves_a_run_until_it_is_interrupted(workplace):
    running = start(workplace / ".logs", ["app", "runs/tiny", "--port", 0], cwd=workplace)
    try:
        wait_for(lambda: "Ctrl-C" in running.output, running, seconds=300)  # in a new environment nothing is compiled yet
        url = re.search(r"http://127\.0\.0\.1:\d+", running.output)[0]
        assert "microdit" in httpx.get(url, timeout=60).text
        assert httpx.get(url + "/api/about", timeout=60).json()["runs"] == ["tiny"]
        answer = httpx.post(url + "/v1/images/generations", json={"prompt": "red heart", "steps": 2}, timeout=60)
        assert answer.status_code == 200
        os.kill(running.processes[0].pid, signal.SIGINT)
        assert running.wait(60) == [0]
    finally:
        running.kill()
    assert "Traceback" not in running.output
    assert "no password" not in running.output


def test_mistakes_are_sentences(workplace):
    for arguments, words in (
        (["runs/nothing"], "runs/nothing"),
        (["runs/tiny", "runs/tiny"], "A model is named twice"),
    ):
        done = microdit("app", *arguments, cwd=workplace)
        assert (done.returncode, "Traceback" in done.output) == (1, False), done.output
        assert words in done.output
