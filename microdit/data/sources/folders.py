"""A folder of pictures, captioned by text files beside them or by one list at its top. Every picture and every line counts once.

A folder is listed by one of the processes that encode it, and the others read its listing from a file.
"""

import hashlib
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from microdit.data.sources.base import Part, Record, Source
from microdit.data.sources.files import IMAGE_SUFFIXES, LARGEST_TEXT, NO_FILE, ImageList, ListedImage, find_images, read_file, roots_of
from microdit.data.sources.metadata import (
    CAPTION_NAMES,
    LinePosition,
    MetadataLines,
    caption_name,
    digest_of,
    find_lines,
    from_sidecars,
    repeated_in,
    sidecars_for,
)
from microdit.errors import UserError
from microdit.io.files import aside_of, from_checked_json, sha256_of, to_checked_json, write_aside
from microdit.io.locks import in_turn, in_use, is_held

LISTS = ("metadata.jsonl", "metadata.csv")
PART_SIZE = 1000  # pictures


@dataclass(frozen=True)
class Listing:
    """The records of a folder: the lines of its list, if it has one, then pictures. `wanted` are the captions in the lines."""

    pictures: ImageList
    lines: MetadataLines | None = None
    wanted: tuple[str, ...] = ()

    def __len__(self) -> int:
        return (len(self.lines) if self.lines else 0) + len(self.pictures)

    def __getitem__(self, which: slice) -> list[ListedImage]:
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


def parts_of(listed: Sequence[ListedImage] | Listing, folder: Path, captions_beside: tuple[str, ...] = ()) -> list[Part]:
    """Parts of `PART_SIZE` pictures each, files of `folder`. `captions_beside` are read from the files beside them."""
    parts = []
    for start in range(0, len(listed), PART_SIZE):
        which = slice(start, start + PART_SIZE)
        read = partial(_read, listed, which, folder, captions_beside)
        parts.append(Part(f"{start:09d}", read, partial(_files, listed, which, folder, captions_beside), partial(_known, listed, which)))
    return parts


def _read(listed: Sequence[ListedImage] | Listing, which: slice, folder: Path, captions_beside: tuple[str, ...]) -> Iterator[Record]:
    share = listed[which]
    yield from _read_with_sidecars(folder, captions_beside, share) if captions_beside else read_listed(folder, share)


def _files(listed: Sequence[ListedImage] | Listing, which: slice, folder: Path, captions_beside: tuple[str, ...]) -> Iterator[Path]:
    suffixes = sorted(sidecars_for(captions_beside)) if captions_beside else []
    for item in listed[which]:
        if not item.problem:
            yield folder / item.file
            yield from ((folder / item.file).with_suffix(f".{suffix}") for suffix in suffixes)


def _known(listed: Sequence[ListedImage] | Listing, which: slice) -> str:
    return hashlib.sha256(repr(listed[which]).encode(errors="surrogatepass")).hexdigest()


def read_listed(folder: Path, listed: Iterable[ListedImage]) -> Iterator[Record]:
    """Open the files."""
    roots = roots_of(folder)
    for item in listed:
        image, trouble = (b"", item.problem) if item.problem else read_file(folder / item.file, roots)
        yield Record(item.key, item.captions, image, trouble)


def _read_with_sidecars(folder: Path, wanted: tuple[str, ...], listed: Sequence[ListedImage]) -> Iterator[Record]:
    roots = roots_of(folder)
    for record, item in zip(read_listed(folder, listed), listed, strict=True):
        beside = {kind: read_file((folder / item.file).with_suffix(f".{kind}"), roots, LARGEST_TEXT) for kind in sidecars_for(wanted)}
        captions, problem = from_sidecars({kind: content for kind, (content, trouble) in beside.items() if not trouble}, wanted)
        unread = next((trouble for _, trouble in beside.values() if trouble not in ("", NO_FILE)), "")
        yield Record(item.key, captions, record.image, record.problem or (problem and (unread or problem)))


