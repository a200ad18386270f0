"""What a judge was asked and what it answered, request by request: requests.jsonl beside the verdicts.

Each request is noted before it is sent, each answer as it comes. What was answered is never asked again. A request without a noted answer
is sent again, and may have been paid for: those that were under way when the process was killed, and those that broke off.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from microdit.errors import UserError
from microdit.evaluation.preference.verdicts import LineFile, Order, Question
from microdit.io.text import parse_json

REQUESTS = "requests.jsonl"
ENDED = "the process ended before an answer was noted"


@dataclass(frozen=True)
class Answer:
    """A judge's words, and the tokens that they cost."""

    answer: str
    tokens: int


class _Write(Protocol):
    def __call__(self, event: str, **more: Any) -> None: ...


class Exchange:
    """The requests for one question: `answers` are those that came, in an earlier process too."""

    def __init__(self, write: _Write):
        self._write = write
        self.answers: list[Answer] = []
        self.under_way = 0

    def sending(self) -> None:
        """To be called before a request is sent."""
        self._write("sent")
        self.under_way += 1

    def answered(self, answer: Answer) -> None:
        self._write("answered", **asdict(answer))
        self.under_way -= 1
        self.answers.append(answer)

    def failed(self, why: str) -> None:
        """The request got no answer, or none that makes sense."""
        self._write("failed", why=why)
        self.under_way -= 1

    def recall(self, event: str, **more: Any) -> None:
        """Take in what an earlier process wrote. Raises ValueError, TypeError if it makes no sense."""
        if event == "answered":
            self.answers.append(Answer(str(more["answer"]), int(more["tokens"])))
        elif event not in ("sent", "failed"):
            raise ValueError("there is no such event")
        self.under_way += 1 if event == "sent" else -1


class RequestLog:
    """The exchanges on all `questions`. `lost`: requests that were under way when an earlier process ended.

    Raises UserError for a file of another comparison, and whatever `LineFile` raises.
    """

    def __init__(self, path: Path, questions: list[Question], model: str):
        self._file = LineFile(path)
        try:
            self._marks = {(question.pair.index, question.order): _mark(question, model) for question in questions}
            self._exchanges = {key: Exchange(partial(self._write, key)) for key in self._marks}
            for number, line in enumerate(self._file.lines, start=1):
                self._recall(line, f"Line {number} of {path}")
            self.lost = sum(max(0, exchange.under_way) for exchange in self._exchanges.values())
            for exchange in self._exchanges.values():
                while exchange.under_way > 0:
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
            raise UserError(f"{where} is no note of a request: remove the line.") from None
        if not is_ours:
            raise UserError(f"{where} is of another comparison (other pictures, prompts, orders, or judge): choose another --out.")


def _mark(question: Question, model: str) -> dict[str, Any]:
    """What a line is about."""
    pair = question.pair
    return {"pair": pair.index, "order": question.order, "prompt": pair.prompt, "model": model, "pictures": list(pair.fingerprints)}
