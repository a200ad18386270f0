import json

import pytest

from microdit.errors import UserError
from microdit.evaluation.preference.request_log import ENDED, Answer, RequestLog
from microdit.evaluation.preference.verdicts import Question, both_orders, read_pairs
from tests.evaluation.preference.test_verdicts_preference import lines_of, write_folders


@pytest.fixture
def questions(tmp_path) -> list[Question]:
    return both_orders(read_pairs(*write_folders(tmp_path, 2)))


def test_answers_are_remembered_and_requests_in_flight_counted_once(questions, tmp_path):
    path = tmp_path / "requests.jsonl"
    with RequestLog(path, questions, "eyes") as log:
        first, second, third, _ = map(log.exchange, questions)
        first.sending()
        first.answered(Answer("I like cats.", 7))
        second.sending()
        second.failed("The server is busy.")
        second.sending()  # killed here
        third.sending()
        assert [line["event"] for line in lines_of(path)] == ["sent", "answered", "sent", "failed", "sent", "sent"]
    with RequestLog(path, questions, "eyes") as log:
        assert log.lost == 2
        assert log.exchange(questions[0]).answers == [Answer("I like cats.", 7)]
        assert [log.exchange(question).answers for question in questions[1:]] == [[], [], []]
        assert [line.get("why") for line in lines_of(path)[-2:]] == [ENDED, ENDED]
    with RequestLog(path, questions, "eyes") as log:
        assert log.lost == 0


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[" * 100_000, "[]", "{}", '{"pair": [], "order": "AB"}', "an answer without its tokens", "an event that is none"],
)
def test_a_line_that_makes_no_sense_is_named(questions, tmp_path, line):
    path = tmp_path / "requests.jsonl"
    with RequestLog(path, questions, "eyes") as log:
        log.exchange(questions[0]).sending()
    known = lines_of(path)[0]
    strange = {"an answer without its tokens": {**known, "event": "answered"}, "an event that is none": {**known, "event": "lost"}}
    path.write_text(path.read_text() + (json.dumps(strange[line]) if line in strange else line) + "\n")
    with pytest.raises(UserError, match=r"Line 2 of .*requests\.jsonl is not a log entry of a request: remove the line"):
        RequestLog(path, questions, "eyes")
    path.write_text("")
    RequestLog(path, questions, "eyes").__exit__()  # the file was let go


@pytest.mark.parametrize("change", ["model", "pictures"])
def test_requests_of_another_comparison_are_not_mixed_in(questions, tmp_path, change):
    path = tmp_path / "requests.jsonl"
    with RequestLog(path, questions, "eyes") as log:
        log.exchange(questions[0]).sending()
    others = both_orders(read_pairs(tmp_path / "b", tmp_path / "a")) if change == "pictures" else questions
    with pytest.raises(UserError, match="another comparison"):
        RequestLog(path, others, "other eyes" if change == "model" else "eyes")
