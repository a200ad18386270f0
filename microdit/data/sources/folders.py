"""Read a folder of images, captioned by files beside them or by lists (metadata.jsonl, .csv or .tsv), or such a list alone.

A list at the top of the folder captions all of it. Without one, a list in a subfolder captions the images that it names, and all others
have their captions beside them. Every image and every line of a list becomes one record. Where several processes encode a folder,
`listed_once` lets one of them list it; the others read that listing from a file.
"""

import hashlib
import os
import posixpath
import socket
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from microdit.data.sources.base import Part, Record, Source, passed_over_in_words
from microdit.data.sources.lists import (
    DIGEST,
    LISTS,
    LinePosition,
    MetadataLines,
    caption_name,
    check_captions,
    digest_of,
    find_lines,
    repeated_in,
)
from microdit.data.sources.metadata import CAPTION_NAMES, CAPTION_PROBLEMS, NO_CAPTION, from_sidecars, sidecars_for
from microdit.data.sources.untrusted_files import (
    IMAGE_SUFFIXES,
    LARGEST_TEXT,
    NO_FILE,
    FoundFiles,
    ImageList,
    ListedImage,
    count_kind,
    find_files,
    kind_of,
    read_file,
    roots_of,
    sum_of_kinds,
)
from microdit.errors import UserError
from microdit.io.files import aside_of, from_checked_json, sha256_of, to_checked_json, write_aside
from microdit.io.locks import in_turn, in_use, is_held

PART_SIZE = 1000  # images

# Files in the folder of an unfinished encoding.
NAMES = ".listing.safetensors"  # the names of the images
ABOUT = ".listing.json"  # everything else about the listing, with the checksum of NAMES
USED = ".listing.lock"  # held by every process that uses the listing
TURN = ".turn.lock"  # held by the process that lists the folder, or begins or completes the encoding
SHOWN = 5  # names in a note
COMPARED_PARTS = 64  # compared by each process, to notice if it sees other files than the process that listed them


@dataclass(frozen=True)
class Listing:
    """The records of a folder: the lines of its lists, if it has any, then the images that no line names.

    `captions` are the names of the captions to read from the lines. `passed_over` counts, by kind, the files that are neither images nor
    captions; `note` is a sentence about lists among them.
    """

    images: ImageList
    lists: tuple[MetadataLines, ...] = ()
    captions: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    def __len__(self) -> int:
        return self.count_lines() + len(self.images)

    def count_lines(self) -> int:
        return sum(map(len, self.lists))

    def __getitem__(self, which: slice) -> list[ListedImage]:
        start, stop, _ = which.indices(len(self))
        read: list[ListedImage] = []
        for lines in self.lists:
            read += lines.read(max(0, start), max(0, stop), self.captions)
            start, stop = start - len(lines), stop - len(lines)
        return read + self.images[max(0, start) : max(0, stop)]


MakeListing = Callable[[], Listing]
ListOnce = Callable[[Path, MakeListing], Listing]
"""Returns the listing of a folder: the one that it is told to make, or one that another process has made."""


def folder_source(
    folder: Path, captions: dict[str, float] | None = None, list_once: ListOnce | None = None, file_column: str | None = None
) -> Source:
    """Return a source of all images below `folder`, in the order of their paths.

    `file_column` names the column of the folder's lists that holds the files, if it has no usual name. Raises UserError if there is no
    image, or if a list has no captions.
    """
    make = partial(list_folder, folder, tuple(captions or CAPTION_NAMES), file_column)
    listing = list_once(folder, make) if list_once else make()
    name = folder.absolute().name
    if listing.lists:
        return _listed_source(name, listing, folder, captions)
    weights = captions or {"caption": 1.0}
    return Source(name, parts_of(listing, folder, tuple(weights)), weights, note=listing.note, passed_over=listing.passed_over)


def list_source(path: Path, captions: dict[str, float] | None = None, file_column: str | None = None) -> Source:
    """Return a source of the images that a list names, which must lie in the list's folder, or below.

    Raises UserError if the list names no files or has no captions.
    """
    lines, digests = find_lines(path, tuple(captions or CAPTION_NAMES), PART_SIZE, file_column)
    if not len(lines):
        raise UserError(f"{path} has no lines: write an object with file_name and text in each, or a CSV table with these columns.")
    lines = replace(lines, repeated=np.flatnonzero(repeated_in(digests)))
    none = ImageList(0, np.zeros(1, np.int64), np.zeros(0, np.uint8), {})
    return _listed_source(path.name, Listing(none, (lines,)), path.parent, captions)


