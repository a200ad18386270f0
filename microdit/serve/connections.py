"""Connections with bounds on their number, on the time until a request has arrived and on the time until its answer is read.

The log gets at most one line of each kind per minute, so that no client can fill a disk or a terminal.
"""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from microdit.serve.schemas import Limits

MINUTE = 60.0
MOST_KINDS = 1000


class OncePerMinute(logging.Filter):
    """Lets the first line of a kind through, and counts the others of its minute into the next. A kind is a text before its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.name, str(record.msg).partition("\n")[0][:200]
        since, missed = self._seen.get(kind, (-MINUTE, 0))
        if abs(record.created - since) < MINUTE:
            self._seen[kind] = since, missed + 1
            return False
        if len(self._seen) >= MOST_KINDS:
            self._seen.clear()
        self._seen[kind] = record.created, 0
        if missed:
            record.msg = f"{record.msg} (and {missed:,} times more since it was last said)"
        return True


LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"once": {"()": OncePerMinute}},
    "formatters": {"line": {"class": "microdit.io.console.PrintableFormatter", "format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "filters": ["once"], "formatter": "line"}},
    "loggers": {name: {"handlers": ["stderr"], "level": "WARNING"} for name in ("uvicorn", "asyncio", "microdit.serve")},
}


log = logging.getLogger(__name__)


def possible_connections(wanted: int) -> int:
    """Return `wanted`, or half of the files that this process may have open, if that is less."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows, which has no such bound
        return wanted
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if files == resource.RLIM_INFINITY else max(1, min(wanted, files // 2))


class Connection(H11Protocol):
    """uvicorn's, which is closed if its client leaves a request half sent or an answer half read, or if there are too many.

    How long the body of a request may take is known where it is read (`read_json` in api.py).
    """

    def __init__(self, *args: Any, limits: Limits, **settings: Any):
        super().__init__(*args, **settings)
        self._limits = limits
        self._idle_since = self.loop.time()
        self._until_request: asyncio.TimerHandle | None = None
        self._until_taken: asyncio.TimerHandle | None = None
        self._ended = False

    @property
    def _is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()
        everyone = [item for item in self.connections if isinstance(item, Connection) and not item._ended]
        if len(everyone) > self._limits.connections:
            log.warning(
                "There are %d connections, and no more may be: the one that has been idle for longest is closed.", len(everyone) - 1
            )
            min((item for item in everyone if item._is_idle), key=lambda item: item._idle_since)._end()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_request()

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._until_taken = self.loop.call_later(self._limits.answer_seconds, self._end)

    def resume_writing(self) -> None:
        super().resume_writing()
        _stop(self._until_taken)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        _stop(self._until_request)
        _stop(self._until_taken)

    def _await_request(self) -> None:
        """From a request's first byte, or the connection's beginning, the clock runs until its headers are there."""
        if not self._is_idle:
            _stop(self._until_request)
            self._until_request = None
        elif self._until_request is None:
            self._until_request = self.loop.call_later(self._limits.header_seconds, self._end)

    def _end(self) -> None:
        self._ended = True
        self.transport.abort()


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
