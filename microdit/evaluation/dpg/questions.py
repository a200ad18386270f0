"""DPG-Bench (Hu et al. 2024, arXiv 2403.05135): dense prompts, each with a tree of yes-or-no questions, and the score of the answers.

- The folder has the layout of the authors' repository: `prompts/NAME.txt`, and a CSV of questions whose `item_id` is NAME.
- A question that depends on another one counts as no where that one counts as no.
- A picture's score is the share of its questions that count as yes; a prompt's is the mean over its pictures; the benchmark's is the mean
  over prompts, times 100. Categories are shares of the answers themselves, before dependencies, as in the authors' program.
- That program passes over the first question of its file, and takes categories from one picture of each prompt; here all count.
"""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microdit.errors import UserError
from microdit.io.untrusted_text import decode_text

COLUMNS = ("item_id", "proposition_id", "dependency", "category_broad", "category_detailed", "question_natural_language")
NO_PARENT = 0  # what the column `dependency` says of a question that depends on none

Answers = Mapping[int, bool]
"""What was answered about one picture, by number of the question: True for yes."""


@dataclass(frozen=True)
class Proposition:
    """A yes-or-no question about a picture. It depends on those numbered `parents`, of the same prompt."""

    number: int
    question: str
    parents: tuple[int, ...]
    category: str  # such as attribute
    detail: str  # such as color


@dataclass(frozen=True)
class DPGPrompt:
    """A prompt with its questions, in the order of the file. `name` is that of the file that holds the prompt."""

    name: str
    text: str
    propositions: tuple[Proposition, ...]


@dataclass(frozen=True)
class DPGScores:
    """Scores in percent: of all prompts, and the share of yes by category and by detail ("attribute - color")."""

    score: float
    categories: dict[str, float]
    details: dict[str, float]


def read_dpg_prompts(folder: Path, warn: Callable[[str], None]) -> list[DPGPrompt]:
    """Read prompts and questions, sorted by name. Prompts without questions, and questions without a prompt, are left out with a warning.

    Raises UserError naming the file, and the line of the CSV, if anything is missing or malformed.
    """
    files = {path.stem: path for path in sorted((folder / "prompts").glob("*.txt"))}
    tables = sorted(folder.glob("*.csv"))
    if not files or len(tables) != 1:
        raise UserError(
            f"{folder} must hold a folder named prompts with .txt files, and one .csv of questions, as DPG-Bench's: it has {len(files)} "
            f"prompts and {len(tables)} .csv files."
        )
    questions = _read_questions(tables[0])
    both = [name for name in files if name in questions]
    alone = len(files) + len(questions) - 2 * len(both)
    if alone:
        warn(f"{alone} of the prompts in {folder} have no questions in {tables[0].name}, or the other way round: they are left out.")
    if not both:
        raise UserError(f"No item_id of {tables[0]} is the name of a file in {folder / 'prompts'}.")
    return [DPGPrompt(name, _read_prompt(files[name]), questions[name]) for name in both]


def score(answers: Sequence[tuple[DPGPrompt, Sequence[Answers]]]) -> DPGScores:
    """Compute the scores from the answers about each picture of each prompt. Raises UserError if there are none."""
    if not answers:
        raise UserError("There are no answers to score.")
    by_prompt: list[float] = []
    categories: dict[str, list[float]] = defaultdict(list)
    details: dict[str, list[float]] = defaultdict(list)
    for prompt, pictures in answers:
        by_prompt.append(prompt_score(prompt, pictures))
        for one in prompt.propositions:
            categories[one.category] += [picture[one.number] for picture in pictures]
            details[f"{one.category} - {one.detail}"] += [picture[one.number] for picture in pictures]
    return DPGScores(_percent(by_prompt), *({name: _percent(found[name]) for name in sorted(found)} for found in (categories, details)))


def prompt_score(prompt: DPGPrompt, pictures: Sequence[Answers]) -> float:
    """Return the mean score of a prompt's pictures, from 0 to 1."""
    return sum(picture_score(prompt, picture) for picture in pictures) / len(pictures)


def picture_score(prompt: DPGPrompt, answers: Answers) -> float:
    """Return the share of a picture's questions that count as yes: answered yes, and so were all that they depend on.

    Questions are taken in the order of the file, so that a no goes on to the questions that depend on dependent ones.
    """
    counts = dict(answers)
    for one in prompt.propositions:
        counts[one.number] = counts[one.number] and all(counts[parent] for parent in one.parents)
    return sum(counts.values()) / len(counts)


def _percent(shares: Sequence[float]) -> float:
    return 100 * sum(shares) / len(shares)


def _read_prompt(path: Path) -> str:
    text = " ".join(_read_text(path).split())
    if not text:
        raise UserError(f"{path} holds no prompt.")
    return text


def _read_text(path: Path) -> str:
    try:
        return decode_text(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _read_questions(path: Path) -> dict[str, tuple[Proposition, ...]]:
    """Return the questions of each item, in the order of the file."""
    rows = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}: it must be DPG-Bench's table of questions.")
    found: dict[str, list[Proposition]] = defaultdict(list)
    try:
        for row in rows:
            found[str(row["item_id"]).strip()].append(_proposition(row, f"{path}, line {rows.line_num}"))
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: this is no CSV ({error}).") from error
    for name, propositions in found.items():
        _check_numbers(propositions, f"{path}: the questions of {name}")
    return {name: tuple(propositions) for name, propositions in found.items()}


def _proposition(row: dict[str, Any], where: str) -> Proposition:
    values = {name: (row[name] or "").strip() for name in COLUMNS}
    if not re.fullmatch(r"[\w.-]{1,200}", values["item_id"]):
        raise UserError(f"{where}: item_id is {values['item_id']!r}, which cannot be the name of a file.")
    if not values["question_natural_language"] or not values["category_broad"]:
        raise UserError(f"{where}: there is no question, or no category_broad.")
    try:
        number, *parents = (int(part) for part in (values["proposition_id"], *values["dependency"].split(",")))
    except ValueError:
        raise UserError(f"{where}: proposition_id and dependency must be whole numbers, such as 3 and 1,2; 0 is no dependency.") from None
    needed = tuple(parent for parent in parents if parent != NO_PARENT)
    return Proposition(number, values["question_natural_language"], needed, values["category_broad"], values["category_detailed"])


def _check_numbers(propositions: list[Proposition], where: str) -> None:
    numbers = [one.number for one in propositions]
    if len(set(numbers)) != len(numbers):
        raise UserError(f"{where} have a proposition_id twice.")
    unknown = sorted({parent for one in propositions for parent in one.parents} - set(numbers))
    if unknown:
        raise UserError(f"{where} depend on {', '.join(map(str, unknown))}, which are not among them.")
