"""Images in archives are recognised by their content where their names say nothing, or something else."""

import io
import zipfile
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import features

from microdit.data.decode import decode
from microdit.data.sources.archives import archive_source, tar_members
from microdit.data.sources.samples import SEVERAL
from microdit.data.sources.untrusted_files import LARGEST_FILE, sum_of_kinds
from tests.data import hostile
from tests.data.pictures import picture, problems_of, records_of, write_tar

FORMS = ["JPEG", "PNG", "GIF", "BMP", "WEBP", "JPEG2000", *(["AVIF"] if features.check("avif") else [])]
ARCHIVES = ["a.tar", "a.tar.gz", "a.zip"]


def write(path, files):
    if path.suffix != ".zip":
        return write_tar(path, files, "w:gz" if path.suffix == ".gz" else "w")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return path


def read(path):
    """Return the records of an archive, and the sum of what they pass over."""
    records = records_of(archive_source([path]))
    return records, sum_of_kinds(*(record.passed_over for record in records))


@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("form", FORMS)
def test_a_picture_of_any_name_is_read(tmp_path, archive, form):
    names = {"photo": "photo", "other.dat": "other", "below/third.mp4": "below/third", "fourth.jpg": "fourth"}
    images = {key: picture(number, form, (40, 32)) for number, key in enumerate(names.values())}
    files = [file for name, key in names.items() for file in ((name, images[key]), (f"{key}.txt", key.encode()))]
    records, passed_over = read(write(tmp_path / archive, files))
    assert {record.key: record.captions["caption"] for record in records} == {key: key for key in images}
    assert {record.key: record.image for record in records} == images
    assert all(decode(record.image).size == (40, 32) for record in records)
    assert passed_over == {}


@pytest.mark.parametrize("archive", ARCHIVES)
def test_what_only_looks_like_a_picture_is_passed_over(tmp_path, archive):
    files = [
        ("0.png", picture(1, "PNG")),
        ("0.txt", b"words"),
        ("1.cr2", b"II*\0" + bytes(60)),  # a camera's raw file begins like a TIFF
        ("2.csv", picture(2, "PNG")),  # never opened, since there may be one beside each image
        ("3", b""),
        ("4", b"\x89PNG"),
    ]
    records, passed_over = read(write(tmp_path / archive, files))
    assert problems_of(records) == {"0": ""}
    assert passed_over == {"without a suffix": 2, ".cr2": 1, ".csv": 1}


@pytest.mark.parametrize("archive", ARCHIVES)
def test_beside_a_picture_with_a_suffix_others_need_captions_of_their_own(tmp_path, archive):
    files = [("0.depth", picture(1, "PNG")), ("0.image.jpg", picture(2)), ("0.mask.bin", picture(3, "PNG")), ("0.txt", b"words")]
    files += [("1.jpg", picture(4)), ("1.txt", b"words"), ("1.late.dat", picture(5)), ("1.late.txt", b"late"), ("1", picture(6))]
    records, passed_over = read(write(tmp_path / archive, files))
    assert {record.key: (record.image, record.captions, record.problem) for record in records} == {
        "0": (picture(2), {"caption": "words"}, ""),
        "1": (picture(4), {"caption": "words"}, ""),
        "1.late": (picture(5), {"caption": "late"}, ""),
    }
    assert passed_over == {".depth": 1, ".mask.bin": 1, "without a suffix": 1}


def test_among_several_pictures_without_a_suffix_none_is_guessed(tmp_path):
    (record,), passed_over = read(write(tmp_path / "a.tar", [("0", picture(1)), ("0.dat", picture(2)), ("0.txt", b"words")]))
    assert (record.key, record.problem, passed_over) == ("0", SEVERAL, {".dat": 1})


def test_a_picture_by_content_that_is_too_large_is_rejected_by_name(tmp_path):
    content = picture(1)
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(hostile.member("large", content, size=LARGEST_FILE + 1)[: 512 + len(content)])
        file.seek(512 + -(-(LARGEST_FILE + 1) // 512) * 512)
        file.write(hostile.member("small", content) + bytes(1024))
    records, _ = read(tmp_path / "a.tar")
    assert problems_of(records) == {"large": "file is too large", "small": "no caption"}


class CountedFile(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, size=-1):
        content = super().read(size)
        self.count += len(content)
        return content


def test_only_the_first_bytes_of_a_member_are_read_to_recognise_it():
    content = b"".join(hostile.member(name, picture(1) + bytes(100_000)) for name in ("photo", "film.mp4")) + bytes(512)
    file = CountedFile(content)
    first, second = ((member.peek(16), member.read() if member.name == "photo" else b"") for member in tar_members(file))
    assert first == (picture(1)[:16], picture(1) + bytes(100_000))
    assert second == (picture(1)[:16], b"")
    assert file.count < len(picture(1)) + 100_000 + 16 + 3_000


NAMES = st.builds(
    lambda *parts: "".join(parts),
    st.sampled_from(["0", "1", "in/0", ".hidden"]),
    st.sampled_from(["", ".seg", ".05.01"]),
    st.sampled_from(["", ".dat", ".bin", ".png", ".jpg", ".txt", ".json", ".mp4"]),
)


@given(files=st.dictionaries(NAMES, st.sampled_from([picture(1), b"words"]), max_size=12), archive=st.sampled_from(["a.tar", "a.zip"]))
def test_every_picture_is_kept_rejected_or_passed_over(tmp_path_factory, files, archive):
    """Each picture by suffix or by content is that of one record or passed over, and so is each other file that is no caption."""
    path = write(tmp_path_factory.mktemp("archive") / archive, sorted(files.items()))
    records, passed_over = read(path)
    captions = [name for name in files if name.endswith((".txt", ".json")) and not name.startswith(".")]
    standing = Counter(bool(record.image) or record.problem == SEVERAL for record in records)[True]
    assert standing + sum(passed_over.values()) == len(files) - len(captions)
