"""The API of the vote page: a real server on a free port of this machine."""

import http.client
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from microdit.errors import UserError
from microdit.evaluation.preference.verdicts import Preference, Question, VerdictFile, random_order, read_pairs
from microdit.evaluation.preference.votes import HUMAN, VotingSession
from microdit.serve.connections import LIMITS, Limits
from microdit.serve.server import STATIC, listen
from microdit.serve.votes_api import collect_votes, vote_server
from tests.evaluation.preference.test_verdicts_preference import lines_of, write_folders
from tests.serve.serving import running
from tests.serve.test_connections import is_closed
from tests.training.processes import start, wait_for

JSON = {"Content-Type": "application/json"}
TIE = b'{"question": 0, "choice": "tie"}'


class Client:
    """Sends the requests of the page's script."""

    def __init__(self, url: str):
        self.address = url.removeprefix("http://")

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, port = self.address.split(":")
        return host, int(port)

    def send(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.address, timeout=600)
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, content

    def state(self) -> dict:
        return json.loads(self.send("GET", "/api/state")[1])

    def vote(self, question: object, choice: object) -> tuple[int, dict]:
        status, content = self.send("POST", "/api/votes", json.dumps({"question": question, "choice": choice}).encode(), JSON)
        return status, json.loads(content)

    def vote_for_red(self, state: dict) -> dict:
        """Look at both images, as they are shown, and vote for the red one, which is A's."""
        first, second = (is_red(self.send("GET", f"/api/images/{state['question']}/{side}")[1]) for side in ("first", "second"))
        assert first != second
        return self.vote(state["question"], "first" if first else "second")[1]


def is_red(png: bytes) -> bool:
    return Image.open(io.BytesIO(png)).getpixel((0, 0))[0] == 255


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return random_order(read_pairs(*write_folders(tmp_path, 6)), seed=3)


@contextmanager
def serving(file: VerdictFile, limits: Limits = LIMITS) -> Iterator[Client]:
    with running(vote_server(VotingSession(file), limits)) as url:
        yield Client(url)
    file.close()


@pytest.fixture
def client(questions: list[Question], tmp_path: Path) -> Iterator[Client]:
    with serving(VerdictFile(tmp_path / "verdicts.jsonl", questions, HUMAN)) as client:
        yield client


def test_votes_of_a_person_who_likes_a_are_all_for_a_wherever_it_stands(questions, tmp_path):
    path, ready, results = tmp_path / "verdicts.jsonl", threading.Event(), []
    urls: list[str] = []

    def on_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    file = VerdictFile(path, questions, HUMAN)
    thread = threading.Thread(target=lambda: results.append(collect_votes(file, 0, on_ready)), daemon=True)
    thread.start()
    assert ready.wait(600)
    client = Client(urls[0])
    state = client.state()
    assert (state["done"], state["total"]) == (0, 6)
    while "question" in state:
        state = client.vote_for_red(state)
    assert state == {"done": 6, "total": 6}
    thread.join(600)
    result: Preference = results[0]
    assert (result.win_rate, result.pairs, result.consistency) == (1.0, 6, None)
    lines = lines_of(path)
    assert sorted(line["pair"] for line in lines) == list(range(6))
    assert {line["order"] for line in lines} == {"AB", "BA"}
    assert {line["answer"] for line in lines} == {"first", "second"}
    assert all((line["verdict"], line["model"], line["tokens"]) == ("A", "human", 0) for line in lines)
    file.close()
    file = VerdictFile(path, questions, HUMAN)  # with nothing left to vote on, no page is served
    assert collect_votes(file, 0, on_ready) == result
    assert len(urls) == 1


def test_a_reload_shows_the_same_pair_and_a_restart_the_next(questions, tmp_path):
    path = tmp_path / "verdicts.jsonl"
    with serving(VerdictFile(path, questions, HUMAN)) as client:
        first = client.state()
        assert client.state() == first
        second = client.vote(first["question"], "tie")[1]
        assert second["question"] != first["question"]
    with serving(VerdictFile(path, questions, HUMAN)) as client:
        assert client.state() == second
    assert [line["verdict"] for line in lines_of(path)] == ["tie"]


