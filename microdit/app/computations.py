"""What is computed for a request beside drawing: one after another, for a bounded time, and only for clients that are still there."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from microdit.app.asking import AskedWronglyError
from microdit.app.jobs import QueueClosedError
from microdit.app.limits import Limits
from microdit.errors import UserError

LOOK_EVERY = 0.05  # seconds between two looks at whether a computation has ended, or its client gone
T = TypeVar("T")


class Computations:
    """A thread that computes for all requests in turn, until `close`."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._thread = ThreadPoolExecutor(1, "computations")
        self._clients = 0
        self._closed = threading.Event()

    async def answer(self, request: Request, compute: Callable[[Callable[[], None]], T]) -> T:
        """What `compute(check)` returns. It has to call `check` often, which raises when its time is up or nobody waits for it.

        Raises AskedWronglyError if too many wait already, ClientDisconnect if the client goes, QueueClosedError if the server ends.
        """
        self._refuse_if_closed()
        if self._clients >= self._limits.computations:
            raise AskedWronglyError(
                f"{self._clients} computations are waiting already, and no more may: ask again in a few seconds.",
                status=429,
                code="queue_full",
            )
        gone = threading.Event()
        self._clients += 1
        future = self._thread.submit(lambda: compute(self._check(gone)))
        try:
            while not future.done():
                if await request.is_disconnected():
                    raise ClientDisconnect
                await asyncio.sleep(LOOK_EVERY)
            self._refuse_if_closed()
            return future.result()
        finally:
            gone.set()
            future.cancel()
            self._clients -= 1

    def close(self) -> None:
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)

    def _refuse_if_closed(self) -> None:
        if self._closed.is_set():
            raise QueueClosedError("The server is shutting down: ask again when it is back.")

    def _check(self, gone: threading.Event) -> Callable[[], None]:
        """Of a computation that begins now."""
        seconds = self._limits.computation_seconds
        end = time.monotonic() + seconds

        def check() -> None:
            if gone.is_set() or self._closed.is_set():
                raise UserError("The computation was called off: nobody waits for it any more.")
            if time.monotonic() > end:
                raise UserError(
                    f"This takes more than {seconds:g} seconds, too long for the page: microdit budget and microdit report, in a terminal, "
                    "have no limit."
                )

        return check
