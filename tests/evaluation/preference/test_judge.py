"""The vision model as the judge: a real server on this machine, with scripted responses and faults."""

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from microdit.errors import UserError
from microdit.evaluation.chat.client import LONGEST_ANSWER, estimate
from microdit.evaluation.chat.request_log import REQUESTS, Answer, Exchange, RequestLog
from microdit.evaluation.preference.judge import VisionJudge, _mark, judge_all, read_choice
from microdit.evaluation.preference.verdicts import VerdictFile, both_orders, read_pairs
from tests.evaluation.preference.test_verdicts_preference import lines_of, write_folders

KEY = "sk-very-secret-0123456789"


class ScriptedServer(ThreadingHTTPServer):
    """Calls `script(number, order)` for each request: it returns the judge's answer, or writes its own response to the handler."""

    def __init__(self, script: Callable[["Handler", int, str], str | None]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.lock = threading.Lock()
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.requests: Counter[tuple[str, str]] = Counter()  # each is billed, whether its response arrives or not
        self.answered: Counter[tuple[str, str]] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: object) -> None:
        """Print nothing for clients that were killed."""


class Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        first, second = (_picture(part) for part in body["messages"][0]["content"] if part["type"] == "image_url")
        order = "AB" if first.getpixel((0, 0))[0] == 255 else "BA"
        assert second.getpixel((0, 0))[2 if order == "AB" else 0] == 255
        key = (body["messages"][0]["content"][0]["text"].split("\n")[2], order)
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append({"path": self.path, **self.headers})
            self.server.requests[key] += 1
            number = len(self.server.bodies) - 1
        words = self.server.script(self, number, order)
        if words is not None:
            completion = {"choices": [{"message": {"role": "assistant", "content": words}}], "usage": {"total_tokens": 100}}
            self.send(200, json.dumps(completion))
            with self.server.lock:
                self.server.answered[key] += 1

    def send(self, status: int, text: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def _picture(part: dict) -> Image.Image:
    prefix, _, data = part["image_url"]["url"].partition(",")
    assert prefix == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@contextmanager
def serving(script: Callable[[Handler, int, str], str | None]) -> Iterator[ScriptedServer]:
    with ScriptedServer(script) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def perfect(handler: Handler, number: int, order: str) -> str:
    return "A" if order == "AB" else "B"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("MICRODIT_JUDGE_KEY", KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def questions(tmp_path):
    return both_orders(read_pairs(*write_folders(tmp_path, 12)))


@pytest.fixture
def pictures(questions):
    return questions[0].pair.a, questions[0].pair.b


def judge_at(url: str, **settings: float) -> VisionJudge:
    return VisionJudge(url, "eyes-1", **{"backoff": 0.001, "timeout": 600, **settings})


def new_exchange() -> Exchange:
    """Return an exchange without a log file."""
    return Exchange(lambda *_, **__: None)


def test_a_perfect_judge_gives_everything_to_the_better_model(questions, tmp_path):
    with serving(perfect) as server:
        result = judge_all(VerdictFile(tmp_path / "verdicts.jsonl", questions, "eyes-1"), judge_at(server.url))
    assert (result.win_rate, result.a_wins, result.consistency, result.tokens) == (1.0, 12, 1.0, 2400)
    assert set(server.requests.values()) == {1}
    assert len(server.requests) == 24
    body, headers = server.bodies[0], server.headers[0]
    assert body["model"] == "eyes-1"
    assert headers["path"] == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"


def test_a_judge_that_always_says_a_gives_half_and_never_agrees(questions, tmp_path):
    with serving(lambda *_: "A") as server:
        result = judge_all(VerdictFile(tmp_path / "verdicts.jsonl", questions, "eyes-1"), judge_at(server.url))
    assert (result.win_rate, result.disagreed, result.consistency) == (0.5, 12, 0.0)


def faulty(handler: Handler, number: int, order: str) -> str | None:
    """Let every second request fail, each time in another way."""
    fault = number // 2 % 7 if number % 2 == 0 else None
    if fault == 0:
        handler.send(500, "oh no")
    elif fault == 1:
        handler.send(429, '{"error": {"message": "slow down"}}', Retry_After="0")
    elif fault == 2:  # closed in the middle of the response
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [{"mess')
    elif fault == 3:  # closed before any response
        handler.connection.shutdown(socket.SHUT_RDWR)
    elif fault == 4:
        handler.send(200, '{"choices": [')
    elif fault == 5:
        handler.send(200, '{"choices": []}')
    elif fault == 6:
        handler.send(503, "", Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")
    else:
        return perfect(handler, number, order)
    return None


def test_transient_faults_lose_nothing_and_repeat_no_answered_question(questions, tmp_path):
    path = tmp_path / "verdicts.jsonl"
    with serving(faulty) as server:
        file = VerdictFile(path, questions, "eyes-1")
        result = judge_all(file, judge_at(server.url, retries=30), concurrency=3)
        requests = len(server.bodies)
        judge_all(file, judge_at(server.url))
    assert (result.win_rate, result.pairs, result.tokens) == (1.0, 12, 2400)
    assert len(server.bodies) == requests
    assert set(server.answered.values()) == {1}
    assert len(server.answered) == len(lines_of(path)) == 24


def test_requests_are_logged_before_sending_and_answers_on_arrival(questions, tmp_path):
    events: list[list[str]] = []

    def script(handler: Handler, number: int, order: str) -> str | None:
        events.append([line["event"] for line in lines_of(tmp_path / REQUESTS)])
        if number == 1:
            return handler.send(500, "oh no")
        return "I like cats." if number == 0 else "A"

    with serving(script) as server:
        judge_all(VerdictFile(tmp_path / "verdicts.jsonl", questions[:2], "eyes-1"), judge_at(server.url), concurrency=1)
    assert events == [
        ["sent"],
        ["sent", "answered", "sent"],
        ["sent", "answered", "sent", "failed", "sent"],
        ["sent", "answered", "sent", "failed", "sent", "answered", "sent"],
    ]


def test_answers_of_an_earlier_start_are_not_requested_again(questions, tmp_path):
    """Unreadable answers count among the three requests of a question; a clear answer whose verdict is missing yields the verdict."""
    marks = [_mark(question, "eyes-1") for question in questions[:4]]
    with RequestLog(tmp_path / REQUESTS, marks, "another") as log:
        for mark, words in zip(marks[:3], (["A"], ["Cats!"], ["Cats!", "Cats!"]), strict=True):
            for word in words:
                log.exchange(mark).sending()
                log.exchange(mark).answered(Answer(word, 100))
        log.exchange(marks[1]).sending()
        log.exchange(marks[3]).sending()
    warnings: list[str] = []
    with serving(lambda *_: "Dogs!") as server:
        file = VerdictFile(tmp_path / "verdicts.jsonl", questions[:4], "eyes-1")
        with pytest.raises(UserError, match="No pair has clear verdicts"):
            judge_all(file, judge_at(server.url), warn=warnings.append)
    assert len(server.bodies) == 0 + 2 + 1 + 3
    verdicts = {(line["pair"], line["order"]): line for line in lines_of(file.path)}
    assert [verdicts[question.pair.index, question.order]["tokens"] for question in questions[:4]] == [100, 300, 300, 300]
    assert verdicts[0, "AB"]["verdict"] == "A"
    assert warnings == [
        "2 requests were in flight when an earlier process ended: the same questions are sent again and may be billed twice."
    ]


ENDLESS = {200: f"more than {LONGEST_ANSWER:,} bytes, which is no chat completion", 400: ""}


@pytest.mark.parametrize("status", ENDLESS)
@pytest.mark.parametrize("chunk", [None, b"-1", b"-7fffffff", b"fffffffffffff", b"5f5e100"])
def test_an_endless_response_is_cut_off(pictures, status, chunk):
    """Chunks of negative sizes, too: http.client takes such a size, and its read() goes on to the end of the connection."""
    sent = 0

    def script(handler: Handler, number: int, order: str) -> None:
        nonlocal sent
        handler.send_response(status)
        if chunk is not None:
            handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        with contextlib.suppress(ConnectionError):
            if chunk is not None:
                handler.wfile.write(chunk + b"\r\n")
            for _ in range(1000):
                sent += handler.wfile.write(b" " * 100_000)

    with (
        serving(script) as server,
        pytest.raises(UserError, match=f"responds with status {status}: {ENDLESS[status]}"),
    ):
        judge_at(server.url)("a cat", *pictures, new_exchange())
    assert len(server.bodies) == 1
    assert sent < 50_000_000  # the buffers of the connection


DRIPS = {
    "header": b"HTTP/1.1 200 OK\r\nX-Slow: ",
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
    "refusal": b"HTTP/1.1 400 Bad\r\nContent-Length: 100000\r\n\r\n",
}


@pytest.mark.parametrize("place", DRIPS)
def test_a_server_that_sends_single_bytes_times_out(pictures, place):
    released = threading.Event()

    def script(handler: Handler, number: int, order: str) -> None:
        handler.wfile.write(DRIPS[place])
        with contextlib.suppress(ConnectionError):
            while not released.wait(0.02):
                handler.wfile.write(b"x")

    with serving(script) as server:
        with pytest.raises(UserError, match=r"breaks off: no whole answer within 0\.3 seconds\. Given up after 2 tries"):
            judge_at(server.url, longest=0.3, retries=1)("a cat", *pictures, new_exchange())
        released.set()


@pytest.mark.parametrize("status", [200, 400])
def test_a_response_nested_too_deeply_is_an_error_in_a_sentence(pictures, status):
    sentence = (
        r"its answer is no chat completion\. Given up after 2 tries" if status == 200 else r"responds with status 400: \{\"error\":\[\[\["
    )
    with (
        serving(lambda handler, *_: handler.send(status, '{"error":' + "[" * 100_000)) as server,
        pytest.raises(UserError, match=sentence),
    ):
        judge_at(server.url, retries=1)("a cat", *pictures, new_exchange())


def test_control_characters_of_a_server_are_escaped(pictures):
    words = json.dumps({"error": {"message": "bad \x1b[2J\r\n\u202e model"}})
    with serving(lambda handler, *_: handler.send(400, words)) as server, pytest.raises(UserError) as caught:
        judge_at(server.url)("a cat", *pictures, new_exchange())
    assert str(caught.value).endswith(r"responds with status 400: bad \u001b[2J \u202e model")


def test_a_slow_response_is_requested_again(pictures):
    released = threading.Event()

    def script(handler: Handler, number: int, order: str) -> str:
        if number == 0:
            released.wait()
        return perfect(handler, number, order)

    with serving(script) as server:
        reply = judge_at(server.url, timeout=0.5, retries=30)("a cat", *pictures, new_exchange())
        released.set()
    assert reply.choice == "first"
    assert len(server.bodies) > 1


@pytest.mark.parametrize(("nonsense", "choice", "tokens"), [(1, "first", 200), (2, "first", 300), (3, "unclear", 300)])
def test_after_three_unreadable_answers_the_choice_is_unclear(pictures, nonsense, choice, tokens):
    with serving(lambda handler, number, order: "I like cats." if number < nonsense else "A") as server:
        reply = judge_at(server.url)("a cat", *pictures, new_exchange())
    assert (reply.choice, reply.tokens, len(server.bodies)) == (choice, tokens, tokens // 100)
    assert reply.answer == ("I like cats." if choice == "unclear" else "A")


def test_concurrent_requests_are_bounded(questions, tmp_path):
    running, most, lock = 0, 0, threading.Lock()
    met = threading.Barrier(3)  # three at a time do come, or this breaks

    def script(handler: Handler, number: int, order: str) -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        met.wait(600)
        with lock:
            running -= 1
        return perfect(handler, number, order)

    with serving(script) as server:
        judge_all(VerdictFile(tmp_path / "verdicts.jsonl", questions, "eyes-1"), judge_at(server.url), concurrency=3)
    assert most == 3


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (401, f'{{"error": {{"message": "Incorrect API key {KEY}"}}}}', r"refuses the key \(401\): set MICRODIT_JUDGE_KEY"),
        (403, "", r"refuses the key \(403\)"),
        (404, '{"error": {"message": "no such model"}}', r"has no model 'eyes-1', .* \(404\): no such model"),
        (400, json.dumps({"error": {"message": f"bad {KEY} " + "x" * 1000}}), r"responds with status 400: bad \*\*\* x{100,200}\.\.\.$"),
        (302, "", r"has moved \(302\)"),  # which urllib alone would follow, with the key
        (307, "", r"has moved \(307\)"),
    ],
)
def test_lasting_errors_are_one_sentence_without_retries(pictures, status, body, sentence):
    elsewhere = {"Location": "http://127.0.0.1:1/"} if status < 400 else {}
    with serving(lambda handler, *_: handler.send(status, body, **elsewhere)) as server, pytest.raises(UserError, match=sentence) as caught:
        judge_at(server.url)("a cat", *pictures, new_exchange())
    assert len(server.bodies) == 1
    assert KEY not in str(caught.value)


def test_repeated_faults_are_given_up(pictures):
    with (
        serving(lambda handler, *_: handler.send(500, "oh no")) as server,
        pytest.raises(UserError, match="responds with status 500: oh no Given up after 3 tries"),
    ):
        judge_at(server.url, retries=2)("a cat", *pictures, new_exchange())
    assert len(server.bodies) == 3
    with pytest.raises(UserError, match=r"cannot be reached or breaks off: Connection refused\. Given up after 2 tries"):
        judge_at(server.url, retries=1)("a cat", *pictures, new_exchange())


@pytest.mark.parametrize("body", ["{", '{"choices": [{"message": {"content": "A"}}]}'])
def test_a_response_that_ends_early_is_requested_again(pictures, body):
    def script(handler: Handler, number: int, order: str) -> str | None:
        if number:
            return perfect(handler, number, order)
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + body.encode())
        handler.close_connection = True
        return None

    with serving(script) as server:
        assert judge_at(server.url)("a cat", *pictures, new_exchange()).choice == "first"
    assert len(server.bodies) == 2


@pytest.mark.parametrize("tokens", ["-5", "true", "9" * 4299, "1e400", "null", '"5"', "[]"])
def test_strange_numbers_of_tokens_count_as_none(pictures, tokens):
    body = '{"choices": [{"message": {"content": "A"}}], "usage": {"total_tokens": TOKENS}}'.replace("TOKENS", tokens)
    with serving(lambda handler, *_: handler.send(200, body)) as server:
        assert judge_at(server.url)("a cat", *pictures, new_exchange()).tokens == 0


STRANGE_WAITS = (
    "Fri, 31 Dec 2020 23:59:59 +9999999999999999999999999",
    "Mon, 01 Jan 99999999999 00:00:00 GMT",
    "1 2 3 4 5 6",
    "nan",
    "-inf",
    "",
)


@pytest.mark.parametrize("header", STRANGE_WAITS)
def test_a_retry_after_that_makes_no_sense_is_passed_over(pictures, header):
    with serving(lambda handler, *_: handler.send(429, "quota", Retry_After=header)) as server, pytest.raises(UserError, match="Given up"):
        judge_at(server.url, retries=1)("a cat", *pictures, new_exchange())
    assert len(server.bodies) == 2


def test_a_retry_after_of_hours_is_not_waited_for(pictures):
    with (
        serving(lambda handler, *_: handler.send(429, "quota", Retry_After="7200")) as server,
        pytest.raises(UserError, match="asks to wait 7200 seconds"),
    ):
        judge_at(server.url)("a cat", *pictures, new_exchange())
    assert len(server.bodies) == 1


CHILD = """
import sys
from pathlib import Path
from microdit.evaluation.preference.judge import VisionJudge, judge_all
from microdit.evaluation.preference.verdicts import VerdictFile, both_orders, read_pairs
root = Path(sys.argv[1])
judge = VisionJudge(sys.argv[2], "eyes-1", timeout=600, backoff=0.001)
print(judge)
file = VerdictFile(root / "verdicts.jsonl", both_orders(read_pairs(root / "a", root / "b")), "eyes-1")
print(judge_all(file, judge, 3, print, print))
"""


def test_repeated_kills_pay_twice_only_for_requests_in_flight(tmp_path):
    write_folders(tmp_path, 12)
    stops, reached, released = [5, 6, 19], threading.Event(), threading.Event()
    seen = ""

    def script(handler: Handler, number: int, order: str) -> str:
        if stops and number >= stops[0]:
            reached.set()
            released.wait()
        return perfect(handler, number, order)

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD, str(tmp_path), server.url]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ))

    with serving(script) as server:
        while stops:
            child = start()
            assert reached.wait(600)
            child.send_signal(signal.SIGKILL)
            seen += child.communicate()[0]
            assert child.returncode == -signal.SIGKILL
            stops.pop(0)
            reached.clear()
            released.set()
            released = threading.Event()
        child = start()
        seen += child.communicate(timeout=600)[0]
        assert child.returncode == 0, seen
    lines = lines_of(tmp_path / "verdicts.jsonl")
    assert Counter((line["pair"], line["order"]) for line in lines) == {(i, order): 1 for i in range(12) for order in ("AB", "BA")}
    assert all(line["verdict"] == "A" for line in lines)
    events = Counter(line["event"] for line in lines_of(tmp_path / REQUESTS))
    assert 3 <= events["failed"] <= 3 * 3  # three kills, with one to three requests under way
    assert (events["sent"], events["answered"]) == (24 + events["failed"], 24)
    assert 24 + 3 <= sum(server.requests.values()) <= events["sent"]  # a request may be logged and then not sent
    reported = re.findall(r"(\d+) requests? w\w+ in flight when an earlier process ended: .* may be billed twice", seen)
    assert 1 <= sum(map(int, reported)) <= events["failed"]  # a killed process may have had no time to report
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert KEY not in seen
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_key_that_a_server_repeats_is_redacted(pictures):
    with serving(lambda *_: f"A is better, {KEY}") as server:
        assert judge_at(server.url)("a cat", *pictures, new_exchange()).answer == "A is better, ***"