def _listed_source(name: str, listing: Listing, folder: Path, captions: dict[str, float] | None) -> Source:
    lists = listing.lists
    in_subfolders = bool(lists[0].inside)
    for lines in lists if captions else ():
        check_captions(lines.names, captions or {}, str(lines.path))
    if in_subfolders and not captions:  # one name for all, since each list may name its captions differently
        lists = tuple(replace(lines, caption_column=caption_name(lines)) for lines in lists)
    weights = captions or {"caption" if in_subfolders else caption_name(lists[0]): 1.0}
    listing = replace(listing, lists=lists, captions=tuple(weights))
    parts = parts_of(listing, folder, tuple(weights) if in_subfolders else ())
    return Source(name, parts, weights, note=listing.note, passed_over=listing.passed_over)


def list_folder(folder: Path, captions: Sequence[str], file_column: str | None = None) -> Listing:
    """List the images below `folder` and the lines of its lists. `captions` are the fields of the lines that may hold captions.

    Raises UserError if there is no image, or more than one list in a folder.
    """
    found = find_files(folder)
    at_top = [name for name in LISTS if (folder / name).is_file()]
    if not len(found.images):
        if at_top:
            find_lines(folder / at_top[0], captions, PART_SIZE, file_column)  # which may explain why
        others = passed_over_in_words(_passed_over(found, np.zeros(len(found.others), np.bool_)))
        raise UserError(
            f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}), archives or tables{f', only {others}' if others else ''}."
        )
    below = _lists_below(found)
    names = at_top or [name for name in below if name.endswith(LISTS)]
    for inside, both in groupby(names, posixpath.dirname):
        if len(several := [*both]) > 1:
            held = [posixpath.basename(name) for name in several]
            raise UserError(f"{folder / inside} holds both {held[0]} and {held[1]}: remove the one that should not be used.")
    note = note_on_lists(found, names)
    sidecars = () if at_top else sidecars_for(captions)
    if not names:
        return Listing(found.images, passed_over=_passed_over(found, _sidecars(found, sidecars)), note=note)
    lists, all_digests = [], bytearray()
    for name in names:
        lines, digests = find_lines(folder / name, captions, PART_SIZE, file_column, name[: name.rfind("/") + 1])
        lists.append(lines)
        all_digests += digests
    repeated, unlisted, passed_over = split_by_list(found, all_digests, names, sidecars)
    of_each = np.split(repeated, np.cumsum([len(lines) for lines in lists])[:-1])
    listed = tuple(replace(lines, repeated=np.flatnonzero(some)) for lines, some in zip(lists, of_each, strict=True))
    return Listing(unlisted, listed, passed_over=passed_over, note=note)


def _lists_below(found: FoundFiles) -> list[str]:
    """Return the names of the caption lists in subfolders, also of those that are not read, sorted."""
    chosen = pc.match_substring_regex(found.others, r"/metadata\.(jsonl|csv|tsv|parquet)$")
    return [os.fsdecode(name) for name in found.others.filter(chosen).to_pylist()]


def note_on_lists(found: FoundFiles, read: Collection[str]) -> str:
    """Return a sentence that names the caption lists in subfolders which are not `read`; empty if there are none."""
    unread = sorted({*_lists_below(found)} - {*read})
    if not unread:
        return ""
    more = f" and {len(unread) - SHOWN:,} more" if len(unread) > SHOWN else ""
    return (
        f"These caption lists are not read: {', '.join(unread[:SHOWN])}{more}. In subfolders, lists are read as .jsonl, .csv or .tsv, and "
        "only if the folder has none at its top."
    )


def split_by_list(
    found: FoundFiles, digests: bytearray, lists: Sequence[str], sidecars: Iterable[str] = ()
) -> tuple[NDArray[np.bool_], ImageList, dict[str, int]]:
    """Compare the files of a folder with those that its `lists` name, given as `digest_of` each, concatenated.

    The images that they do not name have captions beside them, in files of the kinds `sidecars`, or else no caption. Returns which digests
    repeat an earlier one, (N,), these images, and the counts of what is passed over.
    """
    count = len(digests) // DIGEST
    for start in range(0, len(found.images), PART_SIZE):
        for listed in found.images[start : start + PART_SIZE]:
            digests += digest_of(listed.file)
    for start in range(0, len(found.others), PART_SIZE):
        for name in found.others[start : start + PART_SIZE].to_pylist():
            digests += digest_of(os.fsdecode(name))
    in_list, in_images, in_others = np.split(repeated_in(digests), [count, count + len(found.images)])
    list_names = pa.array([os.fsencode(name) for name in lists], found.others.type)
    used = in_others | pc.is_in(found.others, value_set=list_names).to_numpy(zero_copy_only=False)
    unlisted = found.images.only(~in_images, otherwise="" if sidecars else NO_CAPTION)
    if sidecars:
        used = used | _sidecars(replace(found, images=unlisted), sidecars)
    return in_list, unlisted, _passed_over(found, used)


