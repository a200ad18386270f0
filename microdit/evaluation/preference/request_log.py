"""Log of a judge's requests and answers: requests.jsonl beside the verdicts.

Each request is logged before it is sent, and each answer as it arrives. An answered request is never sent again. A request without a
logged answer is sent again and may be billed twice: it was in flight when the process was killed, or its connection broke.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from microdit.errors import UserError
from microdit.evaluation.preference.verdicts import LineFile, Order, Question
from microdit.io.untrusted_text import parse_json

REQUESTS = "requests.jsonl"
ENDED = "the process ended before an answer was logged"


@dataclass(frozen=True)
class Answer:
    """A judge's answer, and the tokens it cost."""

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
    """The exchanges on all `questions`. `lost` counts requests that were in flight when an earlier process ended.

    Raises UserError if the file belongs to another comparison or cannot be opened by `LineFile`.
    """

    def __init__(self, path: Path, questions: list[Question], model: str):
        self._file = LineFile(path)
        try:
            self._marks = {(question.pair.index, question.order): _mark(question, model) for question in questions}
            self._exchanges = {key: Exchange(partial(self._write, key)) for key in self._marks}
            for number, line in enumerate(self._file.lines, start=1):
                self._recall(line, f"Line {number} of {path}")
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

    def exchange(self, question: Question) -> Exchange:
        return self._exchanges[question.pair.index, question.order]

    def _write(self, key: tuple[int, Order], event: str, **more: Any) -> None:
        self._file.append({**self._marks[key], "event": event, **more})

    def _recall(self, line: bytes, where: str) -> None:
        try:
            fields = parse_json(line)
            key = fields["pair"], fields["order"]
            mark = {name: fields.pop(name) for name in ("pair", "order", "prompt", "model", "pictures")}
            is_ours = self._marks.get(key) == mark
            if is_ours:
                self._exchanges[key].recall(**fields)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{where} is not a log entry of a request: remove the line.") from None
        if not is_ours:
            raise UserError(f"{where} belongs to another comparison (other images, prompts, orders, or judge): choose another --out.")


def _mark(question: Question, model: str) -> dict[str, Any]:
    """Return the fields that identify a question in the log."""
    pair = question.pair
    return {"pair": pair.index, "order": question.order, "prompt": pair.prompt, "model": model, "pictures": list(pair.fingerprints)}
