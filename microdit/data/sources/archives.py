"""Read images from tar (WebDataset) and zip archives, without unpacking them.

Files belong together if their paths are equal up to the first dot of the file name, as in WebDataset. Where such a group holds several
images, those with a caption of their own (`2024.05.01.png`, `2024.05.01.txt`) are samples of their own; `samples.py` decides.

Tar archives, plain or compressed, are read as a stream with one member in memory. Only the parsing of single headers is left to `tarfile`.
It would read a header's data whole, however large the header says they are; follow chains of headers by recursion; keep all members in
memory; take anything that is not a header for the end of the archive; and raise whatever its parsers stumble over.
"""

import io
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from microdit.data.sources.archive_lists import LARGEST_LIST, CaptionList, is_list
from microdit.data.sources.base import END, TARS, Part, Record, Source, relative_names
from microdit.data.sources.compressed import EXPANDS, CompressedStream, Stream, max_unpacked
from microdit.data.sources.metadata import captions_in, sidecar_fields, sidecars_for, url_in
from microdit.data.sources.samples import Member, Sample, Use, grouped, split_name, use_of
from microdit.data.sources.untrusted_files import (
    LARGEST_FILE,
    LARGEST_TEXT,
    TOO_LARGE,
    UNREADABLE,
    Refused,
    Roots,
    open_file,
)

LARGEST_HEADER = 1_000_000  # bytes of an extended header, which holds a long name; no honest archive has a larger one
ZIP_BLOCK = 4096  # bytes read at a time; what bzip2 and LZMA expand them to, tens of megabytes at most, is held in memory
SKIPPED_AT_ONCE = 1 << 20  # bytes, of compressed streams
PADDING = 21  # zero blocks with which a whole archive ends at most: two, and more up to a multiple of 20 blocks
MOST_ZEROS = 131_072  # zero blocks after which nothing more is expected: 64 MiB
DAMAGED = "archive is damaged from here on"
ZEROS = "archive ends in zeros, in place of what may have stood there"
SPARSE = "sparse file, which only tar itself can unpack"
BROKEN_HEADER = "tar header is damaged"


def archive_source(files: list[Path], captions: dict[str, float] | None = None, roots: Roots | None = None) -> Source:
    """Return a source with one part for each archive.

    Links must not lead out of the folders `roots`. Without `roots`, the archives may be links to anywhere.
    """
    weights = captions or {"caption": 1.0}
    named = zip(relative_names(files), files, strict=True)
    parts = [Part(name, partial(_read, path, roots, tuple(weights)), partial(iter, (path,))) for name, path in named]
    return Source(files[0].name if len(files) == 1 else files[0].absolute().parent.name, parts, weights)


def read_archive(path: Path, sidecars: frozenset[str], roots: Roots | None, apart: str = "") -> Iterator[Sample]:
    """Yield the samples of an archive, each with its image and the files that have one of the extensions `sidecars`.

    The member named `apart`, which the caller reads itself, belongs to no sample and is not counted as passed over. If the archive is
    damaged, the samples before the damage are followed by one that reports it.
    """
    members = _archive_members(path, sidecars, roots)
    if apart:
        members = (member for member in members if (member.key, member.extension) != split_name(apart))
    return grouped(members, path.name + END, need_sidecar=bool(sidecars))


def archive_names(path: Path, roots: Roots | None) -> Iterator[str]:
    """Yield the keys of an archive's files, as far as it can be read."""
    return (member.key for member in _archive_members(path, None, roots) if member.key and not member.ends)


def read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> tuple[bytes, str]:
    """Return the content of a file in a zip archive and "", or b"" and the reason why it cannot be read."""
    if info.file_size > most:
        return b"", TOO_LARGE
    try:
        content = io.BytesIO()
        with archive.open(info) as stored:
            shutil.copyfileobj(stored, content, ZIP_BLOCK)  # zipfile stops at file_size
        return content.getvalue(), ""
    except Exception:  # damaged, encrypted or compressed in an unknown way: zipfile and its decoders raise exceptions of many types
        return b"", UNREADABLE


def open_zip(file: BinaryIO) -> zipfile.ZipFile | None:
    """Open a zip archive. Returns None if it has no readable table of contents."""
    try:
        return zipfile.ZipFile(file)
    except Exception:  # zipfile's parser raises exceptions of many types
        return None


