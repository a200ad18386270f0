"""The API of the page's script: choices, and the status of a job with its previews. A real server, the tiny trained model."""

import threading
from contextlib import contextmanager

import httpx
import pytest
import torch

from microdit.planning.phases import PROMPTS
from microdit.serve.endpoints import EXAMPLES, PageContent, web_app
from microdit.serve.queue import WorkQueue
from tests.serve.serving import served
from tests.training.processes import HANG


@pytest.fixture(scope="module")
def client(tiny):
    queue = WorkQueue({"tiny": tiny, "other": tiny}, 4)
    content = PageContent(prompts={"tiny": [f"heart {number}" for number in range(2 * EXAMPLES)], "other": []})
    with served(web_app(queue, content=content)) as url, httpx.Client(base_url=url, timeout=HANG) as client:
        yield client


@pytest.fixture
def job(client):
    """The address of a job that runs until it is cancelled."""
    address = f"/api/jobs/{client.post('/api/jobs', json={'prompt': 'red heart', 'steps': 1000, 'n': 16}).json()['id']}"
    while client.get(address).json()["done"] == 0:
        threading.Event().wait(0.01)
    yield address
    client.delete(address)


@contextmanager
def decoding(tiny, first):
    """Let `first()` run at the beginning of each decoding."""
    own = tiny.decode

    def decode(latents_BCHW):
        first()
        return own(latents_BCHW)

    tiny.decode = decode
    try:
        yield
    finally:
        del tiny.decode


def test_examples_are_the_models_own_prompts_or_general_ones(client):
    examples = client.get("/api/about").json()["examples"]
    assert examples == {"tiny": [f"heart {number}" for number in range(EXAMPLES)], "other": PROMPTS}


def test_a_status_does_not_wait_for_the_preview_of_another(client, tiny, job):
    begun, go_on, statuses = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        assert go_on.wait(HANG)

    with decoding(tiny, first):
        waiting = threading.Thread(target=lambda: statuses.append(client.get(job).json()))
        waiting.start()
        assert begun.wait(HANG)
        meanwhile = client.get(job).json()
        go_on.set()
        waiting.join()
    assert (meanwhile["state"], "pictures" in meanwhile) == ("running", False)
    assert (statuses[0]["state"], len(statuses[0]["pictures"])) == ("running", 16)


def test_a_preview_without_memory_does_not_end_the_job(client, tiny, job, caplog):
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with decoding(tiny, fail):
        status = client.get(job)
    assert (status.status_code, status.json()["state"], "pictures" in status.json()) == (200, "running", False)
    assert "A preview could not be decoded" in caplog.text
    assert len(client.get(job).json()["pictures"]) == 16
