"""Pairwise preference between two models: pairs of images of the same prompts, a judge's verdicts on them, and the win rate.

- A vision model sees each pair in both orders, and a model wins a pair only if both verdicts agree; otherwise the pair is a tie. A judge
  with a position bias therefore favours neither model.
- Every verdict is on disk before the next one counts, so an interrupted comparison resumes (see request_log.py for requests billed twice).
"""

import random
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Literal, get_args

from PIL import Image

from microdit.errors import UserError
from microdit.io.files import from_checked_json, sha256_of
from microdit.io.line_file import LineFile
from microdit.io.untrusted_text import parse_json

Order = Literal["AB", "BA"]  # the model whose image is shown first comes first
ORDERS: tuple[Order, Order] = ("AB", "BA")
Choice = Literal["first", "second", "tie", "unclear"]  # a judge's choice; judges do not know the models
Winner = Literal["A", "B", "tie", "unclear"]


@dataclass(frozen=True)
class Pair:
    """Two models' images of one prompt. `fingerprints` are the hashes of the two files."""

    index: int
    prompt: str
    a: Path
    b: Path
    fingerprints: tuple[str, str]


@dataclass(frozen=True)
class Question:
    """A pair and the order in which its images are shown to the judge."""

    pair: Pair
    order: Order

    def pictures(self) -> tuple[Path, Path]:
        """Return the image shown first and the one shown second."""
        return (self.pair.a, self.pair.b) if self.order == "AB" else (self.pair.b, self.pair.a)


