"""Against the real server, on a free port of this machine."""

import http.client
import io
import json
import re
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
from microdit.evaluation.preference.votes import HUMAN, MOST_CONNECTIONS, PAGE, collect_votes, url_of, vote_server
from tests.evaluation.preference.test_verdicts_preference import lines_of, write_folders

JSON = {"Content-Type": "application/json"}


class Browser:
    """What the page does, without a screen."""

    def __init__(self, url: str):
        self.address = url.removeprefix("http://").rstrip("/")

    def send(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.address, timeout=600)
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, content

    def next(self) -> dict:
        return json.loads(self.send("GET", "/next")[1])

    def vote(self, question: object, choice: object) -> tuple[int, bytes]:
        return self.send("POST", "/vote", json.dumps({"question": question, "choice": choice}).encode(), JSON)

    def likes_red(self, state: dict) -> dict:
        """Look at both pictures, as they are shown, and vote for the red one, which is A's."""
        first, second = (is_red(self.send("GET", f"/picture/{state['question']}/{side}")[1]) for side in ("first", "second"))
        assert first != second
        return json.loads(self.vote(state["question"], "first" if first else "second")[1])


def is_red(png: bytes) -> bool:
    return Image.open(io.BytesIO(png)).getpixel((0, 0))[0] == 255


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return random_order(read_pairs(*write_folders(tmp_path, 6)), seed=3)


@contextmanager
def serving(file: VerdictFile) -> Iterator[Browser]:
    with vote_server(file) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Browser(url_of(server))
        server.shutdown()
        thread.join()
    file.close()


def test_votes_of_a_person_who_likes_a_are_all_for_a_wherever_it_stands(questions, tmp_path):
    path, ready, told, results = tmp_path / "verdicts.jsonl", threading.Event(), [], []
    urls: list[str] = []

    def on_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    file = VerdictFile(path, questions, HUMAN)
    thread = threading.Thread(target=lambda: results.append(collect_votes(file, 0, on_ready, told.append)), daemon=True)
    thread.start()
    assert ready.wait(600)
    browser = Browser(urls[0])
    state = browser.next()
    assert (state["done"], state["total"]) == (0, 6)
    while "question" in state:
        state = browser.likes_red(state)
    assert state == {"done": 6, "total": 6}
    thread.join(600)
    result: Preference = results[0]
    assert (result.win_rate, result.pairs, result.consistency) == (1.0, 6, None)
    lines = lines_of(path)
    assert sorted(line["pair"] for line in lines) == list(range(6))
    assert {line["order"] for line in lines} == {"AB", "BA"}
    assert {line["answer"] for line in lines} == {"first", "second"}
    assert all((line["verdict"], line["model"], line["tokens"]) == ("A", "human", 0) for line in lines)
    assert len(told) == 6
    file.close()
    file = VerdictFile(path, questions, HUMAN)  # with nothing left to vote on, no page is served
    assert collect_votes(file, 0, on_ready) == result
    assert len(urls) == 1


def test_a_reload_shows_the_same_pair_and_a_restart_the_next(questions, tmp_path):
    path = tmp_path / "verdicts.jsonl"
    with serving(VerdictFile(path, questions, HUMAN)) as browser:
        first = browser.next()
        assert browser.next() == first
        second = json.loads(browser.vote(first["question"], "tie")[1])
        assert second["question"] != first["question"]
    with serving(VerdictFile(path, questions, HUMAN)) as browser:
        assert browser.next() == second
    assert [line["verdict"] for line in lines_of(path)] == ["tie"]


def test_the_second_vote_on_a_pair_does_not_count(questions, tmp_path):
    path = tmp_path / "verdicts.jsonl"
    with serving(VerdictFile(path, questions, HUMAN)) as browser:
        assert browser.vote(0, "tie")[0] == 200
        status, sentence = browser.vote(0, "first")
    assert (status, sentence) == (409, b"Question 0 has its vote already: the first one counts.")
    assert [line["answer"] for line in lines_of(path)] == ["tie"]


