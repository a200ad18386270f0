import gzip
import io
import random
import tarfile

import pytest

from microdit.data.sources.archives import DamagedTar, tar_members
from tests.data import hostile

NAMES = ["a.png", "deep/" * 40 + "b.png", "x" * 300, "ü" * 200, "prefix" * 14 + "/" + "name" * 20]


def read(content: bytes) -> list[tuple[str, bytes]]:
    return [(member.name, member.read()) for member in tar_members(io.BytesIO(content)) if member.is_file and not member.problem]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_what_tarfile_writes_is_read(layout, mode):
    names = NAMES if layout != tarfile.USTAR_FORMAT else [NAMES[0], NAMES[4]]
    generator, buffer = random.Random(0), io.BytesIO()
    files = [(name, generator.randbytes(size)) for name, size in zip(names, (0, 511, 512, 513, 70_000), strict=False)]
    with tarfile.open(fileobj=buffer, mode=mode, format=layout, pax_headers={"comment": "of all"}) as archive:
        for name, content in files:
            folder = tarfile.TarInfo(f"{name}-folder")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert read(buffer.getvalue()) == files
    assert [member.is_folder for member in tar_members(io.BytesIO(buffer.getvalue()))] == [True, False] * len(files)


def test_what_is_not_read_is_passed_over():
    content = b"".join(hostile.member(f"{n}.png", bytes(1000 * n)) for n in range(5)) + bytes(512)
    for archive in (content, gzip.compress(content)):
        assert [(member.name, member.size) for member in tar_members(io.BytesIO(archive))] == [(f"{n}.png", 1000 * n) for n in range(5)]


def test_a_size_beyond_the_octal_field_is_in_an_extended_header():
    content = hostile.extended({b"size": b"4"}) + hostile.member("a.png", b"data", size=0) + hostile.member("b.png", b"more") + bytes(512)
    assert read(content) == [("a.png", b"data"), ("b.png", b"more")]


@pytest.mark.parametrize(
    ("header", "name", "problem"),
    [
        (hostile.old_sparse("a.png", b"data"), "a.png", "sparse file, which only tar itself can unpack"),
        (
            hostile.extended({b"GNU.sparse.map": b"1,x", b"GNU.sparse.name": b"a.png"}) + hostile.member("b", b"data"),
            "a.png",
            "sparse file",
        ),
        (hostile.extended({b"size": b"much"}) + hostile.member("a.png", b"data"), "a.png", "tar header is damaged"),
        (hostile.extended({b"size": b"-512"}) + hostile.member("a.png", b"data"), "a.png", "tar header is damaged"),
        (hostile.member("pax", b"-9 a=b\n", tarfile.XHDTYPE) + hostile.member("a.png", b"data"), "a.png", "tar header is damaged"),
        (hostile.member("pax", b"9 a=b\n", tarfile.XHDTYPE) + hostile.member("a.png", b"data"), "a.png", "tar header is damaged"),
    ],
)
def test_a_header_that_makes_no_sense_costs_its_member(header, name, problem):
    first, second = tar_members(io.BytesIO(header + hostile.member("next.png", b"more") + bytes(512)))
    assert (first.name, second.name, second.problem) == (name, "next.png", "")
    assert first.problem.startswith(problem)


@pytest.mark.parametrize(
    "content",
    [
        hostile.member("a", size=2**40),
        hostile.member("a", size=2**80),
        hostile.member("a", bytes(2_000_000), tarfile.XHDTYPE) + hostile.member("b") + bytes(512),
        hostile.member("a", b"x", tarfile.GNUTYPE_LONGNAME),
        hostile.old_sparse("a", b"")[:600],
        b"x" * 2000,
        b"\x1f\x8b" + bytes(100),
    ],
)
def test_an_archive_that_is_not_whole_says_so(content):
    with pytest.raises(DamagedTar):
        list(tar_members(io.BytesIO(content)))


def test_bytes_changed_anywhere_give_members_or_damage():
    generator = random.Random(0)
    whole = hostile.extended({b"path": b"long.png"}) + hostile.member("x", b"data" * 200) + hostile.old_sparse("s", b"x" * 600) + bytes(512)
    damaged = 0
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        try:
            read(bytes(content))
        except DamagedTar:
            damaged += 1
    assert 500 < damaged < 2000
