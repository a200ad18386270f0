"""Write hostile sources, record by record: each kind below writes one record and returns whether it can be used."""

import gzip
import io
import json
import os
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.pictures import picture

DEEP = b"[" * 200_000 + b"]" * 200_000
LONG = "word" * 50_000  # more than a caption may have
HUGE = "w" * 5_000_000  # more than a caption's file, or a line, may have
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch owned) (w) file\nshowpage\n"


def good_picture(number: int) -> bytes:
    return picture(number, "PNG", (10, 10))


def png_bomb() -> bytes:
    """Return a PNG of a few bytes that claims to be 60,000 x 60,000 pixels."""
    small = bytearray(picture(0, "PNG"))
    small[16:24] = (60_000).to_bytes(4, "big") * 2
    small[29:33] = zlib.crc32(small[12:29]).to_bytes(4, "big")
    return bytes(small)


BAD_FILES = {"empty": b"", "eps": EPS, "bomb": png_bomb(), "cut": good_picture(0)[:40], "text": b"<html>404</html>", "svg": b"<svg/>"}


def fill_folder(folder: Path, count: int, generator: random.Random) -> int:
    """Write images with text files beside them. Returns how many can be used."""
    outside = folder.with_name(f"{folder.name}-outside")
    for place in (folder, outside):
        place.mkdir(parents=True)
    (outside / "secret.png").write_bytes(good_picture(1))
    (outside / "secret.txt").write_text("a secret")

    def write(path: Path, content: bytes = b"", text: str | bytes = "words", **beside: bytes) -> None:
        path.write_bytes(content)
        path.with_suffix(".txt").write_bytes(text.encode() if isinstance(text, str) else text)
        for suffix, more in beside.items():
            path.with_suffix(f".{suffix}").write_bytes(more)

    def link(path: Path, to: str) -> None:
        path.symlink_to(to)
        path.with_suffix(".txt").write_text("words")

    def pipe(path: Path) -> None:
        os.mkfifo(path)
        path.with_suffix(".txt").write_text("words")

    def linked_caption(path: Path) -> None:
        path.write_bytes(good_picture(2))
        path.with_suffix(".txt").symlink_to(outside / "secret.txt")

    def piped_caption(path: Path) -> None:
        path.write_bytes(good_picture(2))
        os.mkfifo(path.with_suffix(".txt"))

    def deep(path: Path) -> None:
        path.write_bytes(good_picture(3))
        path.with_suffix(".json").write_bytes(DEEP)

    def no_name(path: Path) -> None:
        write(Path(os.fsdecode(os.fsencode(path.with_suffix("")) + b"\xff.png")), good_picture(3))

    kinds: list[Callable[[Path], None]] = [
        *(lambda path, content=content: write(path, content) for content in BAD_FILES.values()),
        *(lambda path, to=to: link(path, to) for to in ("/dev/zero", str(outside / "secret.png"), "../nowhere.png", "/proc/self/mem")),
        *(lambda path, text=text: write(path, good_picture(4), text) for text in (b"f\xfcr", "", LONG)),
        *(pipe, linked_caption, piped_caption, deep, no_name),
        lambda path: path.symlink_to(path),
    ]
    usable = 0
    for number in range(count):
        path = folder / f"{number:05}.png"
        if generator.random() < 0.2:
            write(path, good_picture(number), json=DEEP)  # the text is enough
            usable += 1
        else:
            generator.choice(kinds)(path)
    write(folder / "huge.png", good_picture(5), HUGE)
    return usable


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, size: int | None = None) -> bytes:
    """Return a tar header and its data. `size` is what the header falsely claims."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def extended(fields: dict[bytes, bytes]) -> bytes:
    """Return a pax header."""
    lines = b""
    for name, value in fields.items():
        rest = b" " + name + b"=" + value + b"\n"
        length = len(rest)
        while length != len(rest) + len(str(length)):
            length = len(rest) + len(str(length))
        lines += str(length).encode() + rest
    return member("pax", lines, tarfile.XHDTYPE)


def old_sparse(name: str, content: bytes) -> bytes:
    """Return an old GNU header whose map of holes continues with garbage."""
    block = bytearray(member(name, content, tarfile.GNUTYPE_SPARSE))
    block[386:482], block[482], block[483:495] = b"nonsense" * 12, 1, b"nonsense 123"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block[:512]) + b"\xfe" * 504 + b"\0" * 8 + bytes(block[512:])


def fill_tar(path: Path, count: int, generator: random.Random) -> int:
    def with_text(name: str, image: bytes) -> bytes:
        return image + member(f"{name}.txt", b"words")

    def pax(name: str, fields: dict[bytes, bytes], as_name: str = "") -> bytes:
        return with_text(name, extended(fields) + member(as_name or f"{name}.png", good_picture(1)))

    def long_names(name: str) -> list[bytes]:
        return ["/".join([name, *["x" * 200] * 25, f"0.{end}"]).encode() for end in ("png", "txt")]

    kinds: list[Callable[[str], bytes]] = [
        *(lambda name, content=content: with_text(name, member(f"{name}.png", content)) for content in BAD_FILES.values()),
        *(
            lambda name, kind=kind: with_text(name, member(f"{name}.png", kind=kind))
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
        ),
        *(
            lambda name, text=text: member(f"{name}.png", good_picture(1)) + member(f"{name}.txt", text)
            for text in (b"f\xfcr", b"", LONG.encode())
        ),
        lambda name: member(f"{name}.png", good_picture(1)) + member(f"{name}.json", DEEP),
        lambda name: member(f"{name}.txt", b"words"),
        lambda name: pax(name, {b"GNU.sparse.map": b"0,x,9", b"GNU.sparse.size": b"many", b"GNU.sparse.numblocks": b"-1"}),
        lambda name: pax(name, {b"GNU.sparse.major": b"1", b"GNU.sparse.name": f"{name}.png".encode()}, f"GNUSparseFile.0/{name}.png"),
        lambda name: pax(name, {b"size": b"-5"}),
        lambda name: with_text(name, member("pax", b"99999999 path=a\n", tarfile.XHDTYPE) + member(f"{name}.png", good_picture(1))),
        lambda name: with_text(name, member("pax", b"nonsense" * 9, tarfile.XHDTYPE) + member(f"{name}.png", good_picture(1))),
        lambda name: with_text(name, old_sparse(f"{name}.png", good_picture(1))),
        lambda name: b"".join(extended({b"path": path}) + member("x", good_picture(1)) for path in long_names(name)),
        lambda name: b"".join(
            member("@", path + b"\0", tarfile.GNUTYPE_LONGNAME) + member("x", good_picture(1)) for path in long_names(name)
        ),
        lambda name: extended({b"path": name.encode() + b"\xff.png"}) + member("x.png", good_picture(1)),
        lambda name: with_text(name, member("g", b"x" * 9000, tarfile.XGLTYPE) * 9 + member(f"{name}.png")),
        lambda name: with_text(name, extended({b"comment": b"x"}) * 50 + member(f"{name}.png")),
    ]
    content, usable = [], 0
    for number in range(count):
        name = f"in/{number:05}"
        if generator.random() < 0.2:
            content.append(with_text(name, member(f"{name}.png", good_picture(number))))
            usable += 1
        else:
            content.append(generator.choice(kinds)(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join([*content, bytes(1024)]))
    return usable


def fill_zip(path: Path, count: int, generator: random.Random) -> int:
    spoilt: list[str] = []
    usable = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:

        def write(name: str, image: bytes, text: bytes = b"words", suffix: str = "txt", how: int = zipfile.ZIP_DEFLATED) -> None:
            archive.writestr(f"{name}.png", image, how)
            archive.writestr(f"{name}.{suffix}", text, how)

        def spoil(name: str, how: int) -> None:
            write(name, generator.randbytes(300), how=how)
            spoilt.append(f"{name}.png")

        kinds: list[Callable[[str], None]] = [
            *(lambda name, content=content: write(name, content) for content in BAD_FILES.values()),
            *(lambda name, text=text: write(name, good_picture(1), text) for text in (b"f\xfcr", b"", LONG.encode())),
            *(
                lambda name, how=how: spoil(name, how)
                for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
            ),
            lambda name: write(name, good_picture(1), DEEP, "json"),
            lambda name: write(f"{name}/{'x' * 5000}", good_picture(1)),
        ]
        for number in range(count):
            name = f"{number:05}"
            if generator.random() < 0.2:
                write(name, good_picture(number), how=generator.choice([zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
                usable += 1
            else:
                generator.choice(kinds)(name)
        places = [archive.getinfo(name).header_offset + 30 + len(name) for name in spoilt]
    content = bytearray(path.read_bytes())
    for place in places:
        content[place : place + 200] = b"\xa5" * 200
    path.write_bytes(content)
    return usable


def fill_list(folder: Path, count: int, generator: random.Random, kind: str) -> int:
    """Write a folder with metadata.jsonl or metadata.csv, each line of which is a record."""
    folder.mkdir(parents=True)
    of_json: list[Callable[[str], bytes]] = [
        lambda name: DEEP,
        lambda name: json.dumps({"file_name": f"{name}.png", "text": {"a": [1] * 99}}).encode(),
        lambda name: json.dumps({"file_name": [name], "text": "words"}).encode(),
        lambda name: b'{"file_name": "%s\xff.png", "text": "words"}' % name.encode(),
        lambda name: json.dumps({"file_name": f"\ud800{name}.png", "text": "words"}).encode(),
        lambda name: json.dumps({"file_name": f"\0{name}.png", "text": "words"}).encode(),
        lambda name: b'{"file_name": "%s.png", "text": %s}' % (name.encode(), b"9" * 9000),
        lambda name: b"null",
    ]
    fields = [("{}.png", LONG), ("x" * 5000 + "/{}.png", "words"), ("../{}.png", "words"), ("/dev/zero", "words"), ("{}.png", "")]
    lines, usable = [], 0
    for number in range(count):
        name = f"{number:05}"
        if generator.random() < 0.2:
            (folder / f"{name}.png").write_bytes(good_picture(number))
            lines.append(_line(kind, f"{name}.png", "words"))
            usable += 1
        elif kind == "jsonl" and generator.random() < 0.6:
            lines.append(generator.choice(of_json)(name))
        else:
            file, text = generator.choice(fields)
            lines.append(_line(kind, file.format(name), text))
    lines.append(_line(kind, "huge.png", HUGE))
    head = b"file_name,text\n" if kind == "csv" else b""
    (folder / f"metadata.{kind}").write_bytes(head + b"\n".join(lines) + b"\n")
    (folder / "unlisted.png").write_bytes(b"")
    return usable


def _line(kind: str, file: str, text: str) -> bytes:
    return json.dumps({"file_name": file, "text": text}).encode() if kind == "jsonl" else f"{file},{text}".encode()


def fill_table(path: Path, count: int, generator: random.Random) -> int:
    paths = ["/dev/zero", "../outside.png", "\0", "x" * 5000, "beside/pipe.png", "", None]
    cells, texts, usable = [], [], 0
    (path.parent / "beside").mkdir(parents=True)
    os.mkfifo(path.parent / "beside" / "pipe.png")
    for number in range(count):
        cell, text = {"bytes": good_picture(number), "path": None}, "words"
        kind = generator.randrange(5)
        if kind == 0:
            usable += 1
        elif kind == 1:
            text = generator.choice([LONG, "", None])
        elif kind == 2:
            cell["bytes"] = generator.choice(list(BAD_FILES.values()))
        else:
            cell = {"bytes": None, "path": generator.choice(paths)}
        cells.append(cell)
        texts.append(text)
    pq.write_table(pa.table({"image": cells, "text": texts}), path, row_group_size=40)
    return usable


def header_bomb(path: Path, kind: bytes = tarfile.XHDTYPE, megabytes: int = 3000) -> Path:
    """Write a gzipped tar, small on the disk, whose second header expands to so many megabytes, a multiple of 10."""
    ten_megabytes = gzip.compress(bytes(10_000_000), 1)
    buffer = io.BytesIO()
    buffer.write(gzip.compress(member("0.png", good_picture(0)) + member("0.txt", b"words")))
    buffer.write(gzip.compress(member("bomb", kind=kind, size=megabytes * 1_000_000)))
    buffer.write(ten_megabytes * (megabytes // 10))
    path.write_bytes(buffer.getvalue())
    return path


def lying_zip(path: Path, says: int, holds: int) -> Path:
    """Write a zip archive with an image that claims to have `says` bytes and expands to `holds` bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(holds))
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<L", holds), struct.pack("<L", says)))
    return path