def _passed_over(found: FoundFiles, used: NDArray[np.bool_]) -> dict[str, int]:
    """Count, by kind, what was not searched and the other files that are not `used`, (N,)."""
    counts = Counter(found.passed_over)
    left = found.others.filter(pa.array(~used))
    for start in range(0, len(left), PART_SIZE):
        for kind, times in Counter(kind_of(os.fsdecode(name)) for name in left[start : start + PART_SIZE].to_pylist()).items():
            count_kind(counts, kind, times)
    return sum_of_kinds(counts)


def _sidecars(found: FoundFiles, kinds: Iterable[str]) -> NDArray[np.bool_]:
    """Return which of the other files are of these `kinds`, and differ from an image beside them in the suffix only, (N,)."""
    names, offsets = pa.py_buffer(found.images.names), pa.py_buffer(found.images.offsets)
    images = pa.LargeBinaryArray.from_buffers(pa.large_binary(), found.images.count, [None, offsets, names])
    stems_of_images, stems = (pc.replace_substring_regex(array, r"\.[^./]*$", "") for array in (images, found.others))
    has_kind = np.zeros(len(stems), np.bool_)
    for kind in kinds:
        has_kind |= pc.ends_with(found.others, f".{kind}").to_numpy(zero_copy_only=False)
    return has_kind & pc.is_in(stems, value_set=stems_of_images).to_numpy(zero_copy_only=False)


def parts_of(listed: Sequence[ListedImage] | Listing, folder: Path, captions_beside: tuple[str, ...] = ()) -> list[Part]:
    """Split images of `folder` into parts of `PART_SIZE`. `captions_beside` names captions to read from the files beside the images."""
    parts = []
    for start in range(0, len(listed), PART_SIZE):
        which = slice(start, start + PART_SIZE)
        read = partial(_read, listed, which, folder, captions_beside)
        parts.append(Part(f"{start:09d}", read, partial(_files, listed, which, folder, captions_beside), partial(_known, listed, which)))
    return parts


def read_listed(folder: Path, listed: Iterable[ListedImage]) -> Iterator[Record]:
    """Yield the records of listed images, with the content of their files; also of images that lack only a caption, which may be joined."""
    roots = roots_of(folder)
    for item in listed:
        readable = not item.problem or item.problem in CAPTION_PROBLEMS
        image, trouble = read_file(folder / item.file, roots) if readable else (b"", item.problem)
        problem = trouble or item.problem if item.problem in ("", NO_CAPTION) else item.problem
        yield Record(item.key, item.captions, image, problem, url=item.url)


@contextmanager
def listed_once(out: Path, folder: Path, ranks: int) -> Iterator[ListOnce | None]:
    """Yield a `ListOnce` that lets the first of several ranks list a source and the others use its listing; None for a single rank.

    The listing is kept in `folder`, where `out` is being made, and is valid as long as any rank is at work: a rank that starts when no
    other is running lists the source anew.
    """
    with ExitStack() as held:
        yield partial(_list_once, held, out, folder) if ranks > 1 else None


def _read(listed: Sequence[ListedImage] | Listing, which: slice, folder: Path, captions_beside: tuple[str, ...]) -> Iterator[Record]:
    share = listed[which]
    by_lists = max(0, listed.count_lines() - which.start) if isinstance(listed, Listing) else 0
    yield from read_listed(folder, share[:by_lists])
    rest = share[by_lists:]
    yield from _read_with_sidecars(folder, captions_beside, rest) if captions_beside else read_listed(folder, rest)


def _files(listed: Sequence[ListedImage] | Listing, which: slice, folder: Path, captions_beside: tuple[str, ...]) -> Iterator[Path]:
    suffixes = sorted(sidecars_for(captions_beside)) if captions_beside else []
    for item in listed[which]:
        if not item.problem:
            yield folder / item.file
            yield from ((folder / item.file).with_suffix(f".{suffix}") for suffix in suffixes)