def _read(path: Path, roots: Roots | None, captions: tuple[str, ...]) -> Iterator[Record]:
    damaged = False
    listed = CaptionList(captions)
    members = listed.taken_from(_archive_members(path, sidecars_for(captions), roots))
    for sample in grouped(members, path.name + END, need_sidecar=True):
        damaged |= sample.ends
        fields, broken = sidecar_fields(sample.sidecars)
        item = listed.take(sample.file)
        found, problem = (item.captions, item.problem) if item else captions_in(fields, broken, captions)
        url = url_in(fields) or (item.url if item else "")
        yield Record(sample.key, found, sample.image, sample.problem or problem, sample.passed_over, url)
    yield from listed.rest(damaged)


def _archive_members(path: Path, sidecars: frozenset[str] | None, roots: Roots | None) -> Iterator[Member]:
    """Yield the members of an archive. If `sidecars` is None, no content is read, not even that of images."""
    try:
        with open_file(path, roots) as file:
            yield from (_tar_members if path.name.lower().endswith(TARS) else _zip_members)(file, sidecars)
    except DamagedTar:
        yield Member(path.name + END, "", problem=DAMAGED, ends=True)
    except Refused as refused:
        yield Member(path.name + END, "", problem=refused.reason, ends=True)


def _tar_members(file: BinaryIO, sidecars: frozenset[str] | None) -> Iterator[Member]:
    for stored in tar_members(file):
        if not stored.is_folder:
            key, extension = split_name(stored.name)
            use = _use(stored.name, sidecars, stored.peek)
            problem = stored.problem or ("" if stored.is_file else UNREADABLE) or (TOO_LARGE if stored.size > _MOST[use] else "")
            yield Member(key, extension, use, stored.read() if use and not problem else b"", problem)


def _zip_members(file: BinaryIO, sidecars: frozenset[str] | None) -> Iterator[Member]:
    archive = open_zip(file)
    if archive is None:
        raise Refused(DAMAGED)
    # A zip archive has a table of contents, so files that belong together need not be adjacent. Caption lists come first.
    infos = [info for info in archive.infolist() if not info.is_dir()]
    infos.sort(key=lambda info: (not is_list(info.filename), split_name(info.filename)))
    left = max_unpacked(os.fstat(file.fileno()).st_size)
    for info in infos:
        key, extension = split_name(info.filename)
        use = _use(info.filename, sidecars, partial(_zipped_start, archive, info))
        left -= info.file_size if use and info.file_size <= _MOST[use] else 0
        if left < 0:
            raise Refused(EXPANDS)
        yield Member(key, extension, use, *(read_zipped(archive, info, _MOST[use]) if use else (b"", "")))


def _use(name: str, sidecars: frozenset[str] | None, read: Callable[[int], bytes]) -> Use:
    key, extension = split_name(name)
    if not key or sidecars is None:
        return ""
    return "list" if sidecars and is_list(name) else use_of(extension, sidecars, read)


def _zipped_start(archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> bytes:
    try:
        with archive.open(info) as stored:
            return stored.read(size)
    except Exception:  # as in `read_zipped`; the file is passed over, whatever it is
        return b""


_MOST = {"image": LARGEST_FILE, "caption": LARGEST_TEXT, "list": LARGEST_LIST, "": LARGEST_FILE}  # bytes that are read


class DamagedTar(Exception):  # noqa: N818
    """Raised when the rest of a tar archive cannot be read."""


@dataclass
class TarMember:
    """A file, folder or link in a tar archive, to be read before the next member is requested.

    `problem` says why the content cannot be used, if so.
    """

    name: str
    size: int
    kind: bytes
    problem: str
    _stream: Stream
    _left: int = field(init=False)  # bytes before the next header
    _start: bytes = field(init=False, default=b"")

    def __post_init__(self) -> None:
        self._left = _padded(self.size) if self.is_file or self.kind not in tarfile.SUPPORTED_TYPES else 0

    @property
    def is_file(self) -> bool:
        return self.kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE)

    @property
    def is_folder(self) -> bool:
        return self.kind == tarfile.DIRTYPE

    def peek(self, size: int) -> bytes:
        """Read the first bytes, before `read` or in place of it; none of what has no content that can be used. Raises DamagedTar."""
        if self.is_file and not self.problem:
            self._start = self._take(min(size, self.size))
        return self._start

    def read(self) -> bytes:
        """Read the whole content. Raises DamagedTar if the archive ends too early."""
        rest = self._take(self.size - len(self._start))
        return self._start + rest if self._start else rest

    def skip(self) -> None:
        """Move to the next header."""
        _skip(self._stream, self._left)

    def _take(self, size: int) -> bytes:
        with _as_damaged_tar():
            content = _exactly(self._stream, size)
        self._left -= size
        return content


