"""Being asked to stop, by a person or by the machine that is about to vanish."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequests:
    """What Ctrl-C (SIGINT) and spot notices (SIGTERM) ask for. A second Ctrl-C ends the program at once."""

    def __init__(self) -> None:
        self.by_machine = self.by_user = False

    def note(self, number: int, frame: object) -> None:
        if number == signal.SIGTERM:
            self.by_machine = True
        else:
            self.by_user = True
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    requests = StopRequests()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, requests.note)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
