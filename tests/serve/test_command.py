"""The command microdit app."""

import base64
import io
import os
import re
import signal

import httpx
import pytest
from PIL import Image

from tests.commands import microdit
from tests.training.processes import HANG, start, wait_for


def test_the_command_serves_a_run_until_it_is_interrupted(workplace):
    running = start(workplace / ".logs", ["app", "runs/tiny", "--port", 0], cwd=workplace)
    try:
        wait_for(lambda: "Ctrl-C" in running.output, running)  # in a new environment Python compiles everything first
        url = re.search(r"http://127\.0\.0\.1:\d+", running.output)[0]
        assert "microdit" in httpx.get(url, timeout=HANG).text
        assert httpx.get(url + "/api/about", timeout=HANG).json()["runs"] == ["tiny"]
        response = httpx.post(url + "/v1/images/generations", json={"prompt": "red heart", "steps": 2}, timeout=HANG)
        assert response.status_code == 200
        os.kill(running.processes[0].pid, signal.SIGINT)
        assert running.wait() == [0]
    finally:
        running.kill()
    assert "Traceback" not in running.output
    assert "no password" not in running.output


def test_a_run_and_its_export_give_openais_client_the_same_images(workplace):
    """The client is the package openai."""
    openai = pytest.importorskip("openai")
    exported = microdit("export", "runs/tiny", "exported-tiny", cwd=workplace)
    assert exported.returncode == 0, exported.output
    running = start(workplace / ".logs", ["app", "runs/tiny", "exported-tiny", "--port", 0], cwd=workplace)
    try:
        wait_for(lambda: "Ctrl-C" in running.output, running)
        url = re.search(r"http://127\.0\.0\.1:\d+", running.output)[0]
        client = openai.OpenAI(base_url=url + "/v1", api_key="not asked for", max_retries=0)
        models = [model.id for model in client.models.list()]
        assert models == ["tiny", "exported-tiny"]
        results = [
            client.images.generate(model=model, prompt="red heart", n=2, response_format="b64_json", extra_body={"seed": 3, "steps": 2})
            for model in models
        ]
        pictures = [[Image.open(io.BytesIO(base64.b64decode(one.b64_json))).tobytes() for one in result.data] for result in results]
        assert pictures[0] == pictures[1]
        assert pictures[0][0] != pictures[0][1]
        with pytest.raises(openai.BadRequestError, match="n must be between 1 and"):
            client.images.generate(model="tiny", prompt="red heart", n=1000)
        with pytest.raises(openai.NotFoundError, match=r"There is no model 'dall-e-3'\. Known: tiny, exported-tiny"):
            client.images.generate(model="dall-e-3", prompt="red heart")
    finally:
        running.kill()


def test_errors_are_sentences(workplace):
    for arguments, words in (
        (["runs/nothing"], "runs/nothing"),
        (["runs/tiny", "runs/tiny"], "A model is named twice"),
    ):
        done = microdit("app", *arguments, cwd=workplace)
        assert (done.returncode, "Traceback" in done.output) == (1, False), done.output
        assert words in done.output
