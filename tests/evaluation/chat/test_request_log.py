import json

import pytest

from microdit.errors import UserError
from microdit.evaluation.chat.request_log import ENDED, Answer, RequestLog
from microdit.io.files import from_checked_json
from tests.damage import flips
from tests.evaluation.preference.test_verdicts_preference import lines_of

OTHER = "another comparison"


@pytest.fixture
def questions() -> list[dict]:
    return [{"pair": pair, "order": order, "model": "eyes"} for pair in (0, 1) for order in ("AB", "BA")]


def test_answers_are_remembered_and_requests_in_flight_counted_once(questions, tmp_path):
    path = tmp_path / "requests.jsonl"
    with RequestLog(path, questions, OTHER) as log:
        first, second, third, _ = map(log.exchange, questions)
        first.sending()
        first.answered(Answer("I like cats.", 7))
        second.sending()
        second.failed("The server is busy.")
        second.sending()  # killed here
        third.sending()
        assert [line["event"] for line in lines_of(path)] == ["sent", "answered", "sent", "failed", "sent", "sent"]
    with RequestLog(path, questions, OTHER) as log:
        assert log.lost == 2
        assert log.exchange(questions[0]).answers == [Answer("I like cats.", 7)]
        assert [log.exchange(question).answers for question in questions[1:]] == [[], [], []]
        assert [line.get("why") for line in lines_of(path)[-2:]] == [ENDED, ENDED]
    with RequestLog(path, questions, OTHER) as log:
        assert log.lost == 0


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[" * 100_000, "[]", "{}", '{"pair": [], "order": "AB"}', "an answer without its tokens", "an event that is none"],
)
def test_a_line_that_makes_no_sense_is_named(questions, tmp_path, line):
    path = tmp_path / "requests.jsonl"
    with RequestLog(path, questions, OTHER) as log:
        log.exchange(questions[0]).sending()
    known = from_checked_json(path.read_bytes().rstrip())
    strange = {"an answer without its tokens": {**known, "event": "answered"}, "an event that is none": {**known, "event": "lost"}}
    path.write_text(path.read_text() + (json.dumps(strange[line]) if line in strange else line) + "\n")
    with pytest.raises(UserError, match=r"Line 2 of .*requests\.jsonl is not a log entry of a request: remove the line"):
        RequestLog(path, questions, OTHER)
    path.write_text("")
    RequestLog(path, questions, OTHER).__exit__()  # the file was let go


def test_no_flipped_byte_changes_what_was_sent_or_answered(questions, tmp_path):
    path = tmp_path / "requests.jsonl"
    with RequestLog(path, questions, OTHER) as log:
        log.exchange(questions[0]).sending()
        log.exchange(questions[0]).answered(Answer("I like cats.", 7))
    content = path.read_bytes()
    for at in flips(path, range(len(content) - 1)):
        line = 1 if at <= content.index(b"\n") else 2
        with pytest.raises(UserError, match=rf"Line {line} of .*requests\.jsonl is not a log entry of a request"):
            RequestLog(path, questions, OTHER)


@pytest.mark.parametrize("change", [{"model": "other eyes"}, {"pair": "0"}])
def test_requests_of_another_comparison_are_not_mixed_in(questions, tmp_path, change):
    path = tmp_path / "requests.jsonl"
    with RequestLog(path, questions, OTHER) as log:
        log.exchange(questions[0]).sending()
    with pytest.raises(UserError, match=r"Line 1 of .*belongs to another comparison: choose another --out"):
        RequestLog(path, [question | change for question in questions], OTHER)
