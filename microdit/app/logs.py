"""What the server logs: one line a kind and minute, so that no client can fill a disk or a terminal with them."""

import logging
from typing import Any

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
    "formatters": {"line": {"class": "microdit.terminal.PrintableFormatter", "format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "filters": ["once"], "formatter": "line"}},
    "loggers": {name: {"handlers": ["stderr"], "level": "WARNING"} for name in ("uvicorn", "asyncio", "microdit.app")},
}
