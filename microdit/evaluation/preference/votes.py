"""People as judges of image pairs: the pairs are shown one after another, without the models' names, and the first vote on each counts.

The page that shows them is served by serve/votes_api.py.
"""

from pathlib import Path
from typing import Any, Literal

from microdit.evaluation.preference.verdicts import Reply, VerdictFile

HUMAN = "human"  # the judge's name in verdicts.jsonl
Vote = Literal["first", "second", "tie"]


class VotingSession:
    """The votes on the questions of `file`, which are numbered from 0.

    All state is in the file, so a restarted session goes on with the next question without a vote.
    """

    def __init__(self, file: VerdictFile):
        self._file = file
        self._questions = file.questions
        self._numbers = {(question.pair.index, question.order): number for number, question in enumerate(file.questions)}
        self._images = {
            (str(number), side): path
            for number, question in enumerate(file.questions)
            for side, path in zip(("first", "second"), question.pictures(), strict=True)
        }

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self._questions)

    @property
    def is_over(self) -> bool:
        """True if every question has a vote."""
        return not self._file.waiting()

    def state(self) -> dict[str, Any]:
        """Return `done` and `total`, and before the end the number of the next `question` and its `prompt`; nothing reveals the models."""
        waiting = self._file.waiting()
        progress = {"done": len(self) - len(waiting), "total": len(self)}
        if not waiting:
            return progress
        pair = waiting[0].pair
        return {**progress, "question": self._numbers[pair.index, waiting[0].order], "prompt": pair.prompt}

    def image(self, number: str, side: str) -> Path | None:
        """Return the file of the image that question `number` shows on `side`, "first" or "second"; None for anything else."""
        return self._images.get((number, side))

    def add(self, number: int, vote: Vote) -> bool:
        """Store a vote, from any thread; return False if the question has one already. Raises UserError if the disk is full."""
        return self._file.add(self._questions[number], Reply(vote, vote)) is not None