def test_the_key_is_optional_and_a_damaged_one_is_not_repeated(pictures, monkeypatch):
    monkeypatch.setenv("MICRODIT_JUDGE_KEY", KEY + "\nX-Evil: 1")
    with pytest.raises(UserError, match="odd characters") as caught:
        judge_at("http://127.0.0.1:1")
    assert KEY not in str(caught.value)
    monkeypatch.delenv("MICRODIT_JUDGE_KEY")
    with serving(lambda *_: "TIE") as server:
        assert judge_at(server.url)("a cat", *pictures, new_exchange()).choice == "tie"
        monkeypatch.setenv("OPENAI_API_KEY", "other")
        judge_at(server.url)("a cat", *pictures, new_exchange())
    assert "Authorization" not in server.headers[0]
    assert server.headers[1]["Authorization"] == "Bearer other"
    assert "other" not in repr(judge_at(server.url))


@pytest.mark.parametrize(
    "url",
    ["", "api.openai.com/v1", "ftp://x/v1", "http://me:secret@host/v1", "http://host:abc/v1", "http://a b", "http://host/v1?key=secret"],
)
def test_an_invalid_address_is_refused(url):
    with pytest.raises(UserError, match="must look like") as caught:
        judge_at(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("A", "first"),
        (" b.\n", "second"),
        ("**TIE**", "tie"),
        ("Answer: A", "first"),
        ("The better picture shows the cat.\n\nFinal answer: **B**", "second"),
        ("B\n\nIts cat is sharper than that of A.", "second"),
        ("Picture A is better.", "first"),
        ('{"answer": "B"}', "second"),
        ('```json\n{"verdict": "TIE", "reason": "both show a cat"}\n```', "tie"),
        ("<think>A? B? A.</think>B", "second"),
        ("", None),
        ("A cat sits on a mat.", None),
        ("A or B", None),
        ("A: a cat. B: a dog.", None),
        ('{"answer": "C"}', None),
        ('{"first": "A", "second": "B"}', None),
        ("{{{", None),
        ("!" * 5000 + "x", None),
        ("<think>" * 100_000, None),
        ('{"answer": ' + "[" * 100_000 + "}", None),
    ],
)
def test_choices_are_read_from_words_and_json_but_never_guessed(answer, choice):
    assert read_choice(answer) == choice


def test_the_estimate_counts_both_orders():
    small = estimate(200, 2, 64)
    assert (small.requests, small.images, small.tokens, small.dollars) == (200, 400, 200 * (2 * 255 + 150), None)
    large = estimate(2, 2, 1024, dollars_per_million=2.5)
    assert large.tokens == 2 * (2 * (85 + 4 * 170) + 150)
    assert large.dollars == pytest.approx(large.tokens * 2.5e-6)
