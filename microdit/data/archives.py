"""Pictures in archives, with the files that share their name: tars (WebDataset), read as a stream, and zips. Nothing is unpacked.

Files belong together when their paths are the same up to the first dot of the file name. Every such group becomes one sample.
"""

import io
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from microdit.data.listing import IMAGE_SUFFIXES
from microdit.data.sidecars import from_sidecars, sidecars_for
from microdit.data.sources import END, TARS, Part, Record, Source, relative_names
from microdit.data.tars import DamagedTar, TarMember, tar_members
from microdit.data.untrusted import LARGEST_FILE, LARGEST_TEXT, TOO_LARGE, UNREADABLE, Refused, Roots, open_file

DAMAGED = "archive is damaged from here on"
ZIP_BLOCK = 4096  # bytes read at a time: what bzip2 and LZMA make of so many, tens of megabytes at most, is held whole


@dataclass
class Sample:
    """Files of one key. `sidecars` maps an extension to a file's content."""

    key: str
    image: bytes = b""
    sidecars: dict[str, bytes] = field(default_factory=dict)
    problem: str = ""
    extensions: set[str] = field(default_factory=set)  # seen, whether read or not
    ends: bool = False  # a note that the rest of the archive cannot be read


@dataclass(frozen=True)
class _Member:
    key: str
    extension: str
    content: bytes = b""
    problem: str = ""
    ends: bool = False


def archive_source(files: list[Path], captions: dict[str, float] | None = None, roots: Roots | None = None) -> Source:
    """One part for each archive. Without `roots`, which links must not lead out of, the archives may be links to anywhere."""
    weights = captions or {"caption": 1.0}
    named = zip(relative_names(files), files, strict=True)
    parts = [Part(name, partial(_read, path, roots, tuple(weights)), partial(iter, (path,))) for name, path in named]
    return Source(files[0].name if len(files) == 1 else files[0].absolute().parent.name, parts, weights)


def read_archive(path: Path, sidecars: frozenset[str], roots: Roots | None) -> Iterator[Sample]:
    """The samples of an archive, with the contents of the files with these extensions.

    If it is damaged, what came before is followed by a last sample that says so.
    """
    return _grouped(_members(path, sidecars, roots), need_sidecar=bool(sidecars))


def archive_names(path: Path, roots: Roots | None) -> Iterator[str]:
    """The names of an archive's files, as far as it can be read."""
    return (member.key for member in _members(path, None, roots) if not member.ends)


def read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> tuple[bytes, str]:
    """A file's content, or why there is none."""
    if info.file_size > most:
        return b"", TOO_LARGE
    try:
        content = io.BytesIO()
        with archive.open(info) as stored:
            shutil.copyfileobj(stored, content, ZIP_BLOCK)  # zipfile stops at file_size
        return content.getvalue(), ""
    except Exception:  # damaged, encrypted, packed in a way we do not know: zipfile and its decoders raise whatever they stumble over
        return b"", UNREADABLE


def open_zip(file: BinaryIO) -> zipfile.ZipFile | None:
    """The archive, or None if it has no table of contents."""
    try:
        return zipfile.ZipFile(file)
    except Exception:  # zipfile raises whatever its parser stumbles over
        return None


def _read(path: Path, roots: Roots | None, wanted: tuple[str, ...]) -> Iterator[Record]:
    for sample in read_archive(path, sidecars_for(wanted), roots):
        captions, problem = from_sidecars(sample.sidecars, wanted)
        yield Record(sample.key, captions, sample.image, sample.problem or problem)


def _members(path: Path, sidecars: frozenset[str] | None, roots: Roots | None) -> Iterator[_Member]:
    """Without `sidecars` nothing is read, not even pictures."""
    try:
        with open_file(path, roots) as file:
            yield from (_tar_members if path.name.lower().endswith(TARS) else _zip_members)(file, sidecars)
    except DamagedTar:
        yield _Member(path.name + END, "", problem=DAMAGED, ends=True)
    except Refused as refused:
        yield _Member(path.name + END, "", problem=refused.reason, ends=True)


def _tar_members(file: BinaryIO, sidecars: frozenset[str] | None) -> Iterator[_Member]:
    for stored in tar_members(file):
        key, extension = _split(stored.name)
        if stored.is_folder or not key:
            continue
        yield _tar_member(stored, key, extension) if _is_read(extension, sidecars) else _Member(key, extension)


def _tar_member(stored: TarMember, key: str, extension: str) -> _Member:
    problem = stored.problem or ("" if stored.is_file else UNREADABLE) or (TOO_LARGE if stored.size > _most(extension) else "")
    return _Member(key, extension, b"" if problem else stored.read(), problem)


def _zip_members(file: BinaryIO, sidecars: frozenset[str] | None) -> Iterator[_Member]:
    archive = open_zip(file)
    if archive is None:
        raise Refused(DAMAGED)
    # A zip has a table of contents, so files that belong together need not stand together.
    infos = sorted((info for info in archive.infolist() if not info.is_dir()), key=lambda info: _split(info.filename))
    for info in infos:
        key, extension = _split(info.filename)
        if key:
            content, problem = read_zipped(archive, info, _most(extension)) if _is_read(extension, sidecars) else (b"", "")
            yield _Member(key, extension, content, problem)


def _most(extension: str) -> int:
    return LARGEST_FILE if f".{extension}" in IMAGE_SUFFIXES else LARGEST_TEXT


def _split(path: str) -> tuple[str, str]:
    """("a/b", "seg.png") of "a/b.seg.png". The key of a hidden file is empty."""
    folder, slash, name = path.removeprefix("./").rpartition("/")
    stem, _, extension = name.partition(".")
    return (folder + slash + stem if stem else ""), extension.lower()


def _is_read(extension: str, sidecars: frozenset[str] | None) -> bool:
    return sidecars is not None and (f".{extension}" in IMAGE_SUFFIXES or extension in sidecars)


def _grouped(members: Iterable[_Member], need_sidecar: bool) -> Iterator[Sample]:
    sample, key = None, ""
    times: Counter[str] = Counter()
    for member in members:
        if member.ends:
            # The last sample may lack a file that was to follow: it counts as whole if it could be used as it is.
            if sample and sample.image and not sample.problem and (sample.sidecars or not need_sidecar):
                yield sample
            yield Sample(member.key, problem=member.problem, ends=True)
            return
        if sample is None or member.key != key or member.extension in sample.extensions:
            if sample:
                yield _finished(sample)
            sample, key = _begun(member.key, times), member.key
        _add(sample, member)
    if sample:
        yield _finished(sample)


def _begun(key: str, times: Counter[str]) -> Sample:
    times[key] += 1
    if times[key] == 1:
        return Sample(key)
    while f"{key}#{times[key]}" in times:  # somebody's own name
        times[key] += 1
    return Sample(f"{key}#{times[key]}", problem="duplicate key")


def _add(sample: Sample, member: _Member) -> None:
    sample.extensions.add(member.extension)
    sample.problem = sample.problem or member.problem
    if f".{member.extension}" in IMAGE_SUFFIXES:
        sample.image = sample.image or member.content
    elif member.content:
        sample.sidecars[member.extension] = member.content


def _finished(sample: Sample) -> Sample:
    if not sample.problem and not any(f".{extension}" in IMAGE_SUFFIXES for extension in sample.extensions):
        sample.problem = "no image"
    return sample
