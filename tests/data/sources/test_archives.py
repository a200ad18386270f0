import io
import json
import os
import tarfile
import zipfile

import pytest

from microdit.data.sources.archives import archive_source
from microdit.data.sources.open import open_source
from microdit.data.sources.untrusted_files import LARGEST_FILE
from tests.data.pictures import picture, problems_of, records_of, write_tar

DAMAGED = "archive is damaged from here on"


def pairs(count):
    return [pair for n in range(count) for pair in ((f"{n:05}.jpg", picture(n)), (f"{n:05}.txt", f"caption {n}".encode()))]


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tgz", "w:gz"), ("a.tar.gz", "w:gz")])
def test_files_with_one_name_become_one_record(tmp_path, name, mode):
    files = [
        ("in/x.y/0.jpg", picture(0)),
        ("in/x.y/0.txt", b"zero"),
        ("in/x.y/0.seg.png", b"mask"),
        ("./1.PNG", picture(1)),
        ("1.txt", b"one"),
    ]
    records = records_of(archive_source([write_tar(tmp_path / name, [*files, (".hidden.jpg", b"")], mode)]))
    assert [(record.key, record.captions, record.image, record.problem) for record in records] == [
        ("in/x.y/0", {"caption": "zero"}, picture(0), ""),
        ("1", {"caption": "one"}, picture(1), ""),
    ]


def test_fields_of_json_are_captions_by_name(tmp_path):
    fields = json.dumps({"alt": "from json", "caption": "json's caption", "width": 5}).encode()
    tar = write_tar(tmp_path / "a.tar", [("0.jpg", picture()), ("0.json", fields), ("1.json", b"{"), ("1.jpg", picture())])
    first, second = records_of(archive_source([tar], {"alt": 0.5, "caption": 0.5, "width": 1.0}))
    assert first.captions == {"alt": "from json", "caption": "json's caption"}
    assert second.problem == "sidecar is not JSON"
    tar = write_tar(tmp_path / "b.tar", [("0.jpg", picture()), ("0.json", fields), ("0.txt", b"from text")])
    assert records_of(archive_source([tar]))[0].captions == {"caption": "from text"}


def test_every_sample_counts_once_whatever_is_wrong_with_it(tmp_path):
    files = [
        *[("good.jpg", picture()), ("good.txt", b"words")],
        *[("bare.jpg", picture())],
        *[("blind.txt", b"words")],
        *[("latin.jpg", picture()), ("latin.txt", b"f\xfcr")],
        *[("twin.jpg", picture(1)), ("twin.txt", b"1"), ("twin.jpg", picture(2)), ("twin.txt", b"2")],
        *[("good.jpg", picture()), ("good.txt", b"late")],
        *[("empty.jpg", b""), ("empty.txt", b"words")],
    ]
    records = records_of(archive_source([write_tar(tmp_path / "a.tar", files)]))
    assert problems_of(records) == {
        "good": "",
        "bare": "no caption",
        "blind": "no image",
        "latin": "caption is not UTF-8",
        "twin": "",
        "twin#2": "duplicate key",
        "good#2": "duplicate key",
        "empty": "",  # the decoder says what is wrong with an empty file
    }
    assert next(record for record in records if record.key == "twin").image == picture(1)