def test_the_second_vote_on_a_pair_does_not_count(client, tmp_path):
    assert client.vote(0, "tie")[0] == 200
    status, content = client.vote(0, "first")
    assert (status, content["error"]["message"]) == (409, "Question 0 has its vote already: the first one counts.")
    assert [line["answer"] for line in lines_of(tmp_path / "verdicts.jsonl")] == ["tie"]


def test_many_votes_at_once_are_each_kept_once(client, questions, tmp_path):
    statuses = []
    threads = [threading.Thread(target=lambda i=i: statuses.append(client.vote(i % 5, "tie")[0])) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] * 5 + [409] * 15
    pairs = sorted(line["pair"] for line in lines_of(tmp_path / "verdicts.jsonl"))
    assert pairs == sorted(question.pair.index for question in questions[:5])


CHILD = """
import sys
from pathlib import Path
from microdit.evaluation.preference.verdicts import VerdictFile, random_order, read_pairs
from microdit.serve.votes_api import collect_votes
assert "torch" not in sys.modules, "the vote page needs no model"
root = Path(sys.argv[1])
file = VerdictFile(root / "verdicts.jsonl", random_order(read_pairs(root / "a", root / "b"), seed=3), "human")
print(collect_votes(file, 0, lambda url: print(url, flush=True)))
"""


