"""Tar archives as a stream: plain or gzipped, one member at a time, nothing unpacked and nothing held but the member at hand.

`tarfile` reads the data of a header whole however large it says it is, follows chains of headers by recursion, keeps every member it met,
takes whatever is no header for the end, and passes on what its parsers stumble over. So it only takes single headers apart here.

Pictures in archives, with the files that share their name: tars (WebDataset), read as a stream, and zips. Nothing is unpacked.

Files belong together when their paths are the same up to the first dot of the file name. Every such group becomes one sample.
"""

import gzip
import io
import shutil
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO

from microdit.data.sources.base import END, TARS, Part, Record, Source, relative_names
from microdit.data.sources.files import IMAGE_SUFFIXES, LARGEST_FILE, LARGEST_TEXT, TOO_LARGE, UNREADABLE, Refused, Roots, open_file
from microdit.data.sources.metadata import from_sidecars, sidecars_for

LARGEST_HEADER = 1_000_000  # bytes of an extended header, which holds a long name; beyond, it is no honest archive
SPARSE = "sparse file, which only tar itself can unpack"
BROKEN_HEADER = "tar header is damaged"


Stream = IO[bytes] | gzip.GzipFile


class DamagedTar(Exception):  # noqa: N818
    """The rest of the archive cannot be read."""


@dataclass
class TarMember:
    """A file, folder or link in an archive. `read` it before the next is asked for. `problem` says why its content is of no use."""

    name: str
    size: int
    kind: bytes
    problem: str
    _stream: Stream
    _left: int = field(init=False)  # bytes up to the next header

    def __post_init__(self) -> None:
        self._left = _padded(self.size) if self.is_file or self.kind not in tarfile.SUPPORTED_TYPES else 0

    @property
    def is_file(self) -> bool:
        return self.kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE)

    @property
    def is_folder(self) -> bool:
        return self.kind == tarfile.DIRTYPE

    def read(self) -> bytes:
        """The whole content. Raises DamagedTar if the archive ends before."""
        with _damage_named():
            content = _exactly(self._stream, self.size)
        self._left -= self.size
        return content

    def skip(self) -> None:
        """Go to the next header."""
        _skip(self._stream, self._left)


def tar_members(file: BinaryIO) -> Iterator[TarMember]:
    """The members in their order. Raises DamagedTar if the archive is not whole."""
    gzipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    with _damage_named():
        yield from _members(gzip.GzipFile(fileobj=file) if gzipped else file)


@contextmanager
def _damage_named() -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError) as error:
        raise DamagedTar(str(error)) from error


def _members(stream: Stream) -> Iterator[TarMember]:
    extended = _Extended()
    while any(block := _exactly(stream, tarfile.BLOCKSIZE)):  # a whole archive ends with a block of zeros
        header = tarfile.TarInfo.frombuf(_without_sparse_map(block), "utf-8", "surrogateescape")
        if header.size < 0:
            raise DamagedTar("negative size")
        if header.type in _EXTENDED_TYPES:
            if header.size > LARGEST_HEADER:
                raise DamagedTar("a header of more than a megabyte")
            extended.add(header.type, _exactly(stream, header.size))
            _skip(stream, _padded(header.size) - header.size)
            continue
        more = header.type == tarfile.GNUTYPE_SPARSE and block[482]  # blocks that go on with the map
        while more:
            more = _exactly(stream, tarfile.BLOCKSIZE)[504]
        sparse = SPARSE if extended.sparse or header.type == tarfile.GNUTYPE_SPARSE else ""
        size = header.size if extended.size is None else extended.size
        member = TarMember(extended.name or header.name, size, header.type, extended.problem or sparse, stream)
        yield member
        member.skip()
        extended = _Extended()


_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED_TYPES = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


@dataclass
class _Extended:
    """What headers before a member say of it."""

    name: str = ""
    size: int | None = None
    sparse: bool = False
    problem: str = ""

    def add(self, kind: bytes, content: bytes) -> None:
        """Global headers and targets of links say nothing that is needed."""
        if kind == tarfile.GNUTYPE_LONGNAME:
            self.name = _text(content.partition(b"\0")[0])
        elif kind in _PAX:
            try:
                fields = dict(_pax_fields(content))
                self.sparse = any(name.startswith(b"GNU.sparse.") for name in fields)
                self.name = _text(fields.get(b"GNU.sparse.name") or fields.get(b"path") or b"") or self.name
                self.size = int(fields[b"size"][:20]) if b"size" in fields else None
                if self.size is not None and self.size < 0:
                    raise ValueError("negative size")
            except ValueError:
                self.size, self.problem = None, BROKEN_HEADER


def _pax_fields(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Each is "length name=value\\n", its length that of the whole. Raises ValueError."""
    start = 0
    while start < len(content) and content[start]:
        space = content.index(b" ", start, start + 20)
        end = start + int(content[start:space])
        name, equals, value = content[space + 1 : end - 1].partition(b"=")
        if end <= space + 1 or end > len(content) or not equals or content[end - 1 : end] != b"\n":
            raise ValueError("no field")
        yield name, value
        start = end


def _without_sparse_map(block: bytes) -> bytes:
    """An old GNU header without the map of its holes, which is not needed, and which frombuf may stumble over. The checksum is adapted."""
    if block[156:157] != tarfile.GNUTYPE_SPARSE:
        return block
    cleared = block[:386] + bytes(495 - 386) + block[495:]
    unsigned = int(block[148:156].strip(b" \0") or b"0", 8) - sum(block[386:495])
    return cleared[:148] + b"%06o\0 " % unsigned + cleared[156:]


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _exactly(stream: Stream, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise DamagedTar("the archive ends too early")
    return content


def _skip(stream: Stream, size: int) -> None:
    stream.seek(size, io.SEEK_CUR)


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
    return _grouped(_archive_members(path, sidecars, roots), need_sidecar=bool(sidecars))


def archive_names(path: Path, roots: Roots | None) -> Iterator[str]:
    """The names of an archive's files, as far as it can be read."""
    return (member.key for member in _archive_members(path, None, roots) if not member.ends)


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


def _archive_members(path: Path, sidecars: frozenset[str] | None, roots: Roots | None) -> Iterator[_Member]:
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