NAMES = ".listing.safetensors"  # in the unfinished folder
ABOUT = ".listing.json"  # with the checksum of the other
USED = ".listing.lock"  # held by every process that uses it
TURN = ".turn.lock"  # held by the process that lists, begins or completes
COMPARED = 64  # parts of which a process looks whether it sees the same files as the one that listed them


@contextmanager
def listed_once(out: Path, folder: Path, ranks: int) -> Iterator[ListOnce | None]:
    """Let the first of several ranks list, and the others use its listing, which is kept in `folder`, where `out` is being made.

    It is used as long as any rank is at work: whoever comes when none is lists anew.
    """
    with ExitStack() as held:
        yield partial(_list_once, held, out, folder) if ranks > 1 else None


def _list_once(held: ExitStack, out: Path, folder: Path, source: Path, make: MakeListing) -> Listing:
    """Raises UserError if this process sees another folder than the one that listed it, or if the disk refuses."""
    if out.exists():
        return make()  # whoever encodes will say so
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with in_turn(folder / TURN):
            is_first = not is_held(folder / USED)
            held.enter_context(in_use(folder / USED))
            if not is_first and (folder / ABOUT).is_file():
                return _read_listing(folder, source)
            listing = make()
            _write(listing, folder, source)
            return listing
    except (OSError, SafetensorError) as error:  # the library has the second for a full disk
        if out.exists():  # the others have finished it meanwhile
            return make()
        raise UserError(
            f"The listing of {source} could not be handed over in {folder}: {error}. Put that right, or choose another --out."
        ) from error


def _write(listing: Listing, folder: Path, source: Path) -> None:
    pictures, lines = listing.pictures, listing.lines
    arrays = {"offsets": pictures.offsets, "names": pictures.names}
    about: dict[str, Any] = {
        "host": socket.gethostname(),
        "seen": _seen(listing, source),
        "pictures": {"count": pictures.count, "problems": pictures.problems, "otherwise": pictures.otherwise},
        "lines": None,
    }
    if lines is not None:
        arrays["repeated"] = lines.repeated
        about["lines"] = {**asdict(lines), "path": lines.path.name, "names": sorted(lines.names)}
        del about["lines"]["repeated"]
    aside = aside_of(folder / NAMES)
    try:
        save_file(arrays, aside)
        about["sha256"] = sha256_of(aside)
        aside.replace(folder / NAMES)
    finally:
        aside.unlink(missing_ok=True)
    write_aside(folder / ABOUT, to_checked_json(about))


def _read_listing(folder: Path, source: Path) -> Listing:
    try:
        about = from_checked_json((folder / ABOUT).read_bytes())
        if sha256_of(folder / NAMES) != about["sha256"]:
            raise ValueError("its checksum differs")
        with safe_open(folder / NAMES, "np") as file:
            pictures = ImageList(offsets=file.get_slice("offsets"), names=file.get_slice("names"), **about["pictures"])
            repeated = file.get_tensor("repeated") if about["lines"] else None
    except (ValueError, SafetensorError) as error:
        raise UserError(
            f"The listing in {folder} is damaged ({error}): stop all processes that encode into it, and start them again."
        ) from error
    lines = _lines(source, about["lines"], repeated) if about["lines"] else None
    listing = Listing(pictures, lines)
    if _seen(listing, source) != about["seen"]:
        raise UserError(
            f"{source} is not the same here, on {socket.gethostname()}, as on {about['host']}, which has listed it, or has changed since: "
            "let all processes see the same files, and start them again."
        )
    return listing


def _lines(source: Path, about: dict[str, Any], repeated: Any) -> MetadataLines:
    places = [LinePosition(offset, lines, tuple(header) if header else None) for offset, lines, header in about["places"]]
    return MetadataLines(
        source / about["path"], tuple(about["state"]), about["count"], about["step"], places, repeated, frozenset(about["names"])
    )


def _seen(listing: Listing, source: Path) -> str:
    """A digest of what this process sees of some of the files listed: their names, sizes and times."""
    parts = parts_of(listing, source)
    chosen = parts[:: -(-len(parts) // COMPARED)]
    return hashlib.sha256("".join(part.fingerprint() for part in chosen).encode()).hexdigest()
