"""A real server on a free port of this machine, in a thread of the test."""

import contextlib
import threading
from collections.abc import Iterator

from fastapi import FastAPI

from microdit.serve.queue import WorkQueue
from microdit.serve.schemas import Limits
from microdit.serve.server import LIMITS, Server, listen


@contextlib.contextmanager
def served(app: FastAPI, queue: WorkQueue, limits: Limits = LIMITS) -> Iterator[str]:
    """Its address."""
    listener = listen("127.0.0.1", 0)
    server = Server(app, queue, limits)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(600)
        assert not thread.is_alive()
