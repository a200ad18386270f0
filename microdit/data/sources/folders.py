"""Read a folder of images, captioned by files beside them or by one list at its top (metadata.jsonl, .csv or .tsv), or such a list alone.

Every image and every line of the list becomes one record. Where several processes encode a folder, `listed_once` lets one of them list it;
the others read that listing from a file.
"""

import hashlib
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
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

LISTS = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
PART_SIZE = 1000  # images

# Files in the folder of an unfinished encoding.
NAMES = ".listing.safetensors"  # the names of the images
ABOUT = ".listing.json"  # everything else about the listing, with the checksum of NAMES
USED = ".listing.lock"  # held by every process that uses the listing
TURN = ".turn.lock"  # held by the process that lists the folder, or begins or completes the encoding
COMPARED_PARTS = 64  # compared by each process, to notice if it sees other files than the process that listed them


@dataclass(frozen=True)
class Listing:
    """The records of a folder: the lines of its list, if it has one, then the images that no line names.

    `captions` are the names of the captions to read from the lines. `passed_over` counts, by kind, the files that are neither images nor
    captions.
    """

    images: ImageList
    lines: MetadataLines | None = None
    captions: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return (len(self.lines) if self.lines else 0) + len(self.images)

    def __getitem__(self, which: slice) -> list[ListedImage]:
        start, stop, _ = which.indices(len(self))
        if self.lines is None:
            return self.images[start:stop]
        first = len(self.lines)  # number of the first image
        return self.lines.read(start, stop, self.captions) + self.images[max(0, start - first) : max(0, stop - first)]


MakeListing = Callable[[], Listing]
ListOnce = Callable[[Path, MakeListing], Listing]
"""Returns the listing of a folder: the one that it is told to make, or one that another process has made."""


def folder_source(
    folder: Path, captions: dict[str, float] | None = None, list_once: ListOnce | None = None, file_column: str | None = None
) -> Source:
    """Return a source of all images below `folder`, in the order of their paths.

    `file_column` names the column of the folder's list that holds the files, if it has no usual name. Raises UserError if there is no
    image, or if the list has no captions.
    """
    make = partial(list_folder, folder, tuple(captions or CAPTION_NAMES), file_column)
    listing = list_once(folder, make) if list_once else make()
    name = folder.absolute().name
    if listing.lines is not None:
        return _listed_source(name, listing, listing.lines, folder, captions)
    weights = captions or {"caption": 1.0}
    return Source(name, parts_of(listing, folder, tuple(weights)), weights, passed_over=listing.passed_over)


def list_source(path: Path, captions: dict[str, float] | None = None, file_column: str | None = None) -> Source:
    """Return a source of the images that a list names, which must lie in the list's folder, or below.

    Raises UserError if the list names no files or has no captions.
    """
    lines, digests = find_lines(path, tuple(captions or CAPTION_NAMES), PART_SIZE, file_column)
    if not len(lines):
        raise UserError(f"{path} has no lines: write an object with file_name and text in each, or a CSV table with these columns.")
    lines = replace(lines, repeated=np.flatnonzero(repeated_in(digests)))
    none = ImageList(0, np.zeros(1, np.int64), np.zeros(0, np.uint8), {})
    return _listed_source(path.name, Listing(none, lines), lines, path.parent, captions)


def _listed_source(name: str, listing: Listing, lines: MetadataLines, folder: Path, captions: dict[str, float] | None) -> Source:
    if captions:
        check_captions(lines.names, captions, str(lines.path))
    weights = captions or {caption_name(lines): 1.0}
    parts = parts_of(replace(listing, captions=tuple(weights)), folder)
    return Source(name, parts, weights, passed_over=listing.passed_over)


def list_folder(folder: Path, captions: Sequence[str], file_column: str | None = None) -> Listing:
    """List the images below `folder` and the lines of its list. `captions` are the fields of the lines that may hold captions.

    Raises UserError if there is no image, or more than one list.
    """
    found = find_files(folder)
    lists = [folder / name for name in LISTS if (folder / name).is_file()]
    if not len(found.images):
        if lists:
            find_lines(lists[0], captions, PART_SIZE, file_column)  # which may explain why
        others = passed_over_in_words(_passed_over(found, np.zeros(len(found.others), np.bool_)))
        raise UserError(
            f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}), archives or tables{f', only {others}' if others else ''}."
        )
    if len(lists) > 1:
        raise UserError(f"{folder} holds both {lists[0].name} and {lists[1].name}: remove the one that should not be used.")
    if not lists:
        return Listing(found.images, passed_over=_passed_over(found, _sidecars(found, sidecars_for(captions))))
    lines, digests = find_lines(lists[0], captions, PART_SIZE, file_column)
    in_lines, unlisted, passed_over = split_by_list(found, digests, lists[0].name)
    return Listing(unlisted, replace(lines, repeated=np.flatnonzero(in_lines)), passed_over=passed_over)


def split_by_list(found: FoundFiles, digests: bytearray, list_name: str) -> tuple[NDArray[np.bool_], ImageList, dict[str, int]]:
    """Compare the files of a folder with those that its list names, given as `digest_of` each, concatenated.

    Returns which digests repeat an earlier one, (N,), the images that the list does not name, and the counts of what is passed over.
    """
    count = len(digests) // DIGEST
    for start in range(0, len(found.images), PART_SIZE):
        for listed in found.images[start : start + PART_SIZE]:
            digests += digest_of(listed.file)
    for start in range(0, len(found.others), PART_SIZE):
        for name in found.others[start : start + PART_SIZE].to_pylist():
            digests += digest_of(os.fsdecode(name))
    in_list, in_images, in_others = np.split(repeated_in(digests), [count, count + len(found.images)])
    used = in_others | pc.equal(found.others, list_name.encode()).to_numpy(zero_copy_only=False)
    return in_list, found.images.only(~in_images, otherwise=NO_CAPTION), _passed_over(found, used)


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
    yield from _read_with_sidecars(folder, captions_beside, share) if captions_beside else read_listed(folder, share)


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
    images, lines = listing.images, listing.lines
    arrays = {"offsets": images.offsets, "names": images.names}
    about: dict[str, Any] = {
        "host": socket.gethostname(),
        "seen": _seen(listing, source),
        "pictures": {"count": images.count, "problems": images.problems, "otherwise": images.otherwise},
        "passed_over": listing.passed_over,
        "lines": None,
    }
    if lines is not None:
        arrays["repeated"] = lines.repeated
        about["lines"] = {**asdict(lines), "path": lines.path.name, "names": lines.names}
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
            images = ImageList(offsets=file.get_slice("offsets"), names=file.get_slice("names"), **about["pictures"])
            repeated = file.get_tensor("repeated") if about["lines"] else None
    except (ValueError, SafetensorError) as error:
        raise UserError(
            f"The listing in {folder} is damaged ({error}): stop all processes that encode into this folder, and start them again."
        ) from error
    lines = _lines(source, about["lines"], repeated) if about["lines"] else None
    listing = Listing(images, lines, passed_over=about["passed_over"])
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
    return MetadataLines(
        source / about["path"],
        tuple(about["state"]),
        about["count"],
        about["step"],
        positions,
        repeated,
        about["names"],
        about["captioned"],
        about["file_column"],
    )


def _seen(listing: Listing, source: Path) -> str:
    """Return a digest of the names, sizes and modification times of some of the listed files, as this process sees them."""
    parts = parts_of(listing, source)
    chosen = parts[:: -(-len(parts) // COMPARED_PARTS)]
    return hashlib.sha256("".join(part.fingerprint() for part in chosen).encode()).hexdigest()
