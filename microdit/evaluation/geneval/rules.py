"""GenEval's rules (Ghosh et al. 2023, arXiv 2310.11513): decide from an image's detections whether it shows what its prompt asks for.

- Nothing here looks at pixels. Detections are given, and a colour is requested only where the prompt names one.
- Thresholds, the order of the checks and the rule for positions follow the authors' program, so that scores are comparable.
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
from microdit.io.untrusted_text import parse_json_object

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

CONFIDENCE = 0.3  # detections with a higher score count
COUNTING_CONFIDENCE = 0.9  # the same threshold for the counting task
MAX_OBJECTS = 16  # per class
MAX_OVERLAP = 1.0  # intersection over union at which the less confident detection is dropped; the authors' value of 1 drops none
POSITION_MARGIN = 0.1  # minimal distance of two centres, as a fraction of the sum of both boxes' sizes

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


@dataclass(frozen=True, eq=False)
class Detection:
    """One detected object. `mask` (H, W) is true where the object is; None if the detector gives no masks."""

    class_name: str
    score: float
    box: Box
    mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class ObjectRequirement:
    """A number of objects of a class. `relation` places them relative to the objects of an earlier entry of `include`."""

    class_name: str
    count: int
    colour: str | None = None
    relation: tuple[str, int] | None = None


@dataclass(frozen=True)
class GenEvalPrompt:
    """A prompt with the objects that its image must and must not contain. `metadata` is the JSON it was read from."""

    tag: str
    text: str
    include: tuple[ObjectRequirement, ...]
    exclude: tuple[ObjectRequirement, ...]
    metadata: str


@dataclass(frozen=True)
class Judgement:
    """The verdict on an image: `correct`, or else `reasons`, a sentence for each mistake."""

    correct: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """Shares of correct images by task. `overall` is the mean over the six tasks, or None if a task has no images."""

    tasks: dict[str, float]
    overall: float | None
    pictures: int


def read_prompts(path: Path) -> list[GenEvalPrompt]:
    """Read a file in the format of the authors' evaluation_metadata.jsonl. Raises UserError naming file and line if it is malformed."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompts {path} cannot be read: {error}.") from error
    prompts = [parse_prompt(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise UserError(f"There are no prompts in {path}: it needs one JSON object per line, as GenEval's evaluation_metadata.jsonl.")
    return prompts


def parse_prompt(line: str | bytes, where: str) -> GenEvalPrompt:
    """Parse one line of such a file. Raises UserError, with a message that begins with `where`."""
    try:
        entry = parse_json_object(line)
    except ValueError as error:
        raise UserError(f"{where}: a JSON object is expected ({error}).") from error
    tag, text = entry.get("tag"), entry.get("prompt")
    if tag not in TASKS:
        raise UserError(f"{where}: tag is {tag!r}; it must be one of {', '.join(TASKS)}.")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: there is no prompt.")
    include, exclude = (_parse_requirements(entry.get(key, []), f"{where}: {key}") for key in ("include", "exclude"))
    if not include:
        raise UserError(f"{where}: include names no object that the image should contain.")
    return GenEvalPrompt(tag, text, include, exclude, json.dumps(entry, sort_keys=True))


def judge(prompt: GenEvalPrompt, detections: Iterable[Detection], colour_of: Callable[[Detection], str]) -> Judgement:
    """Judge whether the image contains everything that the prompt includes and nothing that it excludes.

    Colours and positions are checked for the most confident objects only, as many as the prompt asks for.
    """
    found = confident_objects(detections, prompt.tag)
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []  # by entry of include; None if it was not satisfied
    for required in prompt.include:
        objects = found.get(required.class_name, [])[: required.count]
        reason = _missing(required, objects) or _wrong_colour(required, objects, colour_of) or _wrong_place(required, objects, matched)
        matched.append(None if reason else objects)
        reasons += [reason] if reason else []
    for excluded in prompt.exclude:
        number = len(found.get(excluded.class_name, []))
        if number >= excluded.count:
            reasons.append(f"Expected fewer than {excluded.count} of {excluded.class_name}, found {number}.")
    return Judgement(not reasons, tuple(reasons))


def confident_objects(detections: Iterable[Detection], tag: str) -> dict[str, list[Detection]]:
    """Return the detections that count for the task `tag`, grouped by class, the most confident first."""
    threshold = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    by_class = defaultdict(list)
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score > threshold:
            by_class[detection.class_name].append(detection)
    return {name: suppress_overlapping(objects[:MAX_OBJECTS]) for name, objects in by_class.items()}


def suppress_overlapping(objects: list[Detection], max_overlap: float = MAX_OVERLAP) -> list[Detection]:
    """Drop objects that overlap a more confident one too much. `objects` are sorted, the most confident first."""
    kept: list[Detection] = []
    for candidate in objects:
        if max_overlap == 1 or all(overlap(candidate.box, other.box) < max_overlap for other in kept):
            kept.append(candidate)
    return kept


def overlap(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes, which include their last pixels."""
    both = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    either = _area(a) + _area(b) - both
    return both / either if either else 0.0


def relations(a: Box, b: Box) -> set[str]:
    """Return where `a` is relative to `b`: zero, one or two of the four relations.

    On each axis, the distance of the centres is reduced by a tenth of both boxes' sizes. The remainder must exceed half of the whole
    distance. A diagonal offset satisfies two relations; boxes with nearly equal centres satisfy none.
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


def score(judgements: Iterable[tuple[str, bool]]) -> Scores:
    """Compute scores from the (tag, correct) pair of every image."""
    by_task = defaultdict(list)
    for tag, correct in judgements:
        by_task[tag].append(correct)
    tasks = {task: sum(by_task[task]) / len(by_task[task]) for task in TASKS if by_task[task]}
    overall = sum(tasks.values()) / len(TASKS) if len(tasks) == len(TASKS) else None
    return Scores(tasks, overall, sum(map(len, by_task.values())))


def _parse_requirements(entries: Any, where: str) -> tuple[ObjectRequirement, ...]:
    if not isinstance(entries, list):
        raise UserError(f"{where} must be a list.")
    return tuple(_parse_requirement(entry, n, f"{where}[{n}]") for n, entry in enumerate(entries))


def _parse_requirement(entry: Any, n: int, where: str) -> ObjectRequirement:
    if not isinstance(entry, dict) or not isinstance(entry.get("class"), str):
        raise UserError(f"{where} names no class.")
    count, colour, position = entry.get("count"), entry.get("color"), entry.get("position")
    if type(count) is not int or count < 1:
        raise UserError(f"{where}: count is {count!r}; it must be a whole number of at least 1.")
    if colour is not None and colour not in COLOURS:
        raise UserError(f"{where}: color is {colour!r}; it must be one of {', '.join(COLOURS)}.")
    return ObjectRequirement(entry["class"], count, colour, None if position is None else _relation(position, n, where))


def _relation(position: Any, n: int, where: str) -> tuple[str, int]:
    if not isinstance(position, list) or len(position) != 2 or position[0] not in RELATIONS:
        raise UserError(f'{where}: position is {position!r}; it must be like ["left of", 0], with one of {", ".join(RELATIONS)}.')
    if type(position[1]) is not int or not 0 <= position[1] < n:
        raise UserError(f"{where}: position refers to entry {position[1]!r}; it must be an entry before this one, counted from 0.")
    return position[0], position[1]


def _missing(required: ObjectRequirement, objects: list[Detection]) -> str | None:
    if len(objects) == required.count:
        return None
    return f"Expected at least {required.count} of {required.class_name}, found {len(objects)}."


def _wrong_colour(required: ObjectRequirement, objects: list[Detection], colour_of: Callable[[Detection], str]) -> str | None:
    if required.colour is None:
        return None
    colours = [colour_of(found) for found in objects]
    if all(colour == required.colour for colour in colours):
        return None
    said = ", ".join(f"{colours.count(colour)} {colour}" for colour in dict.fromkeys(colours))
    return f"Expected {required.count} {required.colour} of {required.class_name}, found {said}."


def _wrong_place(required: ObjectRequirement, objects: list[Detection], matched: list[list[Detection] | None]) -> str | None:
    if required.relation is None:
        return None
    relation, target = required.relation
    others = matched[target]
    if others is None:
        return f"Nothing was found for {required.class_name} to be {relation}."
    for found in objects:
        for other in others:
            true = relations(found.box, other.box)
            if relation not in true:
                said = " and ".join(name for name in RELATIONS if name in true) or "in no relation to"
                return f"Expected {required.class_name} {relation} {other.class_name}, found it {said} it."
    return None


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)
