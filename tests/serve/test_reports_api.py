"""The API of the tabs Run and Explain: a real server, the tiny trained model."""

import json

import httpx
import pytest

from microdit.pipelines.explain_page import explain_page
from microdit.serve.budget_api import Computations
from microdit.serve.connections import LIMITS
from microdit.serve.reports_api import KEPT_PAGES, reports_api
from microdit.serve.server import WebApp
from tests.serve.serving import served
from tests.training.processes import HANG


@pytest.fixture(scope="module")
def client(tiny, tiny_run):
    computations = Computations()
    app = WebApp(reports_api({"tiny": tiny}, computations, LIMITS, {"runs/tiny": tiny_run}), close=computations.close)
    with served(app) as url, httpx.Client(base_url=url, timeout=HANG) as client:
        yield client


def explain(client: httpx.Client, **fields: object) -> httpx.Response:
    return client.post("/api/explanations", json={"prompt": "owl", **fields})


def test_an_explanation_is_that_of_the_command(client, tiny):
    response = client.get(f"/api/explanations/{explain(client, prompt='red  heart ', seed=3).json()['id']}")
    assert response.headers["X-Frame-Options"] == "SAMEORIGIN"
    assert response.headers["Content-Type"].startswith("text/html")
    assert response.content == explain_page(tiny, "tiny", "red heart", 3)


@pytest.mark.parametrize("prompt", ["", "word " * 400, "\ud800 half a letter"])
def test_unusual_prompts_are_explained(client, prompt):
    headers = {"Content-Type": "application/json"}
    response = client.post("/api/explanations", content=json.dumps({"prompt": prompt}), headers=headers)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"prompt": None}, 400, "prompt must be text"),
        ({"prompt": "x" * 2001}, 400, "may have 2,000"),
        ({"model": "other"}, 404, "There is no model 'other'. Known: tiny."),
        ({"seed": -1}, 400, "seed must be between 0 and"),
        ({"seed": 1.5}, 400, "a whole number"),
        ({"steps": 3}, 400, "There is no field 'steps'"),
    ],
)
def test_a_bad_request_is_refused_in_a_sentence(client, fields, status, words):
    response = explain(client, **fields)
    assert (response.status_code, words in response.json()["error"]["message"]) == (status, True), response.text


def test_an_explanation_is_cut_off_when_its_time_is_up(tiny):
    computations = Computations(seconds=0)
    with served(WebApp(reports_api({"tiny": tiny}, computations, LIMITS, {}), close=computations.close)) as url:
        response = httpx.post(f"{url}/api/explanations", json={"prompt": "owl"}, timeout=HANG)
    assert (response.status_code, "more than 0 seconds" in response.text) == (400, True)


def test_the_oldest_explanation_makes_room(client):
    names = [explain(client).json()["id"] for _ in range(KEPT_PAGES + 1)]
    found = [client.get(f"/api/explanations/{name}").status_code for name in names]
    assert found == [404] + [200] * KEPT_PAGES


def test_a_run_has_a_report_and_a_state(client, tiny_run):
    assert "Curves" in client.get("/api/runs/runs%2Ftiny").text
    newest = max((tiny_run / name).stat().st_mtime for name in ("metrics.jsonl", "status.json", "samples"))
    assert client.get("/api/run-states/runs%2Ftiny").json() == {"state": "finished", "modified": newest}
    for place in ("runs", "run-states", "explanations"):
        assert client.get(f"/api/{place}/nothing").status_code == 404


def test_a_damaged_status_is_a_state_too(client, tiny_run):
    status = (tiny_run / "status.json").read_text()
    try:
        for content, state in (('{"state": "\\ud800"}', "?"), ("{", "unknown"), ('{"state": {}}', "unknown")):
            (tiny_run / "status.json").write_text(content)
            assert client.get("/api/run-states/runs%2Ftiny").json()["state"] == state
    finally:
        (tiny_run / "status.json").write_text(status)
