"""Findings of a preview that deserve a warning: mixed languages, near duplicates, small and odd pictures, captions that are cut.

Each finding names the records that show it.
"""

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

NAMED = 5  # records named in a warning
SMALL_SIDE = 64  # pixels; a picture with a shorter side is small, and so is one that is SMALL_SHARE as large as most others
SMALL_SHARE = 0.25
ODD_ASPECT = 3.0  # width / height, or the other way round; cropped to a square, less than a third of such a picture is left
FEW = 0.02  # share of the records below which a finding is no pattern
MOST_COMPARED = 20_000  # pictures compared with each other
NEAR_BITS = 3  # of 64 that may differ between near duplicates
NEAR_COLOUR = 12  # levels by which their mean colours may differ
FLAT_BITS = 6  # a picture with fewer bits set, or left, is too plain to compare

_SCRIPTS = (
    ("Chinese or Japanese", r"\u3040-\u30ff\u3400-\u9fff"),
    ("Korean", r"\uac00-\ud7af"),
    ("Cyrillic", r"\u0400-\u04ff"),
    ("Arabic or Persian", r"\u0600-\u06ff"),
    ("Hindi", r"\u0900-\u097f"),
    ("Greek", r"\u0370-\u03ff"),
    ("Hebrew", r"\u0590-\u05ff"),
    ("Thai", r"\u0e00-\u0e7f"),
)
_WORDS = {
    "English": "a the of and with in on is are an at for from by her his its two this that",
    "German": "der die das und mit ein eine einem einer auf im ist von zu den zwei auf nicht",
    "French": "le la les et avec un une de des du dans sur est au aux deux qui",
    "Spanish": "el la los las y con un una en de del por para es dos que su",
    "Italian": "il lo la gli e con un una uno di nel sul sono della due che",
    "Portuguese": "o a os as e com um uma de do da no na em dois que",
    "Dutch": "de het en met een op in van zijn twee die",
}
_STOPWORDS = {language: frozenset(words.split()) for language, words in _WORDS.items()}
_IN_SCRIPT = [(name, re.compile(f"[{span}]")) for name, span in _SCRIPTS]


@dataclass(frozen=True)
class Seen:
    """A usable record, as a preview keeps it: `shape` and `colour` are those of its pixels, `tokens` is the length of its caption."""

    key: str
    caption: str
    width: int
    height: int
    shape: int
    colour: tuple[int, int, int]
    tokens: int = 0


def shape_of(image: Image.Image) -> int:
    """Return 64 bits that nearly agree for copies of a picture in other sizes or qualities: where brightness falls from left to right."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1] + 1).tobytes(), "big")


def colour_of(image: Image.Image) -> tuple[int, int, int]:
    """Return the mean colour of an RGB image."""
    red, green, blue = np.asarray(image.resize((1, 1), Image.Resampling.BOX))[0, 0]
    return int(red), int(green), int(blue)


def language_of(caption: str) -> str:
    """Return the language of a caption by its script or its commonest words; empty if it is too short to tell."""
    letters = sum(map(str.isalpha, caption))
    for name, pattern in _IN_SCRIPT:
        if letters and len(pattern.findall(caption)) > letters / 2:
            return name
    words = set(re.findall(r"[^\W\d_]+", caption.lower()))  # each once: "a drawing of a heart" is not twice Portuguese
    scores = {language: sum(word in known for word in words) for language, known in _STOPWORDS.items()}
    best, *others = sorted(scores.values(), reverse=True)
    return next(language for language, score in scores.items() if score == best) if best >= 2 and best > others[0] else ""


def near_duplicates(seen: Sequence[Seen]) -> list[tuple[str, str]]:
    """Return pairs of keys of pictures that look alike, among the first `MOST_COMPARED`; of each later one with the first it resembles."""
    compared = [item for item in seen[:MOST_COMPARED] if FLAT_BITS <= item.shape.bit_count() <= 64 - FLAT_BITS]
    shapes_N = np.array([item.shape for item in compared], np.uint64)
    colours_N3 = np.array([item.colour for item in compared], np.int16).reshape(-1, 3)
    pairs = []
    for number, item in enumerate(compared):
        alike = np.bitwise_count(shapes_N[:number] ^ shapes_N[number]) <= NEAR_BITS
        alike &= np.abs(colours_N3[:number] - colours_N3[number]).max(axis=1, initial=0) <= NEAR_COLOUR
        if alike.any():
            pairs.append((compared[int(alike.argmax())].key, item.key))
    return pairs


def languages(seen: Sequence[Seen]) -> dict[str, int]:
    """Return how many captions are in each language, of those that tell."""
    return dict(Counter(language for item in seen if (language := language_of(item.caption))).most_common())


def histogram(lengths: Sequence[int], most: int) -> dict[str, int]:
    """Return how many captions have how many tokens, in eight bins up to the text encoder's limit, at which they are cut."""
    width = max(1, -(-most // 8))
    counts = Counter(min(length, most - 1) // width for length in lengths if length < most)
    bins = {f"{first}-{min(first + width, most) - 1}": counts[first // width] for first in range(0, most, width)}
    return bins | {f"{most} and cut": sum(length >= most for length in lengths)}


def warnings_of(seen: Sequence[Seen], pairs: Sequence[tuple[str, str]], encoder: str, max_tokens: int) -> list[str]:
    """Return a sentence for each finding, with the keys of some records."""
    few = FEW * len(seen)
    sides = [min(item.width, item.height) for item in seen]
    least = max(SMALL_SIDE, round(SMALL_SHARE * statistics.median(sides))) if sides else 0
    small = [item.key for item, side in zip(seen, sides, strict=True) if side < least]
    odd = [item.key for item in seen if max(item.width, item.height) > ODD_ASPECT * min(item.width, item.height)]
    cut = [item.key for item in seen if max_tokens and item.tokens >= max_tokens]
    sentences = []
    if len(found := languages(seen)) > 1 and sum(found.values()) - max(found.values()) > few:
        main = next(iter(found))
        others = [item.key for item in seen if language_of(item.caption) not in ("", main)]
        shares = ", ".join(f"{language} in {count:,}" for language, count in found.items())
        sentences.append(f"The captions are in several languages: {shares}. {_names(others, 'not ' + main)}")
    if cut:
        sentences.append(
            f"{len(cut):,} captions are longer than the {max_tokens} tokens that {encoder} reads, and will be cut. {_names(cut)}"
        )
    if len(small) > few:
        sentences.append(f"{len(small):,} pictures have a side of less than {least} pixels. {_names(small)}")
    if len(odd) > few:
        sentences.append(f"{len(odd):,} pictures are more than {ODD_ASPECT:.0f} times as wide as high, or as high as wide. {_names(odd)}")
    if pairs:
        shown = "; ".join(f"{first} and {second}" for first, second in pairs[:NAMED])
        sentences.append(f"{len(pairs):,} pictures nearly repeat another one: {shown}{' and more' if len(pairs) > NAMED else ''}.")
    return sentences


def _names(keys: Sequence[str], what: str = "") -> str:
    more = f" and {len(keys) - NAMED:,} more" if len(keys) > NAMED else ""
    return f"They are{f' ({what})' if what else ''} {', '.join(keys[:NAMED])}{more}."
