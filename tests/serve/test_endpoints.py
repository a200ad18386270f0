"""OpenAI's images API and the checks of all requests: a real server, the tiny trained model."""

import asyncio
import base64
import io
import json
import random
import threading
import time

import httpx
import pytest
from PIL import Image

from microdit.pipelines.settings import SamplerSettings
from microdit.serve.connections import Limits
from microdit.serve.endpoints import web_app
from microdit.serve.queue import JobSpec, WorkQueue
from microdit.serve.server import INTERNAL_ERROR
from tests.serve.conftest import LONG
from tests.serve.serving import served
from tests.training.processes import HANG

CLIENTS = 200
AS_JSON = {"Content-Type": "application/json"}
SHORT = {"prompt": "red heart", "steps": 2}
QUICK = {"steps": 2, "solver": "euler", "guidance_scale": 1}
URL = "/v1/images/generations"


@pytest.fixture(scope="module")
def place(tiny):
    """Return the queue and the address of its server."""
    queue = WorkQueue({"tiny": tiny}, 32)
    with served(web_app(queue, Limits(body_bytes=20_000))) as url:
        yield queue, url


@pytest.fixture
def client(place):
    with httpx.Client(base_url=place[1], timeout=HANG) as client:
        yield client


def picture_in(item: dict) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))


def test_images_are_those_of_the_pipeline_and_contain_their_settings(client, tiny):
    before = int(time.time())
    response = client.post(URL, json={**SHORT, "n": 2, "size": "64x128", "seed": 3, "guidance_scale": 3, "solver": "euler"})
    assert response.status_code == 200, response.text
    body = response.json()
    assert set(body) == {"created", "data"}
    assert before <= body["created"] <= time.time()
    pictures = [picture_in(item) for item in body["data"]]
    wanted = tiny.generate(["red heart"] * 2, SamplerSettings(2, 3.0, "euler"), 3, height=128, width=64)
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in wanted]
    assert (pictures[1].info["seed"], pictures[1].info["prompt"]) == ("4", "red heart")


def test_models_and_health(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/health").json() == {"status": "ok", "waiting": 0, "queue": 32}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},  # the empty caption
        {"prompt": "red\x00\x1b[2J\nheart"},
        {"prompt": "\ud800 half a letter"},
        {"prompt": "x" * 2000},
        {
            "n": None,
            "model": "tiny",
            "user": "somebody",
            "response_format": "b64_json",
            "size": "auto",
            "quality": "hd",
            "style": "vivid",
            "negative_prompt": "blue",
        },
        {"seed": 2**53 - 2},
    ],
)
def test_unusual_requests_are_accepted(client, fields):
    assert client.post(URL, content=json.dumps({**SHORT, **fields}), headers=AS_JSON).status_code == 200


