"""Votes of people, without the page (see tests/serve/test_votes_api.py for that)."""

from pathlib import Path

import pytest

from microdit.evaluation.preference.verdicts import Question, VerdictFile, random_order, read_pairs
from microdit.evaluation.preference.votes import HUMAN, VotingSession
from tests.evaluation.preference.test_verdicts_preference import lines_of, write_folders


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return random_order(read_pairs(*write_folders(tmp_path, 6)), seed=3)


def test_each_question_gets_one_vote_and_the_last_one_ends_it(questions, tmp_path):
    session = VotingSession(VerdictFile(tmp_path / "verdicts.jsonl", questions, HUMAN))
    assert len(session) == 6
    for number, question in enumerate(questions):
        assert not session.is_over
        assert session.state() == {"done": number, "total": 6, "question": number, "prompt": question.pair.prompt}
        assert (session.image(str(number), "first"), session.image(str(number), "second")) == question.pictures()
        assert session.add(number, "first")
        assert not session.add(number, "second")
    assert session.is_over
    assert session.state() == {"done": 6, "total": 6}
    winners = [line["verdict"] for line in lines_of(tmp_path / "verdicts.jsonl")]
    assert winners == ["A" if question.order == "AB" else "B" for question in questions]


@pytest.mark.parametrize(
    ("number", "side"), [("6", "first"), ("-1", "first"), ("0", "third"), ("00", "first"), ("\u0660", "first"), ("", "")]
)
def test_there_are_no_other_images(questions, tmp_path, number, side):
    assert VotingSession(VerdictFile(tmp_path / "verdicts.jsonl", questions, HUMAN)).image(number, side) is None


def test_a_restarted_session_continues(questions, tmp_path):
    file = VerdictFile(tmp_path / "verdicts.jsonl", questions, HUMAN)
    VotingSession(file).add(0, "tie")
    state = VotingSession(file).state()
    file.close()
    assert VotingSession(VerdictFile(file.path, questions, HUMAN)).state() == state
    assert (state["done"], state["question"]) == (1, 1)
