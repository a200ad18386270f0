"""What is computed for a request beside drawing: one after another, for a bounded time, and only for clients that are still there.

What the page's budget tab asks: the bill of a recipe, or what a sum of money buys, as the terminal shows them.
"""

import asyncio
import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from microdit.config.load import load_recipes, recipe_of_text
from microdit.config.schema import Recipe
from microdit.errors import UserError
from microdit.io.console import PlainConsole
from microdit.planning.estimate import estimate
from microdit.planning.hardware import Machine, find_machine, measurements_file
from microdit.planning.planner import plan_for_dollars, recipe_files
from microdit.planning.tables import print_estimate, print_plan
from microdit.planning.workload import KnownShapes
from microdit.reports.formats import finite
from microdit.serve.queue import QueueClosedError
from microdit.serve.schemas import AskedWronglyError, Limits

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


DATA = "data/pictures"  # that bought recipes name: not data/mine, which may be there already, encoded for smaller pictures
LONGEST_NAME = 200  # letters
NUMBERS = {
    "price": "The price must be dollars of a GPU-hour, or left empty.",
    "mfu": "The utilisation must be the share of the chip's peak that is used, such as 0.45, or left empty.",
    "dollars": "The sum must be dollars, or left empty.",
}


def bill_text(fields: dict[str, Any], recipes: Path, check: Callable[[], None]) -> str:
    """For `recipe`, one of the folder `recipes`, for `text`, a recipe itself, or for `dollars`. `check` may call it off.

    Raises UserError.
    """
    for key, sentence in NUMBERS.items():
        if fields.get(key) is not None and finite(fields[key]) is None:
            raise UserError(sentence)
    count, images = _whole(fields.get("count", 1), "GPUs", 100_000), fields.get("images")
    images = None if images is None else _whole(images, "images", 10**12)
    machine = find_machine(str(fields.get("chip", "h100")), count, fields.get("price"), fields.get("mfu"), None, measurements_file())
    console = PlainConsole(file=io.StringIO(), width=100, no_color=True, record=True)
    if fields.get("dollars") is None:
        print_estimate(estimate(_asked(fields, recipes), machine, images=images, check=check), console)
        return console.export_text()
    if fields.get("text") is not None:
        raise UserError("Give a file, to see what it costs, or dollars, to see what they buy: one of the two.")
    return _bought(fields["dollars"], machine, images, console)


def _bought(dollars: float, machine: Machine, images: int | None, console: PlainConsole) -> str:
    """With the recipes' text."""
    plan = plan_for_dollars(dollars, machine, KnownShapes(), DATA, images)
    print_plan(plan, estimate(plan.recipes, machine, images=images), console)
    return console.export_text() + "".join(f"\n--- {name}\n{text}" for name, text in recipe_files(plan).items())


def _whole(number: Any, what: str, most: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= most:
        raise UserError(f"The number of {what} must be a whole number from 1 to {most:,}.")
    return number


def _asked(fields: dict[str, Any], recipes: Path) -> dict[str, Recipe]:
    if isinstance(fields.get("text"), str):
        return {"recipe": recipe_of_text(fields["text"], "recipe.yaml")}
    name = str(fields.get("recipe", ""))
    chosen = recipes / name
    is_name = len(name) <= LONGEST_NAME and name.isprintable()
    if not is_name or recipes.resolve() not in chosen.resolve().parents or not chosen.exists():
        raise UserError("There is no such recipe here: choose one, or give a file of your own.")
    return load_recipes(chosen, None)