BAD_FIELDS = [
    ({"prompt": None}, "prompt", "prompt is missing"),
    ({"prompt": 3}, "prompt", "must be text, not a number"),
    ({"prompt": ["red heart"]}, "prompt", "must be text, not a list"),
    ({"prompt": "x" * 10_000}, "prompt", "has 10,000 characters, and may have 2,000"),
    ({"negative_prompt": "x" * 2001}, "negative_prompt", "may have 2,000"),
    ({"n": 0}, "n", "between 1 and 16"),
    ({"n": 17}, "n", "between 1 and 16"),
    ({"n": 1.5}, "n", "a whole number, not a fraction"),
    ({"n": True}, "n", "a whole number, not a boolean"),
    ({"n": "2"}, "n", "a whole number, not text"),
    ({"size": "65x64"}, "size", "width 65 must be a multiple of"),
    ({"size": "0x64"}, "size", "width 0 must be a multiple of"),
    ({"size": "64"}, "size", "WIDTHxHEIGHT"),
    ({"size": "-64x64"}, "size", "WIDTHxHEIGHT"),
    ({"size": "٦٤x64"}, "size", "WIDTHxHEIGHT"),
    ({"size": "2048x64"}, "size", "more than 1024"),
    ({"size": 64}, "size", "must be text"),
    ({"size": "1024x1024", "n": 16}, "n", "too many pixels"),
    ({"steps": 0}, "steps", "between 2 and 1000"),
    ({"steps": 10**6}, "steps", "between 2 and 1000"),
    ({"steps": {}}, "steps", "not an object"),
    ({"guidance_scale": "NaN"}, "guidance_scale", "a number, not text"),
    ({"guidance_scale": 101}, "guidance_scale", "between -100 and 100"),
    ({"guidance_scale": 10**400}, "guidance_scale", "too large a number"),
    ({"solver": "magic"}, "solver", "Known: heun, dpm, euler"),
    ({"seed": -1}, "seed", "between 0 and"),
    ({"seed": 2**64}, "seed", "between 0 and"),
    ({"response_format": "url"}, "response_format", "no url"),
    ({"user": 7}, "user", "must be text"),
    ({"seed": 2**53 - 2, "n": 2}, "seed", f"between 0 and {2**53 - 3}."),
    ({"model": 3}, "model", "must be text, not a number"),
    ({"qualities": "hd"}, "qualities", "There is no field 'qualities'"),
    ({"qualities": None}, "qualities", "There is no field 'qualities'"),
    ({"half a letter \ud800": 1}, "half a letter ?", "There is no field 'half a letter ?'"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD_FIELDS, ids=[f"{next(iter(f))}-{i}" for i, (f, _, _) in enumerate(BAD_FIELDS)])
def test_a_bad_field_is_named_in_one_sentence(client, fields, param, words):
    response = client.post(URL, content=json.dumps({**SHORT, **fields}), headers=AS_JSON)
    error = response.json()["error"]
    assert response.status_code == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"red heart", b'"red heart"', b"[]", b"\xff\xfe", b'{"prompt": "a", "guidance_scale": NaN}', b"[" * 19_000],
)
def test_a_body_other_than_a_json_object_is_refused(client, body):
    response = client.post(URL, content=body, headers=AS_JSON)
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_infinite_guidance_is_refused(client):
    response = client.post(URL, content=b'{"prompt": "a", "guidance_scale": 1e999}', headers=AS_JSON)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "guidance_scale")


def test_an_unknown_model_address_or_method_has_its_status(client):
    response = client.post(URL, json={**SHORT, "model": "dall-e-3"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert client.get("/v1/nothing").status_code == 404
    assert client.get(URL).json()["error"]["message"] == "This address does not support that method."


def test_a_large_body_is_refused_announced_or_not(client):
    def pieces():
        for _ in range(30):
            yield b" " * 1000

    for content in (b" " * 30_000, pieces()):
        response = client.post(URL, content=content, headers=AS_JSON)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")


def test_a_request_to_another_host_name_is_refused(client):
    response = client.get("/health", headers={"Host": "pictures.example"})
    assert response.status_code == 403


POSTS = [URL, "/api/jobs", "/api/budget", "/api/explanations"]


@pytest.mark.parametrize("address", POSTS)
@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "text/plain; a=application/json"])
def test_other_content_types_are_refused(client, address, kind):
    response = client.post(address, content=json.dumps(SHORT), headers={} if kind is None else {"Content-Type": kind})
    assert (response.status_code, response.json()["error"]["code"]) == (415, "not_json")


PAGES = ["runs", "run-states", "explanations"]
FOREIGN = [
    {"Origin": "https://pictures.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1"},  # another port
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=lambda headers: next(iter(headers.values())))
def test_requests_on_behalf_of_another_site_are_refused(place, client, headers):
    queue, _ = place
    for method, address in [
        *(("POST", address) for address in POSTS),
        ("DELETE", "/api/jobs/a"),
        *(("GET", f"/api/{place}/a") for place in PAGES),
    ]:
        response = client.request(method, address, json=SHORT, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "wrong_origin"), address
    assert len(queue) == 0
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200  # another site may link to the page


def test_an_origin_that_only_begins_like_the_own_one_is_foreign(client, place):
    for origin in (f"{place[1]}0", f"{place[1]}.pictures.example"):
        response = client.post("/api/budget", json={"dollars": -1}, headers={"Origin": origin})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "wrong_origin"), origin


