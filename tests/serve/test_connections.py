"""Connections that stall or flood: a real server, and clients on bare sockets."""

import contextlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from microdit.serve.connections import Limits, possible_connections
from microdit.serve.endpoints import web_app
from microdit.serve.queue import WorkQueue
from tests.serve.serving import served

WAIT = 60  # seconds, for what takes a fraction of one
IDLE = 300

CROWD = """
import resource, socket, sys
port, count = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
crowd = [socket.create_connection(("127.0.0.1", port), 60) for _ in range(count)]
print("connected", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def server(limits: Limits) -> Iterator[tuple[str, int]]:
    """Serve the image server without a model, and yield host and port."""
    with served(web_app(WorkQueue({}, 4), limits), limits) as url:
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


def is_closed(connection: socket.socket) -> bool:
    """Return whether the server closes the connection, with or without a response before that."""
    connection.settimeout(WAIT)
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


HALVES = {
    "nothing": b"",
    "headers": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: ",
    "a second request": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /hea",
    "a body": b"POST /api/budget HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{",
}


def test_half_sent_requests_are_closed_in_time():
    with server(Limits(header_seconds=0.2, body_seconds=0.2, keep_alive_seconds=1)) as address:
        connections = {name: socket.create_connection(address, WAIT) for name in HALVES}
        for name, half in HALVES.items():
            connections[name].sendall(half)
        assert [name for name, connection in connections.items() if not is_closed(connection)] == []
        assert httpx.get(f"http://{address[0]}:{address[1]}/health", timeout=WAIT).json()["status"] == "ok"


def test_a_request_sent_byte_by_byte_is_closed_in_time():
    with server(Limits(header_seconds=0.3)) as address, socket.create_connection(address, WAIT) as connection:
        connection.settimeout(0.01)
        for _ in range(100 * WAIT):
            with contextlib.suppress(TimeoutError):
                connection.sendall(b"G")
                if connection.recv(10) == b"":
                    break
        else:
            pytest.fail("the connection stays open for ever")


def request_endlessly(connection: socket.socket) -> None:
    """Send requests until all buffers on the way are full and the server drops the connection."""
    while True:
        connection.sendall(b"GET /page.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 100)


def test_a_response_that_nobody_reads_is_dropped():
    with server(Limits(response_seconds=0.2)) as address, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address)
        connection.settimeout(WAIT)
        with pytest.raises(ConnectionError):
            request_endlessly(connection)


def test_the_longest_idle_makes_room_for_the_newest_and_it_is_logged_once(capfd):
    with server(Limits(connections=4, header_seconds=3600)) as address:
        crowd = [socket.create_connection(address, WAIT) for _ in range(12)]
        assert all(is_closed(connection) for connection in crowd[:8])
        assert httpx.get(f"http://{address[0]}:{address[1]}/health", timeout=WAIT).status_code == 200
    assert capfd.readouterr().err.count("limit of 4 connections is reached") == 1


@pytest.fixture
def few_files() -> Iterator[None]:
    """Limit the open files of this process to about 200, as `ulimit -n 200` does."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = max(200, 2 * len(os.listdir("/dev/fd")) + 120)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, before[1]))
    assert possible_connections(512) == files // 2
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_many_idle_connections_do_not_exhaust_few_files(few_files, capfd):
    with server(Limits()) as address:
        command = [sys.executable, "-S", "-c", CROWD, str(address[1]), str(2 * IDLE)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as crowd:
            assert crowd.stdout.readline() == b"connected\n"
            for _ in range(3):
                assert httpx.get(f"http://{address[0]}:{address[1]}/health", timeout=WAIT).status_code == 200
            crowd.stdin.close()
    assert len(capfd.readouterr().err.splitlines()) < 10
