"""Preview a source before encoding it: sample images with captions, and statistics."""

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from PIL import Image

from microdit.data.decode import Rejected, decode
from microdit.data.sources.base import Record, Source, checked
from microdit.data.sources.untrusted_files import sum_of_kinds

MOST_PARTS = 20  # parts that are opened, evenly spread over the source
SHOWN_SIDE = 512  # pixels; larger images are shrunk, so that many fit in memory
PORTRAIT, LANDSCAPE = 0.8, 1.25  # width / height


def look(source: Source, sample: int = 16, limit: int = 2000) -> tuple[list[Image.Image], list[str], dict[str, Any]]:
    """Return `sample` images evenly spread over up to `limit` records, their captions, and statistics of all these records.

    Where an image has several captions, the one with the largest weight counts. Nothing is written.
    """
    seen = 0
    passed_over = dict(source.passed_over)
    problems: Counter[str] = Counter()
    digests: Counter[bytes] = Counter()
    captions: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    kept = _EvenlySpread(sample)
    heaviest_first = sorted(source.caption_weights, key=source.caption_weights.__getitem__, reverse=True)
    for record in _some_records(source, heaviest_first, limit):
        seen += 1
        passed_over = sum_of_kinds(passed_over, record.passed_over) if record.passed_over else passed_over
        try:
            image, caption = _usable(record)
        except Rejected as rejected:
            problems[rejected.reason] += 1
            continue
        digests[hashlib.sha256(record.image).digest()] += 1
        captions[caption] += 1
        sizes.append(image.size)
        kept.add((image, caption))
    numbers = {
        "records": seen,
        "usable": len(sizes),
        "problems": dict(problems.most_common()),
        "passed_over": passed_over,
        "width": _spread([width for width, _ in sizes]),
        "height": _spread([height for _, height in sizes]),
        "aspect_ratios": _aspect_ratios(sizes),
        "caption_words": _spread([len(caption.split()) for caption in captions.elements()], mean=True),
        "duplicate_images": digests.total() - len(digests),
        "duplicate_captions": captions.total() - len(captions),
    }
    numbers |= {"joined": source.joined()} if source.joined else {}
    shown = kept.chosen()
    return [image for image, _ in shown], [caption for _, caption in shown], numbers


def _some_records(source: Source, captions: list[str], limit: int) -> Iterator[Record]:
    """Yield the first records of parts that are evenly spread over the source, equally many of each part."""
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
