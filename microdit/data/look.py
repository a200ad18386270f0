"""Preview a source before encoding it: sample images with captions, and statistics."""

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from PIL import Image

from microdit.data.decode import Rejected, decode
from microdit.data.findings import NAMED, Seen, colour_of, histogram, languages, near_duplicates, shape_of, warnings_of
from microdit.data.sources.base import Record, Source, checked
from microdit.data.sources.untrusted_files import sum_of_kinds

MOST_PARTS = 20  # parts that are opened, evenly spread over the source
SHOWN_SIDE = 512  # pixels; larger images are shrunk, so that many fit in memory
PORTRAIT, LANDSCAPE = 0.8, 1.25  # width / height


@dataclass(frozen=True)
class TextLimit:
    """The text encoder that will read the captions: its name, its longest caption in tokens, and the length of a caption, at most that."""

    name: str
    max_tokens: int
    count: Callable[[str], int]


def look(
    source: Source, sample: int = 16, limit: int = 2000, text: TextLimit | None = None
) -> tuple[list[Image.Image], list[str], dict[str, Any]]:
    """Return `sample` images evenly spread over up to `limit` records, their captions, and statistics of all these records.

    Where an image has several captions, the one with the largest weight counts. `text` counts their tokens. Nothing is written.
    """
    passed_over = dict(source.passed_over)
    problems: dict[str, list[str]] = {}
    digests: Counter[bytes] = Counter()
    seen: list[Seen] = []
    kept = _EvenlySpread(sample)
    heaviest_first = sorted(source.caption_weights, key=source.caption_weights.__getitem__, reverse=True)
    for record in some_records(source, heaviest_first, limit):
        passed_over = sum_of_kinds(passed_over, record.passed_over) if record.passed_over else passed_over
        try:
            image, caption = _usable(record)
        except Rejected as rejected:
            problems.setdefault(rejected.reason, []).append(record.key)
            continue
        digests[hashlib.sha256(record.image).digest()] += 1
        tokens = text.count(caption) if text else 0
        seen.append(Seen(record.key, caption, *image.size, shape_of(image), colour_of(image), tokens))
        kept.add((image, caption))
    shown = kept.chosen()
    is_sample = len(source.parts) > MOST_PARTS or len(seen) + sum(map(len, problems.values())) >= limit
    numbers = _statistics(source, seen, problems, passed_over, digests, text, is_sample)
    return [image for image, _ in shown], [caption for _, caption in shown], numbers


def _statistics(
    source: Source,
    seen: list[Seen],
    problems: dict[str, list[str]],
    passed_over: dict[str, int],
    digests: Counter[bytes],
    text: TextLimit | None,
    is_sample: bool,
) -> dict[str, Any]:
    captions = Counter(item.caption for item in seen)
    sizes = [(item.width, item.height) for item in seen]
    pairs = near_duplicates(seen)
    by_count = sorted(problems.items(), key=lambda item: -len(item[1]))
    numbers = {
        "records": len(seen) + sum(map(len, problems.values())),
        "usable": len(seen),
        "is_sample": is_sample,
        "problems": {reason: len(keys) for reason, keys in by_count},
        "passed_over": passed_over,
        "width": _spread([width for width, _ in sizes]),
        "height": _spread([height for _, height in sizes]),
        "aspect_ratios": _aspect_ratios(sizes),
        "caption_words": _spread([len(caption.split()) for caption in captions.elements()], mean=True),
        "languages": languages(seen),
        "duplicate_images": digests.total() - len(digests),
        "near_duplicates": len(pairs),
        "duplicate_captions": captions.total() - len(captions),
        "examples": {reason: keys[:NAMED] for reason, keys in by_count},
        "warnings": [
            *([source.note] if source.note else []),
            *warnings_of(seen, pairs, text.name if text else "", text.max_tokens if text else 0),
        ],
    }
    if text:
        numbers["caption_tokens"] = histogram([item.tokens for item in seen], text.max_tokens)
    return numbers | ({"joined": source.joined()} if source.joined else {})


def some_records(source: Source, captions: list[str], limit: int) -> Iterator[Record]:
    """Yield up to `limit` records: the first ones of up to MOST_PARTS parts, evenly spread over the source, equally many of each."""
    count = min(len(source.parts), MOST_PARTS)
    parts = [source.parts[n * len(source.parts) // count] for n in range(count)]
    left = limit
    for n, part in enumerate(parts):  # a short part leaves the rest of its share to the parts that follow
        for record in islice(checked(part.records(), captions), -(-left // (count - n))):
            left -= 1
            yield record


def _usable(record: Record) -> tuple[Image.Image, str]:
    """Return the image and its first caption. Raises Rejected."""
    if record.problem:
        raise Rejected(record.problem)
    return decode(record.image), next(iter(record.captions.values()))


class _EvenlySpread:
    """Keeps `count` of any number of images, evenly spread, without ever holding more than twice as many."""

    def __init__(self, count: int):
        self.count = count
        self.stride = 1
        self.seen = 0
        self.kept: list[tuple[Image.Image, str]] = []

    def add(self, item: tuple[Image.Image, str]) -> None:
        if self.seen % self.stride == 0:
            item[0].thumbnail((SHOWN_SIDE, SHOWN_SIDE))
            self.kept.append(item)
        self.seen += 1
        if len(self.kept) == 2 * self.count:
            self.kept = self.kept[::2]
            self.stride *= 2

    def chosen(self) -> list[tuple[Image.Image, str]]:
        count = min(self.count, len(self.kept))
        return [self.kept[n * len(self.kept) // count] for n in range(count)]


def _spread(values: list[int], mean: bool = False) -> dict[str, float]:
    if not values:
        return {}
    spread = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return spread | {"mean": round(statistics.fmean(values), 1)} if mean else spread


def _aspect_ratios(sizes: list[tuple[int, int]]) -> dict[str, int]:
    ratios = [width / height for width, height in sizes]
    portrait, landscape = sum(ratio < PORTRAIT for ratio in ratios), sum(ratio > LANDSCAPE for ratio in ratios)
    return {"portrait": portrait, "square": len(ratios) - portrait - landscape, "landscape": landscape}