def tar_members(file: BinaryIO) -> Iterator[TarMember]:
    """Yield the members in order. Raises DamagedTar where the archive is damaged or ends too early."""
    start = file.read(4)
    file.seek(0)
    with _as_damaged_tar():
        yield from _members(_uncompressed(file, start))


def _uncompressed(file: BinaryIO, start: bytes) -> Stream:
    if start.startswith(b"\x1f\x8b"):
        return CompressedStream(file, "gzip")
    if start.startswith(b"BZh"):
        return CompressedStream(file, "bzip2")
    return CompressedStream(file, "zstd") if start == b"\x28\xb5\x2f\xfd" else file


@contextmanager
def _as_damaged_tar() -> Iterator[None]:
    """Turn whatever reading a damaged archive raises into DamagedTar."""
    try:
        yield
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError) as error:
        raise DamagedTar(str(error)) from error


def _members(stream: Stream) -> Iterator[TarMember]:
    extended = _Extended()
    while block := _next_header(stream):
        header = tarfile.TarInfo.frombuf(_without_sparse_map(block), "utf-8", "surrogateescape")
        if header.size < 0:
            raise DamagedTar("negative size")
        if header.type in _EXTENDED_TYPES:
            if header.size > LARGEST_HEADER:
                raise DamagedTar("a header of more than a megabyte")
            extended.add(header.type, _exactly(stream, header.size))
            _skip(stream, _padded(header.size) - header.size)
            continue
        more = header.type == tarfile.GNUTYPE_SPARSE and block[482]  # blocks that continue the map
        while more:
            more = _exactly(stream, tarfile.BLOCKSIZE)[504]
        sparse = SPARSE if extended.sparse or header.type == tarfile.GNUTYPE_SPARSE else ""
        size = header.size if extended.size is None else extended.size
        member = TarMember(extended.name or header.name, size, header.type, extended.problem or sparse, stream)
        yield member
        member.skip()
        extended = _Extended()


def _next_header(stream: Stream) -> bytes:
    """Return the next header, after blocks of zeros too, since archives may have been joined end to end; b"" at the end.

    Raises DamagedTar if there is no block of zeros at the end, and Refused if there are more than any tool writes there: a download that
    reserved its space and was cut off looks like that.
    """
    block, zeros = _exactly(stream, tarfile.BLOCKSIZE), 0
    while not any(block):
        zeros += 1
        block = stream.read(tarfile.BLOCKSIZE)
        if (not block and zeros > PADDING) or zeros > MOST_ZEROS:
            raise Refused(ZEROS)
        if not block:
            return b""
    if len(block) < tarfile.BLOCKSIZE:
        raise DamagedTar("bytes after the end that are no header")
    return block


_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED_TYPES = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


@dataclass
class _Extended:
    """The metadata of a member that the extended headers before it hold."""

    name: str = ""
    size: int | None = None
    sparse: bool = False
    problem: str = ""

    def add(self, kind: bytes, content: bytes) -> None:
        """Parse one extended header. Global headers and link targets hold nothing that is needed."""
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
    """Yield the fields of a pax header, "length name=value\\n", where the length includes itself. Raises ValueError."""
    start = 0
    while start < len(content) and content[start]:
        space = content.index(b" ", start, start + 20)
        end = start + int(content[start:space])
        name, equals, value = content[space + 1 : end - 1].partition(b"=")
        if end <= space + 1 or end > len(content) or not equals or content[end - 1 : end] != b"\n":
            raise ValueError("not a pax field")
        yield name, value
        start = end


def _without_sparse_map(block: bytes) -> bytes:
    """Clear the map of holes in an old GNU header, on which `frombuf` may fail, and adapt the checksum. The map is not needed."""
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
    if not isinstance(stream, CompressedStream):
        stream.seek(size, io.SEEK_CUR)
        return
    while size and (skipped := len(stream.read(min(size, SKIPPED_AT_ONCE)))):
        size -= skipped
