"""Computations for requests: one after another, for a bounded time, for connected clients only."""

import asyncio
import threading
from collections.abc import Callable

import pytest
from fastapi import Request
from starlette.requests import ClientDisconnect

from microdit.errors import UserError
from microdit.serve.budget_api import Computations
from microdit.serve.json_requests import APIError

WAIT = 30  # seconds, for what takes milliseconds


class Client:
    """The client of a request, which disconnects when `gone` is set."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    def request(self) -> Request:
        async def receive() -> dict[str, str]:
            await self.gone.wait()
            return {"type": "http.disconnect"}

        return Request({"type": "http", "method": "POST", "headers": []}, receive)


def endless(check: Callable[[], None]) -> None:
    while True:
        check()
        threading.Event().wait(0.001)


@pytest.fixture
def computations():
    made = Computations(capacity=2, seconds=3600)
    yield made
    made.close()


def test_results_are_returned_and_exceptions_raised(computations):
    async def ask():
        assert await computations.run(Client().request(), lambda check: (check(), 42)[1]) == 42
        with pytest.raises(ZeroDivisionError):
            await computations.run(Client().request(), lambda check: 1 / 0)

    asyncio.run(ask())


def test_a_computation_ends_when_its_time_is_up():
    computations = Computations(seconds=0.05)
    with pytest.raises(UserError, match=r"more than 0\.05 seconds"):
        asyncio.run(computations.run(Client().request(), endless))
    computations.close()


def test_a_client_that_goes_takes_its_computation_with_it(computations):
    began = threading.Event()

    def first(check: Callable[[], None]) -> None:
        began.set()
        endless(check)

    async def ask():
        working, waiting, refused, last = Client(), Client(), Client(), Client()
        at_work = asyncio.create_task(computations.run(working.request(), first))
        assert await asyncio.to_thread(began.wait, WAIT)
        never = asyncio.create_task(computations.run(waiting.request(), lambda check: pytest.fail("nobody waits for this")))
        await asyncio.sleep(0)
        with pytest.raises(APIError, match="maximum of 2 computations are waiting") as full:
            await computations.run(refused.request(), lambda check: None)
        assert full.value.status == 429
        for client, task in ((waiting, never), (working, at_work)):
            client.gone.set()
            with pytest.raises(ClientDisconnect):
                await task
        assert await asyncio.wait_for(computations.run(last.request(), lambda check: "free again"), WAIT) == "free again"

    asyncio.run(ask())


def test_a_server_that_ends_waits_for_none(computations):
    async def ask():
        client = Client()
        task = asyncio.create_task(computations.run(client.request(), endless))
        await asyncio.sleep(0)
        await asyncio.to_thread(computations.close)
        for request in (task, computations.run(client.request(), lambda check: None)):
            with pytest.raises(APIError, match="shutting down") as closed:
                await request
            assert closed.value.status == 503

    asyncio.run(ask())
