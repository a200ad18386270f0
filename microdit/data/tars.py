"""Tar archives as a stream: plain or gzipped, one member at a time, nothing unpacked and nothing held but the member at hand.

`tarfile` reads the data of a header whole however large it says it is, follows chains of headers by recursion, keeps every member it met,
takes whatever is no header for the end, and passes on what its parsers stumble over. So it only takes single headers apart here.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, BinaryIO

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