def test_a_link_is_no_picture(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("0.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert problems_of(records_of(archive_source([tmp_path / "a.tar"]))) == {"0": "file cannot be read"}


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "a.tar"
    header = tarfile.TarInfo("0.jpg")
    header.size = LARGEST_FILE + 1
    with path.open("wb") as file:
        file.write(header.tobuf())
        file.seek(-(-header.size // 512) * 512, io.SEEK_CUR)  # a hole
        file.write(write_tar(tmp_path / "rest.tar", [("0.txt", b"words"), *pairs(2)[2:]]).read_bytes())
    assert problems_of(records_of(archive_source([path]))) == {"0": "file is too large", "00001": ""}


def test_a_tar_cut_anywhere_gives_what_was_whole_and_says_so(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", pairs(4)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [member.offset_data + member.size for member in tar][1::2]  # of each text, the last file of its pair
    path = tmp_path / "cut.tar"
    for length in range(0, ends[-1] // 512 * 512 + 513, 128):
        path.write_bytes(whole[:length])
        *good, last = records_of(archive_source([path]))
        assert (last.key, last.problem) == ("cut.tar#end", DAMAGED)
        assert len(good) == sum(end <= length for end in ends)
        assert all((good[n].key, good[n].image, good[n].problem) == (f"{n:05}", picture(n), "") for n in range(len(good)))
    path.write_bytes(whole)
    assert len(records_of(archive_source([path]))) == 4


def test_damage_in_the_middle_is_not_the_end(tmp_path):
    content = bytearray(write_tar(tmp_path / "a.tar", pairs(4)).read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        third = [member.offset for member in tar][4]
    content[third : third + 512] = b"\xff" * 512
    (tmp_path / "a.tar").write_bytes(content)
    assert problems_of(records_of(archive_source([tmp_path / "a.tar"]))) == {"00000": "", "00001": "", "a.tar#end": DAMAGED}
    zipped = write_tar(tmp_path / "b.tgz", pairs(50), "w:gz").read_bytes()
    (tmp_path / "b.tgz").write_bytes(zipped[: len(zipped) // 2])
    *good, last = records_of(archive_source([tmp_path / "b.tgz"]))
    assert (last.key, last.problem) == ("b.tgz#end", DAMAGED)
    assert 0 < len(good) < 50
    assert not any(record.problem for record in good)


def test_what_is_no_archive_is_one_record(tmp_path):
    for name in ("a.tar", "b.tgz", "c.zip"):
        (tmp_path / name).write_bytes(b"<html>404</html>" * 100)
    source = archive_source(sorted(tmp_path.iterdir()))
    assert problems_of(records_of(source)) == {f"{name}#end": DAMAGED for name in ("a.tar", "b.tgz", "c.zip")}


def test_zips_are_grouped_wherever_their_files_stand(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in [*pairs(3)[::2], *pairs(3)[1::2], ("lonely.txt", b"words")]:
            archive.writestr(name, content)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    place = content.index(picture(1))
    content[place + 20] ^= 255  # its checksum tells
    (tmp_path / "a.zip").write_bytes(content)
    records = records_of(archive_source([tmp_path / "a.zip"]))
    assert problems_of(records) == {"00000": "", "00001": "file cannot be read", "00002": "", "lonely": "no image"}
    assert records[2].captions == {"caption": "caption 2"}


def test_each_archive_is_a_part_named_by_its_place(tmp_path):
    for name in ("x/a.tar", "y/a.tar"):
        write_tar(tmp_path / name, pairs(1))
    source = archive_source([tmp_path / "x/a.tar", tmp_path / "y/a.tar"])
    assert [part.name for part in source.parts] == ["x/a.tar", "y/a.tar"]
    assert len(records_of(source)) == 2


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_a_caption_that_is_too_large_costs_its_picture(tmp_path, name):
    files = [("0.jpg", picture()), ("0.txt", b"w" * 5_000_000), ("1.jpg", picture()), ("1.txt", b"w" * 200_000), *pairs(3)[4:]]
    if name.endswith(".tar"):
        write_tar(tmp_path / name, files)
    else:
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, content in files:
                archive.writestr(file, content)
    problems = problems_of(records_of(archive_source([tmp_path / name])))
    assert problems == {"0": "file is too large", "1": "caption is too long", "00002": ""}


def test_archives_that_are_no_files_of_the_source_are_counted(tmp_path):
    write_tar(tmp_path / "set" / "a.tar", pairs(1))
    write_tar(tmp_path / "outside.tar", pairs(1))
    os.mkfifo(tmp_path / "set" / "pipe.tar")
    (tmp_path / "set" / "link.zip").symlink_to(tmp_path / "outside.tar")
    (tmp_path / "set" / "gone.tgz").symlink_to("nowhere.tgz")
    assert problems_of(records_of(open_source(str(tmp_path / "set")))) == {
        "00000": "",
        "gone.tgz#end": "no such file",
        "link.zip#end": "link leads out of the source",
        "pipe.tar#end": "not a regular file",
    }
    (tmp_path / "link.tar").symlink_to(tmp_path / "set" / "a.tar")
    assert problems_of(records_of(open_source(str(tmp_path / "link.tar")))) == {"00000": ""}  # it was named
