"""Real servers on free ports of this machine, each in a thread of the test."""

import contextlib
import threading
from collections.abc import Iterator

from microdit.serve.connections import LIMITS, Limits
from microdit.serve.server import Server, WebApp, listen, url_of


@contextlib.contextmanager
def served(app: WebApp, limits: Limits = LIMITS) -> Iterator[str]:
    """Serve `app`, and yield its address."""
    with running(Server(app, limits)) as url:
        yield url


@contextlib.contextmanager
def running(server: Server) -> Iterator[str]:
    """Run a server until the block ends, and yield its address."""
    listener = listen("127.0.0.1", 0)
    url = url_of(listener)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        yield url
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
