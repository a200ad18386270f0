"""A real S3 server on loopback (moto's), and a proxy that puts faults between it and the program under test.

`python -m tests.io.store_server FOLDER` serves until none of the processes named in FOLDER/users lives: all workers of a test run share it.
`python -m tests.io.store_server FOLDER STORE BYTES_PER_SECOND LATENCY` is such a proxy without faults, for measurements.
"""

import http.client
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from microdit.io.locks import in_turn

BLOCK = 1 << 18
ADDRESS, SLOW = "address", "slow"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test-key-id",
    "AWS_SECRET_ACCESS_KEY": "test-secret-key",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def shared_server(folder: Path) -> str:
    """Return the address of the server of `folder`, started unless it runs, which this process may use until it ends."""
    users = folder / "users"
    users.mkdir(parents=True, exist_ok=True)
    with in_turn(folder / "lock"):
        (users / str(os.getpid())).touch()
        if not (folder / ADDRESS).exists():
            with (folder / "log").open("ab") as log:
                command = [sys.executable, "-m", "tests.io.store_server", str(folder)]
                subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            until = time.monotonic() + 120
            while not (folder / ADDRESS).exists():
                assert time.monotonic() < until, (folder / "log").read_text()
                time.sleep(0.05)
        return (folder / ADDRESS).read_text()


