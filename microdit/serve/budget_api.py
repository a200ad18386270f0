"""Budgets for the page, and the thread that computes them and the reports.

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
from microdit.serve.queue import QueueClosedError
from microdit.serve.schemas import AskedWronglyError, BudgetRequest, Limits

LOOK_EVERY = 0.05  # seconds between two looks at whether a computation has ended, or its client gone
T = TypeVar("T")


class Computations:
    """A thread that runs the computations of all requests in turn, until `close`."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._thread = ThreadPoolExecutor(1, "computations")
        self._clients = 0
        self._closed = threading.Event()

    async def answer(self, request: Request, compute: Callable[[Callable[[], None]], T]) -> T:
        """Return the result of `compute(check)`, which has to call `check` often: it raises when the time is up or the client has gone.

        Raises AskedWronglyError if too many wait already, ClientDisconnect if the client goes, QueueClosedError if the server ends.
        """
        self._check_open()
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
            self._check_open()
            return future.result()
        finally:
            gone.set()
            future.cancel()
            self._clients -= 1

    def close(self) -> None:
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise QueueClosedError("The server is shutting down: ask again when it is back.")

    def _check(self, gone: threading.Event) -> Callable[[], None]:
        """Return the check of a computation that begins now."""
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


DATA = "data/pictures"  # that bought recipes name: not data/mine, which may be there already, encoded for smaller pictures
LONGEST_NAME = 200  # characters


def bill_text(request: BudgetRequest, recipes: Path, check: Callable[[], None]) -> str:
    """Return the bill as the terminal shows it: of a recipe in the folder `recipes`, of a recipe's text, or of what a sum buys.

    `check` is called between the parts, and may raise to call it off. Raises UserError.
    """
    machine = find_machine(request.chip, request.count, request.price, request.mfu, None, measurements_file())
    console = PlainConsole(file=io.StringIO(), width=100, no_color=True, record=True)
    if request.dollars is None:
        print_estimate(estimate(_read_recipes(request, recipes), machine, images=request.images, check=check), console)
        return console.export_text()
    if request.text is not None:
        raise UserError("Give a file, to see what it costs, or dollars, to see what they buy: one of the two.")
    return _bought(request.dollars, machine, request.images, console)


def _bought(dollars: float, machine: Machine, images: int | None, console: PlainConsole) -> str:
    """Return the plan for `dollars` and the text of its recipes."""
    plan = plan_for_dollars(dollars, machine, KnownShapes(), DATA, images)
    print_plan(plan, estimate(plan.recipes, machine, images=images), console)
    return console.export_text() + "".join(f"\n--- {name}\n{text}" for name, text in recipe_files(plan).items())


def _read_recipes(request: BudgetRequest, recipes: Path) -> dict[str, Recipe]:
    if request.text is not None:
        return {"recipe": recipe_of_text(request.text, "recipe.yaml")}
    name = request.recipe or ""
    chosen = recipes / name
    is_name = len(name) <= LONGEST_NAME and name.isprintable()
    if not is_name or recipes.resolve() not in chosen.resolve().parents or not chosen.exists():
        raise UserError("There is no such recipe here: choose one, or give a file of your own.")
    return load_recipes(chosen, None)
