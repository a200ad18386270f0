"""Budgets for the page, and the thread that computes them and the pages of `reports_api.py`.

Computations run one after another, for a bounded time, and only as long as their clients are connected.
"""

import asyncio
import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from microdit.config.load import load_recipes, recipe_of_text
from microdit.config.schema import Recipe
from microdit.errors import UserError
from microdit.io.console import PlainConsole
from microdit.planning.estimate import estimate
from microdit.planning.estimate_tables import print_estimate, print_plan
from microdit.planning.hardware import Machine, find_machine, measurements_file
from microdit.planning.planner import plan_for_dollars, recipe_files
from microdit.planning.workload import KnownShapes
from microdit.serve.json_requests import APIError
from microdit.serve.schemas import BudgetRequest

POLL_SECONDS = 0.05  # between two checks whether a computation has ended or its client has disconnected
T = TypeVar("T")


class Computations:
    """A thread that runs the computations of all requests in turn, until `close`.

    At most `capacity` requests are served at the same time; each computation may take `seconds`.
    """

    def __init__(self, capacity: int = 8, seconds: float = 20):
        self._capacity, self._seconds = capacity, seconds
        self._thread = ThreadPoolExecutor(1, "computations")
        self._clients = 0
        self._closed = threading.Event()

    async def run(self, request: Request, compute: Callable[[Callable[[], None]], T]) -> T:
        """Return `compute(check)`, which must call `check` often: it raises UserError when time is up or the client has disconnected.

        Raises APIError if too many computations are waiting or the server is closing, ClientDisconnect if the client disconnects.
        """
        self._check_open()
        if self._clients >= self._capacity:
            sentence = f"The maximum of {self._capacity} computations are waiting: try again in a few seconds."
            raise APIError(sentence, status=429, code="queue_full")
        cancelled = threading.Event()
        self._clients += 1
        future = self._thread.submit(lambda: compute(self._check(cancelled)))
        try:
            while not future.done():
                if await request.is_disconnected():
                    raise ClientDisconnect
                await asyncio.sleep(POLL_SECONDS)
            self._check_open()
            return future.result()
        finally:
            cancelled.set()
            future.cancel()
            self._clients -= 1

    def close(self) -> None:
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise APIError("The server is shutting down: try again when it is back.", status=503, code="shutting_down")

    def _check(self, cancelled: threading.Event) -> Callable[[], None]:
        """Return the check of a computation that starts now."""
        end = time.monotonic() + self._seconds

        def check() -> None:
            if cancelled.is_set() or self._closed.is_set():
                raise UserError("The computation was cancelled because its client has disconnected or the server is shutting down.")
            if time.monotonic() > end:
                raise UserError(
                    f"This takes more than {self._seconds:g} seconds, too long for the page: run microdit budget, report or explain in a "
                    "terminal, where there is no limit."
                )

        return check


DATA = "data/pictures"  # in planned recipes: not data/mine, which may exist already, encoded for smaller pictures
MAX_NAME = 200  # characters


def estimate_text(request: BudgetRequest, recipes: Path, check: Callable[[], None]) -> str:
    """Return the output of `microdit budget` for a recipe in the folder `recipes`, for a recipe's text, or for a sum of money.

    `check` is called between the parts, and may raise to cancel the computation. Raises UserError for what cannot be estimated.
    """
    machine = find_machine(request.chip, request.count, request.price, request.mfu, None, measurements_file())
    console = PlainConsole(file=io.StringIO(), width=100, no_color=True, record=True)
    if request.dollars is None:
        print_estimate(estimate(_read_recipes(request, recipes), machine, images=request.images, check=check), console)
        return console.export_text()
    if request.text is not None:
        raise UserError("Give a file, to see what it costs, or dollars, to see what they buy, not both.")
    return _plan_text(request.dollars, machine, request.images, console, check)


def _plan_text(dollars: float, machine: Machine, images: int | None, console: PlainConsole, check: Callable[[], None]) -> str:
    """Return the plan for `dollars` and the text of its recipes."""
    plan = plan_for_dollars(dollars, machine, KnownShapes(), DATA, images, check)
    print_plan(plan, estimate(plan.recipes, machine, images=images, check=check), console)
    return console.export_text() + "".join(f"\n--- {name}\n{text}" for name, text in recipe_files(plan).items())


def _read_recipes(request: BudgetRequest, recipes: Path) -> dict[str, Recipe]:
    if request.text is not None:
        return {"recipe": recipe_of_text(request.text, "recipe.yaml")}
    name = request.recipe or ""
    chosen = recipes / name
    is_name = len(name) <= MAX_NAME and name.isprintable()
    if not is_name or recipes.resolve() not in chosen.resolve().parents or not chosen.exists():
        raise UserError("There is no such recipe here: choose one, or give your own file.")
    return load_recipes(chosen, None)