@dataclass(frozen=True)
class Reply:
    """A judge's choice, the text it was read from, and the tokens it cost."""

    choice: Choice
    answer: str
    tokens: int = 0


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on one question, as stored in a line of verdicts.jsonl."""

    pair: int
    prompt: str
    order: Order
    verdict: Winner
    answer: str
    model: str
    tokens: int
    pictures: tuple[str, str]


@dataclass(frozen=True)
class Preference:
    """Win rate of A over B, (wins + ties / 2) / pairs, with its 95% Wilson interval [low, high].

    Pairs with an unclear verdict are counted in `unclear` only. `disagreed` counts the pairs whose two orders got different verdicts;
    `consistency` is the share of the remaining pairs, or None if each pair was shown in one order only.
    """

    win_rate: float
    low: float
    high: float
    pairs: int
    a_wins: int
    b_wins: int
    ties: int
    unclear: int
    disagreed: int
    consistency: float | None
    tokens: int


def read_pairs(a: Path, b: Path) -> list[Pair]:
    """Read the images 0000.png, 0001.png ... of two folders, one for each line {"prompt": ...} of their prompts.jsonl.

    If both folders have a prompts.jsonl, the prompts must agree. Raises UserError if prompts are missing or differ, an image is missing or
    has no prompt, or a file is not a complete PNG.
    """
    found = [_read_prompts(path) for path in (a / "prompts.jsonl", b / "prompts.jsonl") if path.is_file()]
    if not found:
        raise UserError(f'There is no prompts.jsonl in {a} or {b}: write one line {{"prompt": ...}} per image, in order.')
    if found[0] != found[-1]:
        raise UserError(f"{a} and {b} hold images of different prompts (see their prompts.jsonl), which cannot be compared.")
    prompts = found[0]
    for folder in (a, b):
        if (extra := folder / _picture_name(len(prompts))).exists():
            raise UserError(f"{extra} has no prompt: prompts.jsonl has {len(prompts)} lines.")
    return [_pair(index, prompt, a / _picture_name(index), b / _picture_name(index)) for index, prompt in enumerate(prompts)]


def both_orders(pairs: list[Pair]) -> list[Question]:
    """Return two questions per pair, one for each order."""
    return [Question(pair, order) for pair in pairs for order in ORDERS]


def random_order(pairs: list[Pair], seed: int) -> list[Question]:
    """Return one question per pair, in random order and shuffled by `seed`, for people, who should not see a pair twice."""
    generator = random.Random(seed)
    questions = [Question(pair, generator.choice(ORDERS)) for pair in pairs]
    generator.shuffle(questions)
    return questions


class VerdictFile:
    """The verdicts on `questions`, stored in a `LineFile`. A question whose line was truncated is open again.

    Raises UserError if the file holds verdicts on other images, of another judge or in another order, or cannot be opened by `LineFile`.
    """

    def __init__(self, path: Path, questions: list[Question], model: str):
        self.path, self.questions, self.model = path, questions, model
        self._lock = threading.Lock()
        self._verdicts: dict[tuple[int, Order], Verdict] = {}
        self._file = LineFile(path)
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def waiting(self) -> list[Question]:
        """Return the questions without a verdict, in order."""
        with self._lock:
            return [question for question in self.questions if _key(question) not in self._verdicts]

    def add(self, question: Question, reply: Reply) -> Verdict | None:
        """Store and return a verdict; return None and write nothing if the question already has one. Thread-safe."""
        pair = question.pair
        winner = _winner(question.order, reply.choice)
        verdict = Verdict(pair.index, pair.prompt, question.order, winner, reply.answer, self.model, reply.tokens, pair.fingerprints)
        with self._lock:
            if _key(question) in self._verdicts:
                return None
            self._file.append(asdict(verdict))
            self._verdicts[_key(question)] = verdict
        return verdict

    def preference(self) -> Preference:
        """Summarise the verdicts. Raises UserError until at least one pair has all its verdicts, all of them clear."""
        with self._lock:
            verdicts = dict(self._verdicts)
        keys_by_pair: dict[int, list[tuple[int, Order]]] = {}
        for question in self.questions:
            keys_by_pair.setdefault(question.pair.index, []).append(_key(question))
        judged = [[verdicts[key].verdict for key in keys] for keys in keys_by_pair.values() if all(key in verdicts for key in keys)]
        return _summarise(judged, sum(verdict.tokens for verdict in verdicts.values()))

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()

    def _read(self) -> None:
        known = {_key(question): question.pair for question in self.questions}
        for number, line in enumerate(self._file.lines, start=1):
            verdict = _parse(line)
            if verdict is None:
                raise UserError(f"Line {number} of {self.path} is no verdict, or damaged: remove it, so that its question is judged again.")
            pair = known.get((verdict.pair, verdict.order))
            if pair is None or (pair.prompt, pair.fingerprints) != (verdict.prompt, verdict.pictures) or verdict.model != self.model:
                raise UserError(
                    f"Line {number} of {self.path} belongs to another comparison (other images, prompts, orders, or judge than "
                    f"'{self.model}'): write these verdicts to another file."
                )
            self._verdicts.setdefault((verdict.pair, verdict.order), verdict)


def wilson(successes: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a share. Ties count as half a success; they vary less, which makes the interval conservative."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def _read_prompts(path: Path) -> list[str]:
    prompts = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            prompt = parse_json(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise UserError(f'Line {number} of {path} must be {{"prompt": "..."}}.')
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} is empty, so there is nothing to compare.")
    return prompts


def _picture_name(index: int) -> str:
    return f"{index:04d}.png"


def _pair(index: int, prompt: str, a: Path, b: Path) -> Pair:
    for path in (a, b):
        if not path.is_file():
            raise UserError(f"The image {path} is missing, although prompts.jsonl has a line for it.")
        try:
            with Image.open(path, formats=["PNG"]) as image:
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            raise UserError(f"{path} is not a complete PNG file: generate it again.") from None
    return Pair(index, prompt, a, b, (sha256_of(a), sha256_of(b)))


def _key(question: Question) -> tuple[int, Order]:
    return question.pair.index, question.order


def _winner(order: Order, choice: Choice) -> Winner:
    if choice in ("tie", "unclear"):
        return choice
    return "A" if (choice == "first") == (order == "AB") else "B"


def _parse(line: bytes) -> Verdict | None:
    try:
        fields = from_checked_json(line)
        verdict = Verdict(**{**fields, "pictures": tuple(fields["pictures"])})
    except (ValueError, KeyError, TypeError):
        return None
    return verdict if verdict.verdict in get_args(Winner) else None


def _summarise(judged: list[list[Winner]], tokens: int) -> Preference:
    clear = [verdicts for verdicts in judged if "unclear" not in verdicts]
    if not clear:
        raise UserError(f"No pair has clear verdicts yet ({len(judged) - len(clear)} unclear), so A and B cannot be compared.")
    outcomes = [verdicts[0] if len(set(verdicts)) == 1 else "tie" for verdicts in clear]
    a_wins, b_wins, ties = (outcomes.count(outcome) for outcome in ("A", "B", "tie"))
    disagreed = sum(len(set(verdicts)) > 1 for verdicts in clear)
    score = a_wins + ties / 2
    return Preference(
        score / len(clear),
        *wilson(score, len(clear)),
        pairs=len(clear),
        a_wins=a_wins,
        b_wins=b_wins,
        ties=ties,
        unclear=len(judged) - len(clear),
        disagreed=disagreed,
        consistency=1 - disagreed / len(clear) if max(map(len, clear)) > 1 else None,
        tokens=tokens,
    )