def test_many_votes_at_once_are_each_kept_once(questions, tmp_path):
    path = tmp_path / "verdicts.jsonl"
    statuses = []
    with serving(VerdictFile(path, questions, HUMAN)) as browser:
        threads = [threading.Thread(target=lambda i=i: statuses.append(browser.vote(i % 5, "tie")[0])) for i in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(statuses) == [200] * 5 + [409] * 15
    assert sorted(line["pair"] for line in lines_of(path)) == sorted(question.pair.index for question in questions[:5])


CHILD = """
import sys
from pathlib import Path
from microdit.evaluation.preference.verdicts import VerdictFile, random_order, read_pairs
from microdit.evaluation.preference.votes import collect_votes
root = Path(sys.argv[1])
file = VerdictFile(root / "verdicts.jsonl", random_order(read_pairs(root / "a", root / "b"), seed=3), "human")
print(collect_votes(file, 0, lambda url: print(url, flush=True)))
"""


def test_a_killed_server_has_kept_each_vote_and_ctrl_c_says_what_there_is(questions, tmp_path):
    def start() -> tuple[subprocess.Popen[str], Browser]:
        command = [sys.executable, "-c", CHILD, str(tmp_path)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return child, Browser(child.stdout.readline().strip())

    child, browser = start()
    state = browser.likes_red(browser.likes_red(browser.next()))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert len(lines_of(tmp_path / "verdicts.jsonl")) == 2
    child, browser = start()
    assert browser.next() == state
    browser.likes_red(state)
    child.send_signal(signal.SIGINT)
    seen = child.communicate(timeout=600)[0]
    assert child.returncode == 0, seen
    assert "win_rate=1.0" in seen
    assert "pairs=3" in seen


@pytest.mark.parametrize(
    "path",
    [
        "/picture/0/third",
        "/picture/6/first",
        "/picture/-1/first",
        "/picture/0/first/..",
        "/picture/..%2f..%2fetc/passwd",
        "/picture/../../verdicts.jsonl",
        "/../verdicts.jsonl",
        "/verdicts.jsonl",
        "/etc/passwd",
        "//etc/passwd",
        "/picture/%D9%A0/first",
        "/picture/99999999999999999999/first",
    ],
)
def test_nothing_but_the_pictures_can_be_fetched(questions, tmp_path, path):
    with serving(VerdictFile(tmp_path / "verdicts.jsonl", questions, HUMAN)) as browser:
        connection = socket.create_connection(browser.address.split(":"))
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode("latin-1"))
        answer = connection.makefile("rb").read()
        connection.close()
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert answer.endswith(b"There is nothing at this address: the page is at /.")


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/vote", b"{", JSON, 400),
        ("POST", "/vote", b"\xff", JSON, 400),
        ("POST", "/vote", b"[]", JSON, 400),
        ("POST", "/vote", b"[" * 1000, JSON, 400),
        ("POST", "/vote", b'{"question": 0}', JSON, 400),
        ("POST", "/vote", b'{"question": 6, "choice": "tie"}', JSON, 400),
        ("POST", "/vote", b'{"question": -1, "choice": "tie"}', JSON, 400),
        ("POST", "/vote", b'{"question": true, "choice": "tie"}', JSON, 400),
        ("POST", "/vote", b'{"question": "0", "choice": "tie"}', JSON, 400),
        ("POST", "/vote", b'{"question": 0, "choice": "unclear"}', JSON, 400),
        ("POST", "/vote", b'{"question": 0, "choice": ["tie"]}', JSON, 400),
        ("POST", "/vote", b'{"question": 0, "choice": "tie"}', {"Content-Type": "text/plain"}, 415),
        ("POST", "/vote", b'{"question": 0, "choice": "tie"}', {**JSON, "Host": "evil.example"}, 403),
        ("POST", "/vote", b"{}", {**JSON, "Content-Length": "-1"}, 411),
        ("POST", "/vote", b"{}", {**JSON, "Content-Length": "100000000"}, 413),
        ("POST", "/", b"{}", JSON, 404),
        ("GET", "/next", None, {"Host": "evil.example"}, 403),
        ("PUT", "/vote", b"{}", JSON, 405),
        ("HEAD", "/", None, {}, 405),
        ("GET", "/", None, {"X": "y" * 70_000}, 431),
    ],
)
def test_bad_requests_get_a_sentence_and_leave_no_vote(questions, tmp_path, method, path, body, headers, status):
    with serving(VerdictFile(tmp_path / "verdicts.jsonl", questions, HUMAN)) as browser:
        got, sentence = browser.send(method, path, body, headers)
        assert browser.next()["done"] == 0
    assert got == status
    assert method == "HEAD" or sentence.endswith(b".")
    assert (tmp_path / "verdicts.jsonl").read_bytes() == b""


def test_the_page_is_whole_and_says_nothing_of_the_models(questions, tmp_path):
    with serving(VerdictFile(tmp_path / "verdicts.jsonl", questions, HUMAN)) as browser:
        assert browser.send("GET", "/") == (200, PAGE.encode())
        assert set(browser.next()) == {"done", "total", "question", "prompt"}
    assert not re.search(r"https?:|//\w|@import", PAGE)
    for needed in ('name="viewport"', "ArrowLeft", "ArrowRight", '" ": "tie"'):
        assert needed in PAGE


def test_a_port_that_is_taken_is_said_in_a_sentence(questions, tmp_path):
    file = VerdictFile(tmp_path / "verdicts.jsonl", questions, HUMAN)
    with vote_server(file) as server, pytest.raises(UserError, match=r"Port \d+ of 127.0.0.1 cannot be had"):
        vote_server(file, server.server_address[1])


def test_idle_connections_are_bounded_and_votes_go_on(questions, tmp_path):
    with serving(VerdictFile(tmp_path / "verdicts.jsonl", questions, HUMAN)) as browser:
        host, port = browser.address.split(":")
        idle = [socket.create_connection((host, int(port)), timeout=600) for _ in range(MOST_CONNECTIONS)]
        late = socket.create_connection((host, int(port)), timeout=600)
        assert late.recv(1) == b""  # closed at once; the others still wait for their requests
        for connection in (late, *idle):
            connection.close()
        while True:  # until a place is free
            try:
                assert browser.next()["done"] == 0
                break
            except (ConnectionError, http.client.HTTPException):
                continue