def serve(folder: Path) -> None:
    """Serve S3 on a free port, written to FOLDER/address, until no user lives."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    (folder / "part").write_text(f"http://{host}:{port}")
    (folder / "part").rename(folder / ADDRESS)
    while True:
        time.sleep(1)
        if not any(_lives(int(user.name)) for user in (folder / "users").iterdir()):
            with in_turn(folder / "lock"):
                if not any(_lives(int(user.name)) for user in (folder / "users").iterdir()):
                    (folder / ADDRESS).unlink()
                    return


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@dataclass(frozen=True)
class Fault:
    """What happens to a request instead of its answer, or to the answer.

    `kind` is error (a 500), busy (a 503 SlowDown), expired (a 400 ExpiredToken), refused (a 403), cut (the connection ends after `amount`
    bytes of the body), flip (byte number `amount` is changed, in the answer's body or, where the request has one, in that), slow (`amount`
    seconds pass before the answer), lost (the store does what it is asked to, and the answer never arrives) or late (a 404).
    """

    kind: str
    amount: float = 0


ANSWERS = {
    "error": (500, "InternalError"),
    "busy": (503, "SlowDown"),
    "expired": (400, "ExpiredToken"),
    "refused": (403, "AccessDenied"),
    "late": (404, "NoSuchKey"),
}


@dataclass
class Proxy:
    """A server that passes requests on to the one at `store`, with the faults that `fault(method, path)` chooses.

    `bytes_per_second` limits all bodies together, and `latency` delays each answer, in seconds. `requests` and `faults` count.
    """

    store: str
    fault: Callable[[str, str], Fault | None] = lambda method, path: None
    bytes_per_second: float | None = None
    latency: float = 0.0
    address: str = ""
    requests: int = 0
    faults: int = 0
    sent: int = 0  # bytes of all bodies
    seen: list[str] = field(default_factory=list)  # method and path of each request
    conditional: threading.Lock = field(default_factory=threading.Lock)  # held by each conditional write
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _free_at: float = 0.0

    def make_bucket(self) -> str:
        """Create a bucket of its own, and return its name."""
        name = f"bucket-{uuid4().hex[:12]}"
        store = urlsplit(self.store)
        connection = http.client.HTTPConnection(store.hostname or "", store.port, timeout=60)
        connection.request("PUT", f"/{name}")
        assert connection.getresponse().status == 200
        connection.close()
        return name

    def reset(self) -> None:
        """Stop all faults, limits and delays, and count from 0."""
        self.fault, self.bytes_per_second, self.latency = (lambda method, path: None), None, 0.0
        self.requests = self.faults = self.sent = 0
        self.seen = []

    @contextmanager
    def running(self) -> Iterator["Proxy"]:
        """Serve on a free port until the block ends."""
        handler = type("Handler", (_Handler,), {"proxy": self})
        server = _Server(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def choose(self, method: str, path: str) -> Fault | None:
        """Count a request, and return the fault that is due."""
        with self._lock:
            self.requests += 1
            self.seen.append(f"{method} {path}")
            fault = self.fault(method, path)
            self.faults += fault is not None
            return fault

    def wait_to_send(self, size: int) -> None:
        """Wait until the line, which all connections share, has carried `size` more bytes."""
        with self._lock:
            self.sent += size
            if self.bytes_per_second is None:
                return
            self._free_at = max(self._free_at, time.monotonic()) + size / self.bytes_per_second
            until = self._free_at
        time.sleep(max(0.0, until - time.monotonic()))


def faults_in_order(*faults: Fault | None, where: str = "") -> Callable[[str, str], Fault | None]:
    """Return the choice of these faults, one after the other, for the requests whose "METHOD path" contains `where`."""
    left = list(faults)

    def choose(method: str, path: str) -> Fault | None:
        return left.pop(0) if left and where in f"{method} {path}" else None

    return choose


def always(fault: Fault, where: str = "") -> Callable[[str, str], Fault | None]:
    """Return the choice of one fault for every request whose "METHOD path" contains `where`."""
    return lambda method, path: fault if where in f"{method} {path}" else None


def random_faults(seed: int, share: float, kinds: tuple[str, ...]) -> Callable[[str, str], Fault | None]:
    """Return the choice of random faults for a share of all requests."""
    numbers = random.Random(seed)

    def choose(method: str, path: str) -> Fault | None:
        if numbers.random() >= share:
            return None
        kind = numbers.choice(kinds)
        return Fault(kind, 0.05 if kind == "slow" else numbers.randrange(1, 2000))

    return choose


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: Proxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.choose(self.command, self.path)
        if self.proxy.latency:
            time.sleep(self.proxy.latency)
        if fault is None:
            self._answer(*self._ask(body))
        elif fault.kind in ANSWERS:
            status, code = ANSWERS[fault.kind]
            said = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>test-secret-key</Message></Error>".encode()
            self._answer(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(said)))], said)
        elif fault.kind == "slow":
            time.sleep(fault.amount)
            self._answer(*self._ask(body))
        elif fault.kind == "lost":
            self._ask(body)
            self.close_connection = True
        elif fault.kind == "flip" and body:
            self._answer(*self._ask(_flipped(body, int(fault.amount))))
        else:
            status, headers, content = self._ask(body)
            if fault.kind == "flip":
                self._answer(status, headers, _flipped(content, int(fault.amount)) if status < 300 else content)
            else:  # cut
                self._answer(status, headers, content[: min(int(fault.amount), max(0, len(content) - 1))])
                self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Pass the request on. Conditional writes go one at a time: S3 makes them atomic, while moto looks first and writes later."""
        with self.proxy.conditional if "If-None-Match" in self.headers else nullcontext():
            return self._ask_now(body)

    def _ask_now(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        store = urlsplit(self.proxy.store)
        connection = http.client.HTTPConnection(store.hostname or "", store.port, timeout=120)
        self.proxy.wait_to_send(len(body))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "expect")}
        connection.request(self.command, self.path, body or None, {**headers, "Content-Length": str(len(body))})
        answer = connection.getresponse()
        content = answer.read()
        kept = [
            (name, value)
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "transfer-encoding", "date", "server")
        ]
        if answer.getheader("Content-Length") is None:
            kept.append(("Content-Length", str(len(content))))
        connection.close()
        return answer.status, kept, content

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        try:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                for start in range(0, len(content), BLOCK):
                    block = content[start : start + BLOCK]
                    self.proxy.wait_to_send(len(block))
                    self.wfile.write(block)
        except (BrokenPipeError, ConnectionResetError):  # the program under test was killed, or has given up
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the output of tests free of requests."""


def _flipped(content: bytes, position: int) -> bytes:
    if not content:
        return content
    position %= len(content)
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def serve_slowly(folder: Path, store: str, bytes_per_second: float, latency: float) -> None:
    """Pass requests on to `store`, from the address that is written to FOLDER/slow, until this process is killed."""
    with Proxy(store, bytes_per_second=bytes_per_second, latency=latency).running() as proxy:
        (folder / "part").write_text(proxy.address)
        (folder / "part").rename(folder / SLOW)
        threading.Event().wait()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(Path(sys.argv[1]))
    else:
        serve_slowly(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
