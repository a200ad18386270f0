"""Subsets of a source, chosen by a hash of each record's key: a fraction of it, and a share that is held out.

Such a choice depends on neither the order of the records, nor interruptions, nor the number of processes, and it stays when records are
added. Records with equal keys, such as those of several archives, are chosen together.
"""

import hashlib
import heapq
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from microdit.data.sources.base import END, Part, Record, Source, checked
from microdit.errors import UserError

LIMIT = 2**64  # above all hashes
HELD_OUT_SALT = b"held out\0"  # so that a held-out share is independent of a fraction
HOLD_OUT_HOW = "write a share, such as 5%, or a number of pictures, such as 500"


@dataclass(frozen=True)
class HoldOut:
    """The number of records to hold out: a share between 0 and 1, or a number of records. `words` is what the user wrote."""

    words: str
    share: float | None
    count: int

    @classmethod
    def parse(cls, words: str) -> "HoldOut":
        """Parse "5%" or "500". Raises UserError for anything else, and unless a share lies between 0% and 100%."""
        match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)(%?)", words.strip())
        if match is None or (not match[2] and "." in match[1]):
            raise UserError(f"--hold-out {words}: {HOLD_OUT_HOW}.")
        number = float(match[1])
        if not number or (match[2] and number >= 100):
            raise UserError(f"--hold-out {words} leaves nothing to train on or nothing to hold out: {HOLD_OUT_HOW}.")
        return cls(words.strip(), number / 100 if match[2] else None, 0 if match[2] else int(number))


@dataclass(frozen=True)
class Hashes:
    """The hashes in [low, high). `with_ends` adds the reports that a part ends early, which stand for an unknown number of records."""

    low: float
    high: float
    salt: bytes = b""
    with_ends: bool = True


def fraction_of(source: Source, fraction: float) -> Source:
    """Return the records whose key's hash falls into the first `fraction` of all hashes. A larger fraction contains a smaller one.

    Raises UserError unless the fraction lies in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"The fraction of {source.name} is {fraction}, and must lie in (0, 1]: 0.1 keeps a tenth.")
    if fraction == 1:
        return source
    return _subset(source, Hashes(0, fraction * LIMIT), str(fraction))


def split_off(source: Source, hold_out: HoldOut) -> tuple[Source, Source]:
    """Return the records to train on and those to hold out. Every record, and every file that is passed over, is in one of the two.

    A number of records is held out by a threshold, for which all keys are read first; unusable records do not count. Raises UserError if
    the source has no more usable records than that.
    """
    limit = _limit_for(source, hold_out.count) if hold_out.share is None else round(hold_out.share * LIMIT)
    training = _subset(source, Hashes(limit, LIMIT, HELD_OUT_SALT), f"all but the held-out {hold_out.words}")
    held_out = _subset(source, Hashes(0, limit, HELD_OUT_SALT, with_ends=False), f"the held-out {hold_out.words}")
    return (
        replace(training, name=f"{source.name}, without the held-out {hold_out.words}"),
        replace(held_out, name=f"{source.name}, the held-out {hold_out.words}", passed_over={}, note=""),
    )


def _subset(source: Source, chosen: Hashes, words: str) -> Source:
    parts = [replace(part, records=partial(_kept, part, chosen), known=partial(_described, part, words)) for part in source.parts]
    return replace(source, parts=parts)


def _kept(part: Part, chosen: Hashes) -> Iterator[Record]:
    for record in part.records():
        if chosen.with_ends if record.key.endswith(END) else chosen.low <= _hash(record.key, chosen.salt) < chosen.high:
            yield record


def _described(part: Part, words: str) -> str:
    return f"{words} of {part.known()}"


def _limit_for(source: Source, count: int) -> int:
    """Return a limit below which the hashes of `count` usable records lie."""
    records = chain.from_iterable(checked(part.records(), source.caption_weights) for part in source.parts)
    smallest = heapq.nsmallest(count + 1, (_hash(record.key, HELD_OUT_SALT) for record in records if not record.problem))
    if len(smallest) <= count:
        raise UserError(
            f"--hold-out {count:,} leaves nothing to train on: {source.name} has {len(smallest):,} usable pictures. Hold out fewer."
        )
    return smallest[count - 1] + 1


def _hash(key: str, salt: bytes = b"") -> int:
    return int.from_bytes(hashlib.sha256(salt + key.encode(errors="surrogatepass")).digest()[:8], "big")
