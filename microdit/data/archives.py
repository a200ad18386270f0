"""Pictures in archives, with the files that share their name: tars (WebDataset), read as a stream, and zips. Nothing is unpacked.

Files belong together when their paths are the same up to the first dot of the file name. Every such group becomes one sample.
"""

import lzma
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from microdit.data.folders import IMAGE_SUFFIXES
from microdit.data.sidecars import from_sidecars, sidecars_for
from microdit.data.sources import END, TARS, Part, Record, Source, relative_names

LARGEST_FILE = 200_000_000  # bytes
DAMAGED = "archive is damaged from here on"


@dataclass
class Sample:
    """Files of one key. `sidecars` maps an extension to a file's content."""

    key: str
    image: bytes = b""
    sidecars: dict[str, bytes] = field(default_factory=dict)
    problem: str = ""
    extensions: set[str] = field(default_factory=set)  # seen, whether read or not


@dataclass(frozen=True)
class _Member:
    key: str
    extension: str
    content: bytes = b""
    problem: str = ""


def archive_source(files: list[Path], captions: dict[str, float] | None = None) -> Source:
    """One part for each archive."""
    weights = captions or {"caption": 1.0}
    named = zip(relative_names(files), files, strict=True)
    parts = [Part(name, partial(_read, path, tuple(weights))) for name, path in named]
    return Source(files[0].name if len(files) == 1 else files[0].absolute().parent.name, parts, weights)


def read_archive(path: Path, sidecars: frozenset[str]) -> Iterator[Sample]:
    """The samples of an archive, with the contents of the files with these extensions.

    If it is damaged, what came before is followed by a last sample that says so.
    """
    members = _tar_members(path, sidecars) if path.name.lower().endswith(TARS) else _zip_members(path, sidecars)
    return _grouped(members, need_sidecar=bool(sidecars))


def _read(path: Path, wanted: tuple[str, ...]) -> Iterator[Record]:
    for sample in read_archive(path, sidecars_for(wanted)):
        captions, problem = from_sidecars(sample.sidecars, wanted)
        yield Record(sample.key, captions, sample.image, sample.problem or problem)


def _tar_members(path: Path, sidecars: frozenset[str]) -> Iterator[_Member]:
    try:
        with tarfile.open(path, "r|*", tarinfo=_StrictHeader) as tar:
            for info in tar:
                key, extension = _split(info.name)
                if info.isdir() or not key:
                    continue
                if _is_read(extension, sidecars):
                    yield _read_member(key, extension, info.size, tar.extractfile(info) if info.isreg() else None)
                else:
                    yield _Member(key, extension)
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError):
        yield _Member(path.name + END, "", problem=DAMAGED)


class _StrictHeader(tarfile.TarInfo):
    """Tells the end of an archive from damage: tarfile takes whatever is no header for the end, and would lose the rest in silence."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictHeader":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the block of zeros that every whole tar ends with
                raise
            raise tarfile.ReadError("no header where one must be") from error


def _zip_members(path: Path, sidecars: frozenset[str]) -> Iterator[_Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            # A zip has a table of contents, so files that belong together need not stand together.
            infos = sorted((info for info in archive.infolist() if not info.is_dir()), key=lambda info: _split(info.filename))
            for info in infos:
                key, extension = _split(info.filename)
                if key:
                    yield _zip_member(archive, info, key, extension, sidecars)
    except (zipfile.BadZipFile, OSError):
        yield _Member(path.name + END, "", problem=DAMAGED)


def _zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, key: str, extension: str, sidecars: frozenset[str]) -> _Member:
    if not _is_read(extension, sidecars):
        return _Member(key, extension)
    try:
        with archive.open(info) as stored:
            return _read_member(key, extension, info.file_size, stored)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError):  # damaged, encrypted, or packed in a way we do not know
        return _Member(key, extension, problem="file cannot be read")


def _read_member(key: str, extension: str, size: int, stored: IO[bytes] | None) -> _Member:
    if stored is None:  # a link
        return _Member(key, extension, problem="file cannot be read")
    if size > LARGEST_FILE:
        return _Member(key, extension, problem="file is too large")
    return _Member(key, extension, stored.read())


def _split(path: str) -> tuple[str, str]:
    """("a/b", "seg.png") of "a/b.seg.png". The key of a hidden file is empty."""
    folder, slash, name = path.removeprefix("./").rpartition("/")
    stem, _, extension = name.partition(".")
    return (folder + slash + stem if stem else ""), extension.lower()


def _is_read(extension: str, sidecars: frozenset[str]) -> bool:
    return f".{extension}" in IMAGE_SUFFIXES or extension in sidecars


def _grouped(members: Iterable[_Member], need_sidecar: bool) -> Iterator[Sample]:
    sample, key = None, ""
    times: Counter[str] = Counter()
    for member in members:
        if member.problem == DAMAGED:
            # The last sample may lack a file that was to follow: it counts as whole if it could be used as it is.
            if sample and sample.image and not sample.problem and (sample.sidecars or not need_sidecar):
                yield sample
            yield Sample(member.key, problem=DAMAGED)
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