def _known(listed: Sequence[ListedImage] | Listing, which: slice) -> str:
    """Return a digest of the listed images. Encoded data sets hold it in their fingerprints, so the text it is made of must not change."""
    items = (f"Listed(key={i.key!r}, file={i.file!r}, captions={i.captions!r}, problem={i.problem!r})" for i in listed[which])
    return hashlib.sha256(f"[{', '.join(items)}]".encode(errors="surrogatepass")).hexdigest()


def _read_with_sidecars(folder: Path, captions_beside: tuple[str, ...], listed: Sequence[ListedImage]) -> Iterator[Record]:
    roots, kinds = roots_of(folder), sidecars_for(captions_beside)
    for record, item in zip(read_listed(folder, listed), listed, strict=True):
        beside = {kind: read_file((folder / item.file).with_suffix(f".{kind}"), roots, LARGEST_TEXT) for kind in kinds}
        captions, problem = from_sidecars({kind: content for kind, (content, trouble) in beside.items() if not trouble}, captions_beside)
        unread = next((trouble for _, trouble in beside.values() if trouble not in ("", NO_FILE)), "")
        yield Record(item.key, captions, record.image, record.problem or (problem and (unread or problem)))


def _list_once(held: ExitStack, out: Path, folder: Path, source: Path, make: MakeListing) -> Listing:
    """Raise UserError if this process does not see the same files as the one that listed them, or if the listing cannot be stored."""
    if out.exists():
        return make()  # the encoding will report that `out` exists
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
    except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
        if out.exists():  # the other ranks have finished meanwhile
            return make()
        raise UserError(
            f"The listing of {source} could not be passed on in {folder}: {error}. Fix that, or choose another --out."
        ) from error


def _write(listing: Listing, folder: Path, source: Path) -> None:
    images = listing.images
    arrays = {"offsets": images.offsets, "names": images.names}
    arrays |= {f"repeated.{number}": lines.repeated for number, lines in enumerate(listing.lists)}
    about: dict[str, Any] = {
        "host": socket.gethostname(),
        "seen": _seen(listing, source),
        "pictures": {"count": images.count, "problems": images.problems, "otherwise": images.otherwise},
        "passed_over": listing.passed_over,
        "note": listing.note,
        "lists": [_without_array(lines) for lines in listing.lists],
    }
    aside = aside_of(folder / NAMES)
    try:
        save_file(arrays, aside)
        about["sha256"] = sha256_of(aside)
        aside.replace(folder / NAMES)
    finally:
        aside.unlink(missing_ok=True)
    write_aside(folder / ABOUT, to_checked_json(about))


def _without_array(lines: MetadataLines) -> dict[str, Any]:
    about = asdict(lines) | {"path": lines.inside + lines.path.name}
    del about["repeated"]
    return about


def _read_listing(folder: Path, source: Path) -> Listing:
    try:
        about = from_checked_json((folder / ABOUT).read_bytes())
        if sha256_of(folder / NAMES) != about["sha256"]:
            raise ValueError("its checksum differs")
        with safe_open(folder / NAMES, "np") as file:
            images = ImageList(offsets=file.get_slice("offsets"), names=file.get_slice("names"), **about["pictures"])
            repeated = [file.get_tensor(f"repeated.{number}") for number in range(len(about["lists"]))]
    except (ValueError, SafetensorError) as error:
        raise UserError(
            f"The listing in {folder} is damaged ({error}): stop all processes that encode into this folder, and start them again."
        ) from error
    lists = tuple(_lines(source, *each) for each in zip(about["lists"], repeated, strict=True))
    listing = Listing(images, lists, passed_over=about["passed_over"], note=about["note"])
    if _seen(listing, source) != about["seen"]:
        raise UserError(
            f"{source} on this host, {socket.gethostname()}, differs from what {about['host']} has listed, or has changed since: "
            "make sure that all processes see the same files, and start them again."
        )
    return listing


def _lines(source: Path, about: dict[str, Any], repeated: Any) -> MetadataLines:
    positions = [
        LinePosition(offset, lines, tuple(header) if header else None, delimiter) for offset, lines, header, delimiter in about["positions"]
    ]
    state = tuple(about["state"])
    return MetadataLines(**{**about, "path": source / about["path"], "state": state, "positions": positions, "repeated": repeated})


def _seen(listing: Listing, source: Path) -> str:
    """Return a digest of the names, sizes and modification times of some of the listed files, as this process sees them."""
    parts = parts_of(listing, source)
    chosen = parts[:: -(-len(parts) // COMPARED_PARTS)]
    return hashlib.sha256("".join(part.fingerprint() for part in chosen).encode()).hexdigest()
