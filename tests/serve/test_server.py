"""Addresses that the server listens on."""

import socket

import pytest

from microdit.errors import UserError
from microdit.serve.server import is_local, listen, url_of


def test_ports_and_hosts():
    assert [is_local(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "example.org")] == [True, True, True, False, False]
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert url_of(taken) == f"http://127.0.0.1:{port}"
        socket.create_connection(("127.0.0.1", port), timeout=5).close()  # clients can connect before the server runs
        with pytest.raises(UserError, match=rf"Cannot listen on 127\.0\.0\.1:{port} \(.*\): choose another --port\."):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match=r"choose another --port or --host\."):
        listen("0.0.0.0", 100_000)