def test_a_killed_server_has_kept_each_vote_and_ctrl_c_ends_in_a_summary(questions, tmp_path):
    def start_child() -> tuple[subprocess.Popen[str], Client]:
        command = [sys.executable, "-c", CHILD, str(tmp_path)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return child, Client(child.stdout.readline().strip())

    child, client = start_child()
    state = client.vote_for_red(client.vote_for_red(client.state()))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert len(lines_of(tmp_path / "verdicts.jsonl")) == 2
    child, client = start_child()
    assert client.state() == state
    client.vote_for_red(state)
    child.send_signal(signal.SIGINT)
    seen = child.communicate(timeout=600)[0]
    assert child.returncode == 0, seen
    assert "win_rate=1.0" in seen
    assert "pairs=3" in seen


def test_the_command_serves_the_page_until_ctrl_c(questions, tmp_path):
    process = start(tmp_path / ".logs", ["prefer", "a", "b", "--vote", "--port", 0], cwd=tmp_path)
    try:
        wait_for(lambda: "Ctrl-C" in process.output, process)
        client = Client(re.search(r"http://127\.0\.0\.1:\d+", process.output)[0])
        client.vote_for_red(client.state())
        os.kill(process.processes[0].pid, signal.SIGINT)
        assert process.wait() == [0]
    finally:
        process.kill()
    assert '"a_wins": 1' in process.output
    assert "Traceback" not in process.output
    assert len(lines_of(tmp_path / "preference" / "verdicts.jsonl")) == 1


@pytest.mark.parametrize(
    "path",
    [
        "/api/images/0/third",
        "/api/images/6/first",
        "/api/images/-1/first",
        "/api/images/0/first/..",
        "/api/images/..%2f..%2fetc/passwd",
        "/api/images/../../verdicts.jsonl",
        "/../verdicts.jsonl",
        "/verdicts.jsonl",
        "/page.html",
        "/etc/passwd",
        "//etc/passwd",
        "/api/images/%D9%A0/first",
        "/api/images/99999999999999999999/first",
        f"/api/images/{'9' * 5000}/first",
    ],
)
def test_nothing_but_the_images_can_be_fetched(client, path):
    connection = socket.create_connection(client.host_and_port)
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode("latin-1"))
    response = connection.makefile("rb").read()
    connection.close()
    assert response.startswith(b"HTTP/1.1 404 ")
    message = json.loads(response.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert message in ("There is nothing at this address.", "There is no such image.")


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/api/votes", b"{", JSON, 400),
        ("POST", "/api/votes", b"\xff", JSON, 400),
        ("POST", "/api/votes", b"[]", JSON, 400),
        ("POST", "/api/votes", b"[" * 1000, JSON, 400),
        ("POST", "/api/votes", None, JSON, 400),
        ("POST", "/api/votes", b'{"question": 0}', JSON, 400),
        ("POST", "/api/votes", b'{"question": 6, "choice": "tie"}', JSON, 400),
        ("POST", "/api/votes", b'{"question": -1, "choice": "tie"}', JSON, 400),
        ("POST", "/api/votes", b'{"question": true, "choice": "tie"}', JSON, 400),
        ("POST", "/api/votes", b'{"question": "0", "choice": "tie"}', JSON, 400),
        ("POST", "/api/votes", b'{"question": 1e400, "choice": "tie"}', JSON, 400),
        ("POST", "/api/votes", b'{"question": 0, "choice": "unclear"}', JSON, 400),
        ("POST", "/api/votes", b'{"question": 0, "choice": ["tie"]}', JSON, 400),
        ("POST", "/api/votes", b'{"question": 0, "choice": "\\ud800"}', JSON, 400),
        ("POST", "/api/votes", TIE, {"Content-Type": "text/plain"}, 415),
        ("POST", "/api/votes", TIE, {}, 415),
        ("POST", "/api/votes", TIE, {**JSON, "Host": "evil.example"}, 403),
        ("POST", "/api/votes", TIE, {**JSON, "Origin": "http://evil.example"}, 403),
        ("POST", "/api/votes", TIE, {**JSON, "Origin": "http://127.0.0.1"}, 403),
        ("POST", "/api/votes", TIE, {**JSON, "Origin": "null"}, 403),
        ("POST", "/api/votes", TIE, {**JSON, "Sec-Fetch-Site": "cross-site"}, 403),
        ("GET", "/api/state", None, {"Sec-Fetch-Site": "cross-site"}, 403),
        ("GET", "/api/images/0/first", None, {"Sec-Fetch-Site": "cross-site"}, 403),
        ("POST", "/api/votes", None, {**JSON, "Content-Length": "-1"}, 400),  # a body that stays unread would reset the connection
        ("POST", "/api/votes", b"{}", {**JSON, "Content-Length": "100000000"}, 413),
        ("POST", "/", b"{}", JSON, 405),
        ("POST", "/verdicts.jsonl", b"{}", JSON, 404),
        ("GET", "/api/state", None, {"Host": "evil.example"}, 403),
        ("PUT", "/api/votes", TIE, JSON, 405),
        ("HEAD", "/", None, {}, 405),
    ],
)
def test_bad_requests_get_a_sentence_and_leave_no_vote(client, tmp_path, method, path, body, headers, status):
    got, content = client.send(method, path, body, headers)
    assert client.state()["done"] == 0
    assert got == status
    if content.startswith(b"{"):
        assert re.fullmatch(r"[^\n]+\.", json.loads(content)["error"]["message"])
    else:  # malformed HTTP is refused before the application sees it
        assert (status, content) in ((400, b"Invalid HTTP request received."), (405, b""))
    assert (tmp_path / "verdicts.jsonl").read_bytes() == b""


def test_headers_without_end_are_refused(client):
    connection = socket.create_connection(client.host_and_port)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 20_000)
    assert connection.makefile("rb").read().startswith(b"HTTP/1.1 400 ")
    connection.close()
    assert client.state()["done"] == 0


def test_the_own_page_may_vote(client, tmp_path):
    headers = {**JSON, "Origin": f"http://{client.address}", "Sec-Fetch-Site": "same-origin"}
    assert client.send("POST", "/api/votes", TIE, headers)[0] == 200
    assert len(lines_of(tmp_path / "verdicts.jsonl")) == 1


