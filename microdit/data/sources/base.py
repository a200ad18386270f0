"""Where pictures and captions come from: a `Source` is a list of `Part`s, each an iterable of undecoded `Record`s.

A part is the unit of work: it becomes one shard of the encoded set, whatever process works on it. So the parts of a source, their
order and what is in them must not depend on anything but the source itself.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from microdit.errors import UserError

LONGEST_KEY = 1000  # characters
MAX_CAPTION = 4000  # characters that are kept; text encoders take 32 to 512 tokens

TARS = (".tar", ".tgz", ".tar.gz")
ARCHIVES = (*TARS, ".zip")
END = "#end"  # ends the key of a record which says that the rest of its part cannot be read


@dataclass(frozen=True)
class Record:
    """One picture with its captions, as the source holds them.

    `key` is unique in its part. `captions` maps a caption's name ("caption", "alt") to its text. `image` is the file's bytes.
    `problem` says, in a few words that are the same for all such records, why the source already knows that it cannot be used.
    """

    key: str
    captions: dict[str, str]
    image: bytes
    problem: str = ""


@dataclass(frozen=True)
class Part:
    """Records that belong together: a tar, a row group of a table, a thousand files. `records()` starts from the first each time.

    `files()` are those that it reads; `known()` is what decides on its records besides them: lines of a list, a choice among the records.
    """

    name: str
    records: Callable[[], Iterator[Record]]
    files: Callable[[], Iterable[Path]] = tuple
    known: Callable[[], str] = str

    def fingerprint(self) -> str:
        """A digest of the names, sizes and times of the files and of what is known: while it is the same, so are the records."""
        digest = hashlib.sha256(self.known().encode(errors="surrogatepass"))
        for path in self.files():
            try:
                status = path.stat()
                state = f"{status.st_size} {status.st_mtime_ns}"
            except (OSError, ValueError):
                state = "missing"
            digest.update(f"\0{path.name}\0{state}".encode(errors="surrogatepass"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """`caption_weights`: how often each caption is used when a picture has several; those not named are not used.

    `min_side`: pixels below which a picture is better left out, if the source knows.
    """

    name: str
    parts: list[Part]
    caption_weights: dict[str, float] = field(default_factory=lambda: {"caption": 1.0})
    license: str = ""
    min_side: int | None = None


def checked(records: Iterable[Record], captions: Collection[str]) -> Iterator[Record]:
    """The records of a part as they are encoded, with these captions, cleaned. One that cannot be used has a `problem`, and no file."""
    met: set[str] = set()
    for record in records:
        cleaned = {name: text for name in captions if (text := _clean(record.captions.get(name, "")))}
        problem = record.problem or _key_problem(record.key, met) or ("" if cleaned else "no caption")
        met.add(record.key)
        yield Record(record.key, cleaned, b"" if problem else record.image, problem)


def only_captions(name: str, own: Mapping[str, float], captions: Mapping[str, float] | None) -> dict[str, float]:
    """The weights to use for a source whose caption names are fixed. Raises UserError if others are asked for."""
    unknown = sorted(set(captions or {}) - set(own))
    if unknown:
        raise UserError(f"{name} has no caption named {', '.join(unknown)}; it has {', '.join(own)}.")
    return dict(captions or own)


def relative_names(files: list[Path]) -> list[str]:
    """Of each file below the deepest folder that holds them all: unique, and the same wherever that folder lies."""
    top = files[0].parent
    while not all(file.is_relative_to(top) for file in files):
        top = top.parent
    return [file.relative_to(top).as_posix() for file in files]


def _key_problem(key: str, met: Collection[str]) -> str:
    if key in met:
        return "duplicate key"
    if len(key) > LONGEST_KEY:
        return "file name is too long"
    return "file name is not UTF-8" if _has_surrogates(key) else ""


def _clean(caption: str) -> str:
    """One line of printable text, at most MAX_CAPTION characters; empty if it is no Unicode text at all (lone surrogates)."""
    start = caption[:MAX_CAPTION]
    return "" if _has_surrogates(start) else " ".join("".join(c if c.isprintable() else " " for c in start).split())


def _has_surrogates(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)
