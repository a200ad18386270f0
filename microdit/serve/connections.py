"""Bounds against slow or greedy clients: connections with time limits and a bound on their number, and a log that cannot flood.

The log gets at most one line of each kind per minute, so that no client can fill a disk or a terminal.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MINUTE = 60.0
MAX_KINDS = 1000


@dataclass(frozen=True)
class Limits:
    """Bounds on connections, on request bodies, and on the time that a client may take."""

    connections: int = 512  # open at the same time, or half of the files that the process may open, if those are fewer
    keep_alive_seconds: int = 5  # between two requests of a connection
    header_seconds: float = 10  # until all headers of a request have arrived
    body_bytes: int = 64 * 1024
    body_seconds: float = 10  # until the whole body has arrived
    response_seconds: float = 60  # until the client has read the response


LIMITS = Limits()


class OncePerMinute(logging.Filter):
    """Passes the first log line of each kind in a minute, and reports the number of suppressed ones with the next.

    A kind is a logger and the first line of a message before its arguments are filled in.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.name, str(record.msg).partition("\n")[0][:200]
        since, suppressed = self._seen.get(kind, (-MINUTE, 0))
        if abs(record.created - since) < MINUTE:
            self._seen[kind] = since, suppressed + 1
            return False
        if len(self._seen) >= MAX_KINDS:
            self._seen.clear()
        self._seen[kind] = record.created, 0
        if suppressed:
            record.msg = f"{record.msg} (and {suppressed:,} more times since the last such line)"
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
    except ModuleNotFoundError:  # Windows, which has no such limit
        return wanted
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if files == resource.RLIM_INFINITY else max(1, min(wanted, files // 2))


class Connection(H11Protocol):
    """A connection of uvicorn that is closed if its client stalls in a request or a response, or to make room for a new one.

    The time limit of a body is applied where it is read (`read_json` in json_requests.py).
    """

    def __init__(self, *args: Any, limits: Limits, **settings: Any):
        super().__init__(*args, **settings)
        self._limits = limits
        self._idle_since = self.loop.time()
        self._header_timer: asyncio.TimerHandle | None = None
        self._response_timer: asyncio.TimerHandle | None = None
        self._ended = False

    @property
    def _is_idle(self) -> bool:
        """True if no request is being processed."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._update_header_timer()
        open_connections = [item for item in self.connections if isinstance(item, Connection) and not item._ended]
        if len(open_connections) > self._limits.connections:
            log.warning("The limit of %d connections is reached: the longest idle one is closed.", len(open_connections) - 1)
            min((item for item in open_connections if item._is_idle), key=lambda item: item._idle_since)._end()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_header_timer()

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._response_timer = self.loop.call_later(self._limits.response_seconds, self._end)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._response_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        _cancel(self._header_timer)
        _cancel(self._response_timer)

    def _update_header_timer(self) -> None:
        """Run the timer from the start of the connection, or the first byte of a request, until the headers have arrived."""
        if not self._is_idle:
            _cancel(self._header_timer)
            self._header_timer = None
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self._limits.header_seconds, self._end)

    def _end(self) -> None:
        self._ended = True
        self.transport.abort()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