def test_requests_of_the_own_page_and_of_programs_are_served(client, place):
    budget = {"dollars": -1}  # invalid, which is found out only after the checks
    for headers in ({"Origin": place[1], "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}, {}):
        for kind in ("application/json", "Application/JSON; charset=utf-8"):
            response = client.post("/api/budget", content=json.dumps(budget), headers={**headers, "Content-Type": kind})
            assert (response.status_code, "--dollars is -1" in response.text) == (400, True)


def test_a_lone_surrogate_is_no_internal_error(client):
    response = client.post("/api/budget", content=b'{"recipe": "emoji.yaml", "chip": "\\ud800"}', headers=AS_JSON)
    assert (response.status_code, "no chip named ?" in response.text) == (400, True)


async def post(url: str, fields: dict) -> tuple[int, dict[str, str], dict]:
    """Send a request over a connection of its own, without httpx: 200 clients of httpx take longer than the server under test."""
    reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
    content = json.dumps(fields).encode()
    kind = "Connection: close\r\nContent-Type: application/json\r\n"
    head = f"POST {URL} HTTP/1.1\r\nHost: 127.0.0.1\r\n{kind}Content-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    top, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    first, *lines = top.decode().split("\r\n")
    return int(first.split()[1]), {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}, json.loads(body)


def test_two_hundred_clients_at_once_are_all_served_in_bounded_memory(place):
    queue, url = place
    longest, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            longest[0] = max(longest[0], len(queue))

    refused = []

    async def ask(number: int) -> bytes:
        while True:
            status, headers, body = await post(url, {**QUICK, "prompt": f"heart {number}", "seed": number})
            if status == 200:
                return base64.b64decode(body["data"][0]["b64_json"])
            assert status == 429, body
            assert int(headers["retry-after"]) >= 1
            refused.append(number)
            await asyncio.sleep(random.uniform(1, 2))  # sooner than Retry-After says, for more load

    async def all_of_them() -> list[bytes]:
        return await asyncio.gather(*(ask(number) for number in range(CLIENTS)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    files = asyncio.run(all_of_them())
    stop.set()
    watcher.join()
    prompts = [Image.open(io.BytesIO(file)).info["prompt"] for file in files]
    assert prompts == [f"heart {number}" for number in range(CLIENTS)]
    assert refused
    assert 0 < longest[0] <= 32
    assert len(queue) == 0


def test_the_job_of_a_client_that_disconnects_is_cancelled(place):
    queue, url = place
    jobs, add = [], queue.add
    queue.add = lambda drawing: jobs.append(add(drawing)) or jobs[-1]
    try:
        with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.5) as client:
            client.post(url + URL, json={**SHORT, "steps": 1000, "n": 16})
        assert jobs[0].ended.wait(HANG)
        assert jobs[0].state == "cancelled"
    finally:
        del queue.add


def test_an_internal_error_is_a_sentence_and_in_the_log(place, client, caplog):
    queue, _ = place
    queue.add = lambda drawing: 1 / 0
    try:
        response = client.post(URL, json=SHORT)
    finally:
        del queue.add
    assert (response.status_code, response.json()["error"]["message"]) == (500, INTERNAL_ERROR)
    assert "ZeroDivisionError" in caplog.text


def test_waiting_clients_get_an_error_when_the_server_ends(tiny):
    queue = WorkQueue({"tiny": tiny}, 4)
    responses = []
    with served(web_app(queue)) as url:
        long = queue.add(JobSpec("tiny", "red heart", LONG, count=16))
        client = threading.Thread(target=lambda: responses.append(httpx.post(url + URL, json=SHORT, timeout=HANG)))
        client.start()
        while not len(queue):
            threading.Event().wait(0.01)
    client.join(HANG)
    assert long.state == "cancelled"
    assert (responses[0].status_code, responses[0].headers["Retry-After"]) == (503, "2")
    assert "shutting down" in responses[0].json()["error"]["message"]
