"""Log of the requests to a model and of its answers: requests.jsonl.

Each request is logged before it is sent, and each answer as it arrives. An answered request is never sent again. A request without a
logged answer is sent again and may be billed twice: it was in flight when the process was killed, or its connection broke.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from microdit.errors import UserError
from microdit.io.files import from_checked_json
from microdit.io.line_file import LineFile

REQUESTS = "requests.jsonl"
ENDED = "the process ended before an answer was logged"


@dataclass(frozen=True)
class Answer:
    """A model's answer, and the tokens it cost."""

    answer: str
    tokens: int


class _Write(Protocol):
    def __call__(self, event: str, **more: Any) -> None: ...


class Exchange:
    """The requests for one question. `answers` includes those that an earlier process received."""

    def __init__(self, write: _Write):
        self._write = write
        self.answers: list[Answer] = []
        self.in_flight = 0

    def sending(self) -> None:
        """Log that a request is about to be sent."""
        self._write("sent")
        self.in_flight += 1

    def answered(self, answer: Answer) -> None:
        """Log the answer to a request."""
        self._write("answered", **asdict(answer))
        self.in_flight -= 1
        self.answers.append(answer)

    def failed(self, why: str) -> None:
        """Log that a request got no answer, or an invalid one."""
        self._write("failed", why=why)
        self.in_flight -= 1

    def recall(self, event: str, **more: Any) -> None:
        """Replay an event that an earlier process logged. Raises ValueError or TypeError if it is invalid."""
        if event == "answered":
            self.answers.append(Answer(str(more["answer"]), int(more["tokens"])))
        elif event not in ("sent", "failed"):
            raise ValueError("there is no such event")
        self.in_flight += 1 if event == "sent" else -1


class RequestLog:
    """The exchanges on all questions of an evaluation, each identified by its `mark`, a JSON object of the same keys for all.

    `lost` counts requests that were in flight when an earlier process ended. Raises UserError if the file holds other questions, of which
    `belongs` says what they may differ in, or cannot be opened by `LineFile`.
    """

    def __init__(self, path: Path, marks: Iterable[dict[str, Any]], belongs: str):
        self._file = LineFile(path)
        try:
            self._exchanges = {_key(mark): Exchange(partial(self._write, mark)) for mark in marks}
            self._fields = frozenset(name for key in self._exchanges for name, _ in key)
            for number, line in enumerate(self._file.lines, start=1):
                self._recall(line, f"Line {number} of {path}", belongs)
            self.lost = sum(max(0, exchange.in_flight) for exchange in self._exchanges.values())
            for exchange in self._exchanges.values():
                while exchange.in_flight > 0:
                    exchange.failed(ENDED)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "RequestLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def exchange(self, mark: dict[str, Any]) -> Exchange:
        return self._exchanges[_key(mark)]

    def warn_of_lost(self, warn: Callable[[str], None]) -> None:
        """Say how many requests an earlier process left without an answer, if any."""
        if self.lost:
            requests = "1 request was" if self.lost == 1 else f"{self.lost} requests were"
            warn(f"{requests} in flight when an earlier process ended: the same questions are sent again and may be billed twice.")

    def _write(self, mark: dict[str, Any], event: str, **more: Any) -> None:
        self._file.append({**mark, "event": event, **more})

    def _recall(self, line: bytes, where: str, belongs: str) -> None:
        try:
            fields = from_checked_json(line)
            exchange = self._exchanges.get(_key({name: fields.pop(name) for name in self._fields}))
            if exchange is not None:
                exchange.recall(**fields)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{where} is not a log entry of a request: remove the line.") from None
        if exchange is None:
            raise UserError(f"{where} belongs to {belongs}: choose another --out.")


def _key(mark: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, json.dumps(value)) for name, value in mark.items()))
