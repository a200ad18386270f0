"""A folder of pictures, captioned by text files beside them or by one list at its top. Every picture and every line counts once."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from microdit.data.listing import IMAGE_SUFFIXES, Listed, Pictures, find_images
from microdit.data.metadata import MetadataLines, caption_name, digest_of, find_lines, repeated_in
from microdit.data.sidecars import CAPTION_NAMES, from_sidecars, sidecars_for
from microdit.data.sources import Part, Record, Source
from microdit.data.untrusted import LARGEST_TEXT, NO_FILE, read_file, roots_of
from microdit.errors import UserError

LISTS = ("metadata.jsonl", "metadata.csv")
PART_SIZE = 1000  # pictures


@dataclass(frozen=True)
class Listing:
    """The records of a folder: the lines of its list, if it has one, then pictures. `wanted` are the captions in the lines."""

    pictures: Pictures
    lines: MetadataLines | None = None
    wanted: tuple[str, ...] = ()

    def __len__(self) -> int:
        return (len(self.lines) if self.lines else 0) + len(self.pictures)

    def __getitem__(self, which: slice) -> list[Listed]:
        start, stop, _ = which.indices(len(self))
        if self.lines is None:
            return self.pictures[start:stop]
        first = len(self.lines)  # of the pictures
        return self.lines.read(start, stop, self.wanted) + self.pictures[max(0, start - first) : max(0, stop - first)]


MakeListing = Callable[[], Listing]
ListOnce = Callable[[Path, MakeListing], Listing]
"""Gives a folder's listing: what it is told to make, or what another process has made."""


def folder_source(folder: Path, captions: dict[str, float] | None = None, list_once: ListOnce | None = None) -> Source:
    """All pictures below `folder`, in the order of their paths. Raises UserError if there is none, or if the list has no captions."""
    make = partial(list_folder, folder, tuple(captions or CAPTION_NAMES))
    listing = list_once(folder, make) if list_once else make()
    if listing.lines is None:
        weights = captions or {"caption": 1.0}
        return Source(folder.absolute().name, parts_of(listing, folder, tuple(weights)), weights)
    weights = captions or {caption_name(listing.lines): 1.0}
    return Source(folder.absolute().name, parts_of(replace(listing, wanted=tuple(weights)), folder), weights)


def list_folder(folder: Path, wanted: Sequence[str]) -> Listing:
    pictures = find_images(folder)
    if not len(pictures):
        raise UserError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}), nor archives, nor tables.")
    lists = [folder / name for name in LISTS if (folder / name).is_file()]
    if len(lists) > 1:
        raise UserError(f"{folder} holds both {LISTS[0]} and {LISTS[1]}: remove the one that should not be used.")
    if not lists:
        return Listing(pictures)
    lines, digests = find_lines(lists[0], wanted, PART_SIZE)
    for start in range(0, len(pictures), PART_SIZE):
        for listed in pictures[start : start + PART_SIZE]:
            digests += digest_of(listed.file)
    repeated = repeated_in(digests)  # a line whose file came before, a picture that a line names
    unlisted = pictures.only(~repeated[len(lines) :], otherwise="no caption")
    return Listing(unlisted, replace(lines, repeated=np.flatnonzero(repeated[: len(lines)])))


def parts_of(listed: Sequence[Listed] | Listing, folder: Path, captions_beside: tuple[str, ...] = ()) -> list[Part]:
    """Parts of `PART_SIZE` pictures each, files of `folder`. `captions_beside` are read from the files beside them."""
    parts = []
    for start in range(0, len(listed), PART_SIZE):
        which = slice(start, start + PART_SIZE)
        read = partial(_read, listed, which, folder, captions_beside)
        parts.append(Part(f"{start:09d}", read, partial(_files, listed, which, folder, captions_beside), partial(_known, listed, which)))
    return parts


def _read(listed: Sequence[Listed] | Listing, which: slice, folder: Path, captions_beside: tuple[str, ...]) -> Iterator[Record]:
    share = listed[which]
    yield from _read_with_sidecars(folder, captions_beside, share) if captions_beside else read_listed(folder, share)


def _files(listed: Sequence[Listed] | Listing, which: slice, folder: Path, captions_beside: tuple[str, ...]) -> Iterator[Path]:
    suffixes = sorted(sidecars_for(captions_beside)) if captions_beside else []
    for item in listed[which]:
        if not item.problem:
            yield folder / item.file
            yield from ((folder / item.file).with_suffix(f".{suffix}") for suffix in suffixes)


def _known(listed: Sequence[Listed] | Listing, which: slice) -> str:
    return hashlib.sha256(repr(listed[which]).encode(errors="surrogatepass")).hexdigest()


def read_listed(folder: Path, listed: Iterable[Listed]) -> Iterator[Record]:
    """Open the files."""
    roots = roots_of(folder)
    for item in listed:
        image, trouble = (b"", item.problem) if item.problem else read_file(folder / item.file, roots)
        yield Record(item.key, item.captions, image, trouble)


def _read_with_sidecars(folder: Path, wanted: tuple[str, ...], listed: Sequence[Listed]) -> Iterator[Record]:
    roots = roots_of(folder)
    for record, item in zip(read_listed(folder, listed), listed, strict=True):
        beside = {kind: read_file((folder / item.file).with_suffix(f".{kind}"), roots, LARGEST_TEXT) for kind in sidecars_for(wanted)}
        captions, problem = from_sidecars({kind: content for kind, (content, trouble) in beside.items() if not trouble}, wanted)
        unread = next((trouble for _, trouble in beside.values() if trouble not in ("", NO_FILE)), "")
        yield Record(item.key, captions, record.image, record.problem or (problem and (unread or problem)))