def test_the_page_is_whole_and_says_nothing_of_the_models(client):
    for path, name in (("/", "votes.html"), ("/votes.js", "votes.js"), ("/votes.css", "votes.css")):
        status, content = client.send("GET", path)
        assert (status, content) == (200, (STATIC / name).read_bytes())
        assert not re.search(rb"https?:|//\w|@import", content)
    assert set(client.state()) == {"done", "total", "question", "prompt"}
    page, script = (STATIC / "votes.html").read_text(), (STATIC / "votes.js").read_text()
    for needed in ("ArrowLeft", "ArrowRight", '" ": "tie"'):
        assert needed in script
    assert 'name="viewport"' in page


def test_an_image_reveals_neither_a_file_name_nor_a_date(client):
    connection = http.client.HTTPConnection(client.address, timeout=600)
    connection.request("GET", "/api/images/0/first")
    headers = {name.lower() for name, _ in connection.getresponse().getheaders()}
    connection.close()
    assert headers == {"date", "content-type", "content-length", "cache-control", "x-content-type-options"}


def test_half_a_character_in_a_prompt_is_shown_as_a_question_mark(tmp_path):
    folders = write_folders(tmp_path, 1)
    for folder in folders:
        (folder / "prompts.jsonl").write_text('{"prompt": "half \\ud83d a letter"}\n')
    file = VerdictFile(tmp_path / "verdicts.jsonl", random_order(read_pairs(*folders), seed=3), HUMAN)
    with serving(file) as client:
        assert client.state() == {"done": 0, "total": 1, "question": 0, "prompt": "half ? a letter"}


def test_an_image_that_was_removed_is_said_in_a_sentence(client, questions):
    image = questions[0].pictures()[0]
    for change in (image.unlink, image.mkdir):
        change()
        status, content = client.send("GET", "/api/images/0/first")
        sentence = "The image was removed, or cannot be read any more, since the server was started."
        assert (status, json.loads(content)["error"]["message"]) == (404, sentence)
    assert client.send("GET", "/api/images/0/second")[0] == 200


def test_a_full_disk_is_said_in_a_sentence_and_the_vote_can_be_repeated(client, tmp_path):
    """A limit on the size of files stands in for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[0][1]))
    try:
        status, content = client.vote(0, "first")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    assert status == 507
    assert "Free some space and run the same command again." in content["error"]["message"]
    assert (tmp_path / "verdicts.jsonl").read_bytes() == b""
    assert client.vote(0, "first")[0] == 200
    assert [line["answer"] for line in lines_of(tmp_path / "verdicts.jsonl")] == ["first"]


def test_a_port_that_is_taken_is_said_in_a_sentence(questions, tmp_path):
    file = VerdictFile(tmp_path / "verdicts.jsonl", questions, HUMAN)
    with listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match=r"Cannot listen on 127\.0\.0\.1:\d+ .*: choose another --port\."):
        collect_votes(file, taken.getsockname()[1], pytest.fail)


HALVES = {
    "nothing": b"",
    "headers": b"POST /api/votes HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: ",
    "a body": b"POST /api/votes HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 33\r\n\r\n" + TIE[:20],
}


def test_half_sent_votes_time_out_and_do_not_count(questions, tmp_path):
    limits = Limits(header_seconds=0.2, body_seconds=0.2, keep_alive_seconds=1)
    with serving(VerdictFile(tmp_path / "verdicts.jsonl", questions, HUMAN), limits) as client:
        connections = {name: socket.create_connection(client.host_and_port, timeout=600) for name in HALVES}
        for name, half in HALVES.items():
            connections[name].sendall(half)
        assert [name for name, connection in connections.items() if not is_closed(connection)] == []
        assert client.state()["done"] == 0


def test_idle_connections_are_bounded_and_votes_go_on(questions, tmp_path):
    limits = Limits(connections=4, header_seconds=3600)
    with serving(VerdictFile(tmp_path / "verdicts.jsonl", questions, HUMAN), limits) as client:
        idle = [socket.create_connection(client.host_and_port, timeout=600) for _ in range(12)]
        assert all(is_closed(connection) for connection in idle[:8])
        assert client.vote(0, "tie")[0] == 200
        for connection in idle:
            connection.close()
