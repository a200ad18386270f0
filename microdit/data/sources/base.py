"""The types of a data source: a `Source` is a list of `Part`s, each an iterable of undecoded `Record`s.

A part is the unit of work: it becomes one shard of the encoded data set, whichever process encodes it. The parts of a source, their
order and their content must therefore depend on nothing but the source itself. `open.py` opens a source by its name.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microdit.encoders.captions import MAX_CAPTION, clean_caption
from microdit.errors import UserError

LONGEST_KEY = 1000  # characters

TARS = (".tar", ".tgz", ".tar.gz", ".tar.zst", ".tar.bz2")
ARCHIVES = (*TARS, ".zip")
EMBEDDED = ("emoji", "scenes", "icons")  # the sources that are built in
END = "#end"  # suffix of the key of a record that reports that the rest of its part cannot be read


@dataclass(frozen=True)
class Record:
    """An image with its captions, as the source holds them.

    `key` is unique within its part. `captions` maps the name of a caption ("caption", "alt") to its text. `image` is the content of the
    image file. `problem` is the reason why the record cannot be used, if the source already knows one; records with the same problem have
    the same words, so that they can be counted. `passed_over` counts, by kind, the files met since the previous record that are neither
    images nor captions. `url` is where the image comes from, if the source says so.
    """

    key: str
    captions: dict[str, str]
    image: bytes
    problem: str = ""
    passed_over: Mapping[str, int] = field(default_factory=dict)
    url: str = ""


@dataclass(frozen=True)
class Part:
    """A group of records: a tar file, a row group of a table, or a thousand files.

    `records()` yields them, from the first one each time it is called. `files()` names the files that it reads. `known()` returns whatever
    else determines the records, as text: the lines of a list, or a choice among the records.
    """

    name: str
    records: Callable[[], Iterator[Record]]
    files: Callable[[], Iterable[Path]] = tuple
    known: Callable[[], str] = str

    def fingerprint(self) -> str:
        """Return a digest of `known()` and of the files' names, sizes and modification times. Equal digests mean equal records."""
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
    """A named list of parts.

    `caption_weights` says how often each caption is chosen where an image has several; captions without a weight are not used.
    `min_side` is the shortest side, in pixels, that an image should have, if the source recommends one. `note` is a sentence for whoever
    encodes the source, such as what it lacks. `passed_over` counts, by kind, the files beside the parts that are neither images nor
    captions; the records count those inside. `joined` counts the captions joined from another file, and the records, that found each other
    so far.
    """

    name: str
    parts: list[Part]
    caption_weights: dict[str, float] = field(default_factory=lambda: {"caption": 1.0})
    license: str = ""
    min_side: int | None = None
    note: str = ""
    passed_over: Mapping[str, int] = field(default_factory=dict)
    joined: Callable[[], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Contents:
    """The parts of a data set in a folder, and the `paths` that they read: files, and folders of which they read every image.

    Of the folder `captions`, if there is one, they read the text files.
    """

    parts: list[Part]
    paths: Iterable[Path]
    captions: Path | None = None


def checked(records: Iterable[Record], captions: Collection[str]) -> Iterator[Record]:
    """Yield the records of a part as they are encoded, with these captions only, cleaned. Unusable ones have a `problem` and no image."""
    met: set[str] = set()
    for record in records:
        cleaned = {name: text for name in captions if (text := _clean(record.captions.get(name, "")))}
        problem = record.problem or _key_problem(record.key, met) or ("" if cleaned else "no caption")
        met.add(record.key)
        yield Record(record.key, cleaned, b"" if problem else record.image, problem, record.passed_over)


def passed_over_in_words(counts: Mapping[str, int]) -> str:
    """Return the counts as words, the most frequent kind first: "248 .svg, 3 .mp4"."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def only_captions(name: str, own: Mapping[str, float], captions: Mapping[str, float] | None) -> dict[str, float]:
    """Return the caption weights for a source whose caption names are fixed. Raises UserError if `captions` has other names."""
    unknown = sorted(set(captions or {}) - set(own))
    if unknown:
        raise UserError(f"{name} has no caption named {', '.join(unknown)}; it has {', '.join(own)}.")
    return dict(captions or own)


def relative_names(files: list[Path]) -> list[str]:
    """Return the path of each file relative to the deepest folder that holds all of them: unique, and independent of its location."""
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
    """Clean a caption as prompts are cleaned; empty if it is no Unicode text at all (lone surrogates)."""
    return "" if _has_surrogates(caption[:MAX_CAPTION]) else clean_caption(caption)


def _has_surrogates(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)
