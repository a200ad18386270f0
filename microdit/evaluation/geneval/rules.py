"""GenEval's rules (Ghosh et al. 2023, arXiv 2310.11513): does a picture, given what was detected in it, show what its prompt asks for?

- Nothing here looks at pictures: detections come in, and the colour of one is asked for only where the prompt names a colour.
- Thresholds, the order of the checks and the rule for positions are those of the authors' program, so that scores can be compared.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microdit.errors import UserError
from microdit.io.text import parse_json_object

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

CONFIDENCE = 0.3  # a detection counts above it
COUNTING_CONFIDENCE = 0.9  # the same where objects are counted
MAX_OBJECTS = 16  # of a class
MAX_OVERLAP = 1.0  # intersection over union from which the less confident of two is dropped; the authors' 1 drops none
POSITION_MARGIN = 0.1  # of both boxes' sizes: so far apart must centres be

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


@dataclass(frozen=True, eq=False)
class Detection:
    """One object found in a picture. `mask` is true where it is, with the height and width of the picture; None if not known."""

    class_name: str
    score: float
    box: Box
    mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Wanted:
    """So many objects of a class. `relation` says where they are, seen from the objects of an earlier entry of `include`."""

    class_name: str
    count: int
    colour: str | None = None
    relation: tuple[str, int] | None = None


@dataclass(frozen=True)
class GenEvalPrompt:
    """A prompt, with what must be in its picture and what must not. `metadata` is the JSON it was read from."""

    tag: str
    text: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...]
    metadata: str


@dataclass(frozen=True)
class Verdict:
    """`reasons`: a sentence for each thing that is wrong; none if the picture is correct."""

    correct: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """Shares of correct pictures, by task; `overall` is the mean of the six, None while a task has no pictures."""

    tasks: dict[str, float]
    overall: float | None
    pictures: int


def read_prompts(path: Path) -> list[GenEvalPrompt]:
    """A file like the authors' evaluation_metadata.jsonl. Raises UserError, with file and line, at whatever does not fit."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompts {path} cannot be read: {error}.") from error
    prompts = [parse_prompt(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise UserError(f"There are no prompts in {path}: one line of JSON each is expected, as in GenEval's evaluation_metadata.jsonl.")
    return prompts


def parse_prompt(line: str, where: str) -> GenEvalPrompt:
    """One line of such a file. Raises UserError, which begins with `where`."""
    try:
        entry = parse_json_object(line)
    except ValueError as error:
        raise UserError(f"{where}: a JSON object is expected ({error}).") from error
    tag, text = entry.get("tag"), entry.get("prompt")
    if tag not in TASKS:
        raise UserError(f"{where}: tag is {tag!r}; it must be one of {', '.join(TASKS)}.")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: there is no prompt.")
    include, exclude = (_wanted_list(entry.get(key, []), f"{where}: {key}") for key in ("include", "exclude"))
    if not include:
        raise UserError(f"{where}: include names nothing that should be in the picture.")
    return GenEvalPrompt(tag, text, include, exclude, json.dumps(entry, sort_keys=True))


def judge(prompt: GenEvalPrompt, detections: Iterable[Detection], colour_of: Callable[[Detection], str]) -> Verdict:
    """Whether all that is to be included is there, and nothing of what is excluded.

    Colour and position are looked at in the most confident objects only, as many as the prompt asks for.
    """
    found = confident_objects(detections, prompt.tag)
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []  # by entry of include; None if it was not satisfied
    for wanted in prompt.include:
        objects = found.get(wanted.class_name, [])[: wanted.count]
        reason = _missing(wanted, objects) or _wrong_colour(wanted, objects, colour_of) or _wrong_place(wanted, objects, matched)
        matched.append(None if reason else objects)
        reasons += [reason] if reason else []
    for unwanted in prompt.exclude:
        number = len(found.get(unwanted.class_name, []))
        if number >= unwanted.count:
            reasons.append(f"Expected fewer than {unwanted.count} of {unwanted.class_name}, found {number}.")
    return Verdict(not reasons, tuple(reasons))


def confident_objects(detections: Iterable[Detection], tag: str) -> dict[str, list[Detection]]:
    """Those that count in a task, by class, the most confident first."""
    threshold = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    by_class = defaultdict(list)
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score > threshold:
            by_class[detection.class_name].append(detection)
    return {name: suppress_overlapping(objects[:MAX_OBJECTS]) for name, objects in by_class.items()}


def suppress_overlapping(objects: list[Detection], max_overlap: float = MAX_OVERLAP) -> list[Detection]:
    """Without those that overlap a more confident one too much. `objects` are sorted, the most confident first."""
    kept: list[Detection] = []
    for candidate in objects:
        if max_overlap == 1 or all(overlap(candidate.box, other.box) < max_overlap for other in kept):
            kept.append(candidate)
    return kept


def overlap(a: Box, b: Box) -> float:
    """Intersection over union, where a box includes its last pixels."""
    both = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    either = _area(a) + _area(b) - both
    return both / either if either else 0.0


def relations(a: Box, b: Box) -> set[str]:
    """Where `a` is, seen from `b`: none, one or two of the four relations.

    A tenth of both boxes' sizes is taken off the distance of the centres, on each axis. What remains must be more than half of the whole
    distance: a diagonal is both relations, and boxes whose centres nearly agree are in none.
    """
    box_a, box_b = (np.array(box, dtype=float).reshape(2, 2) for box in (a, b))
    offset = box_a.mean(axis=0) - box_b.mean(axis=0)
    margin = POSITION_MARGIN * (np.abs(box_a[1] - box_a[0]) + np.abs(box_b[1] - box_b[0]))
    left_over = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    if (np.abs(left_over) < 1e-3).all():
        return set()
    dx, dy = left_over / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, true in holds.items() if true}


def score(verdicts: Iterable[tuple[str, bool]]) -> Scores:
    """From (tag, correct) of every picture."""
    by_task = defaultdict(list)
    for tag, correct in verdicts:
        by_task[tag].append(correct)
    tasks = {task: sum(by_task[task]) / len(by_task[task]) for task in TASKS if by_task[task]}
    overall = sum(tasks.values()) / len(TASKS) if len(tasks) == len(TASKS) else None
    return Scores(tasks, overall, sum(map(len, by_task.values())))


def _wanted_list(entries: Any, where: str) -> tuple[Wanted, ...]:
    if not isinstance(entries, list):
        raise UserError(f"{where} must be a list.")
    return tuple(_wanted(entry, n, f"{where}[{n}]") for n, entry in enumerate(entries))


def _wanted(entry: Any, n: int, where: str) -> Wanted:
    if not isinstance(entry, dict) or not isinstance(entry.get("class"), str):
        raise UserError(f"{where} names no class.")
    count, colour, position = entry.get("count"), entry.get("color"), entry.get("position")
    if type(count) is not int or count < 1:
        raise UserError(f"{where}: count is {count!r}; it must be a whole number of at least 1.")
    if colour is not None and colour not in COLOURS:
        raise UserError(f"{where}: color is {colour!r}; it must be one of {', '.join(COLOURS)}.")
    return Wanted(entry["class"], count, colour, None if position is None else _relation(position, n, where))


def _relation(position: Any, n: int, where: str) -> tuple[str, int]:
    if not isinstance(position, list) or len(position) != 2 or position[0] not in RELATIONS:
        raise UserError(f'{where}: position is {position!r}; it must be like ["left of", 0], with one of {", ".join(RELATIONS)}.')
    if type(position[1]) is not int or not 0 <= position[1] < n:
        raise UserError(f"{where}: position refers to entry {position[1]!r}; it must be an entry before this one, counted from 0.")
    return position[0], position[1]


def _missing(wanted: Wanted, objects: list[Detection]) -> str | None:
    if len(objects) == wanted.count:
        return None
    return f"Expected at least {wanted.count} of {wanted.class_name}, found {len(objects)}."


def _wrong_colour(wanted: Wanted, objects: list[Detection], colour_of: Callable[[Detection], str]) -> str | None:
    if wanted.colour is None:
        return None
    colours = [colour_of(found) for found in objects]
    if all(colour == wanted.colour for colour in colours):
        return None
    said = ", ".join(f"{colours.count(colour)} {colour}" for colour in dict.fromkeys(colours))
    return f"Expected {wanted.count} {wanted.colour} of {wanted.class_name}, found {said}."


def _wrong_place(wanted: Wanted, objects: list[Detection], matched: list[list[Detection] | None]) -> str | None:
    if wanted.relation is None:
        return None
    relation, target = wanted.relation
    others = matched[target]
    if others is None:
        return f"Nothing was found for {wanted.class_name} to be {relation}."
    for found in objects:
        for other in others:
            true = relations(found.box, other.box)
            if relation not in true:
                said = " and ".join(name for name in RELATIONS if name in true) or "in no relation to"
                return f"Expected {wanted.class_name} {relation} {other.class_name}, found it {said} it."
    return None


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)
