"""Stop requests: Ctrl-C, and the SIGTERM that announces the end of a spot machine."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from microdit.errors import EXIT_RESTART


class StopRequests:
    """Flags set by SIGINT (Ctrl-C) and SIGTERM (preemption). A second Ctrl-C ends the program at once."""

    def __init__(self) -> None:
        self.by_machine = self.by_user = False

    def note(self, number: int, frame: object) -> None:
        if number == signal.SIGTERM:
            self.by_machine = True
        else:
            self.by_user = True
            signal.signal(signal.SIGINT, signal.default_int_handler)


def restart_when_asked() -> None:
    """End the program at once at SIGTERM, with the exit code that means "start me again": there is nothing to save yet.

    `stop_requests` takes SIGTERM over while a training runs.
    """

    def end(number: int, frame: object) -> None:
        os.write(2, b"Stopped before training began. Start again with --resume.\n")  # print may be interrupted in the middle of itself
        os._exit(EXIT_RESTART)  # whatever is being imported, read or built

    signal.signal(signal.SIGTERM, end)


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Catch SIGINT and SIGTERM in this block, and restore their handlers afterwards."""
    requests = StopRequests()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, requests.note)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
