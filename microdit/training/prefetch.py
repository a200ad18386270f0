"""Batches made ahead of the loop, in a thread of their own.

What a batch holds is a function of its step, so the thread needs no state, and a run that starts again anywhere asks for the same ones.
A thread that hangs (a network share that is gone) is not waited for for ever: the loop stops, and says what was being read.
"""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from microdit.errors import UserError

T = TypeVar("T")
NAME = "data-reader"


class Prefetcher(Generic[T]):
    """Calls `make(step)` for each of `steps`, at most `ahead` batches before they are asked for."""

    def __init__(self, make: Callable[[int], T], steps: range, ahead: int, timeout: float, where: Callable[[], str]):
        """`where` says, in words, what is being read now; `timeout` in seconds."""
        self._make, self._steps, self._timeout, self._where = make, steps, timeout, where
        self._queue: queue.Queue[T | BaseException] = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name=NAME, daemon=True)
        self._thread.start()

    def next(self) -> T:
        """Return the next step's batch. Raises what reading raised, or UserError if it hangs."""
        try:
            item = self._queue.get(timeout=self._timeout)
        except queue.Empty:
            raise UserError(
                f"The thread {NAME} has given no batch for {self._timeout:g} s (data.read_timeout). It was reading {self._where()}. "
                "Is that disk or share still there? Start again with --resume."
            ) from None
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """End the thread; what it has read is dropped."""
        self._closed.set()

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        torch.set_num_threads(1)  # of this thread; the cores belong to the loop
        for step in self._steps:
            try:
                item: T | BaseException = self._make(step)
            except BaseException as error:  # handed over to the loop, which raises it
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=1)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set() or isinstance(item, BaseException):
                return
