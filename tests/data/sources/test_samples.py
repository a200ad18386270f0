"""Every file of an archive is an image, a caption of one, or passed over and counted."""

import gzip
import zipfile
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.data.sources.archives import archive_source
from microdit.data.sources.base import END
from microdit.data.sources.samples import MOST_UNITS, SEVERAL
from microdit.data.sources.untrusted_files import kind_of, sum_of_kinds
from tests.data.pictures import picture, problems_of, records_of, write_tar

WORDS = b"words"


def read(path):
    return records_of(archive_source([path]))


def passed_over(records):
    return sum_of_kinds(*(record.passed_over for record in records))


def both(*names):
    """Return images and texts with these names, which are complete up to their last extension."""
    return [file for number, name in enumerate(names) for file in ((f"{name}.png", picture(number)), (f"{name}.txt", name.encode()))]


def test_names_with_dates_are_samples_of_their_own(tmp_path):
    names = ["2024.05.01", "2024.05.02", "2024.06.01"]
    records = read(write_tar(tmp_path / "a.tar", both(*names)))
    assert {record.key: (record.captions["caption"], record.image) for record in records} == {
        name: (name, picture(number)) for number, name in enumerate(names)
    }


def test_versions_beside_a_picture_are_samples_and_masks_are_passed_over(tmp_path):
    files = [*both("photo", "photo.1"), ("photo.2.png", picture(2)), ("photo.seg.png", picture(3)), ("photo.cls", b"1")]
    records = read(write_tar(tmp_path / "a.tar", files))
    assert problems_of(records) == {"photo": "", "photo.1": ""}
    assert passed_over(records) == {".png": 1, ".seg.png": 1, ".cls": 1}


def test_the_only_picture_of_a_name_takes_its_captions(tmp_path):
    files = [("0.image.png", picture(0)), ("0.caption.txt", WORDS), ("1.jpg", picture(1)), ("1.prompt.txt", b"asked")]
    first, second = records_of(archive_source([write_tar(tmp_path / "a.tar", files)], {"caption": 1.0, "prompt": 1.0}))
    assert (first.key, first.captions, first.image) == ("0", {"caption": "words"}, picture(0))
    assert second.captions["prompt"] == "asked"


@pytest.mark.parametrize("names", [("0.jpg", "0.png"), ("0.png", "0.jpg"), ("0.input.png", "0.output.png")])
def test_which_of_several_pictures_is_meant_is_not_guessed(tmp_path, names):
    (record,) = read(write_tar(tmp_path / "a.tar", [*((name, picture()) for name in names), ("0.txt", WORDS)]))
    assert (record.key, record.problem, record.image) == ("0", SEVERAL, b"")
    assert sum(record.passed_over.values()) == 1  # the record stands for one of them


def test_pictures_without_any_caption_are_rejected_one_by_one(tmp_path):
    records = read(write_tar(tmp_path / "a.tar", [("2024.05.01.png", picture(1)), ("2024.05.02.png", picture(2))]))
    assert problems_of(records) == {"2024.05.01": "no caption", "2024.05.02": "no caption"}


def test_a_whole_archive_of_one_name_is_not_held(tmp_path):
    names = [f"2024.{number:04}" for number in range(3 * MOST_UNITS)]
    records = read(write_tar(tmp_path / "a.tar", both(*names)))
    assert [(record.key, record.problem) for record in records] == [(name, "") for name in names]


def test_hidden_files_and_what_has_no_use_are_counted(tmp_path):
    files = [(".DS_Store", b""), ("._0.png", b""), (".ipynb_checkpoints/0.png", picture()), *both("0"), ("0.mp4", b""), ("README", b"")]
    for path in (write_tar(tmp_path / "a.tar", files), tmp_path / "a.zip"):
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in files:
                    archive.writestr(name, content)
        records = read(path)
        assert problems_of(records) == {"0": ""}
        assert passed_over(records) == {"hidden file": 3, ".mp4": 1, "without a suffix": 1}


def test_an_archive_without_pictures_is_named(tmp_path):
    for name, files in {"a.tar": [], "b.tar": [("notes.md", b"x"), ("film.mp4", b"")]}.items():
        (record,) = read(write_tar(tmp_path / name, files))
        assert (record.key, record.problem) == (f"{name}{END}", "archive holds no pictures")
        assert passed_over([record]) == ({".md": 1, ".mp4": 1} if files else {})


def compressed(content, kind):
    return {"": bytes, "gz": gzip.compress, "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True)}[kind](content)


@pytest.mark.parametrize("kind", ["", "gz", "zst"])
def test_archives_joined_end_to_end_are_read_to_the_end(tmp_path, kind):
    parts = [write_tar(tmp_path / "part.tar", both(f"{number}")).read_bytes() for number in range(3)]
    for joined in (compressed(b"".join(parts), kind), b"".join(compressed(part, kind) for part in parts)):
        path = tmp_path / f"a.tar{'.' if kind else ''}{kind}"
        path.write_bytes(joined)
        assert problems_of(read(path)) == {"0": "", "1": "", "2": ""}


@pytest.mark.parametrize("kind", ["", "gz", "zst"])
def test_a_tail_of_zeros_is_named(tmp_path, kind):
    whole = write_tar(tmp_path / "whole.tar", [file for number in range(40) for file in both(f"{number:02}")]).read_bytes()
    path = tmp_path / f"a.tar{'.' if kind else ''}{kind}"
    path.write_bytes(compressed(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2), kind))
    *good, last = read(path)
    assert 15 < len(good) < 25
    assert (last.key, last.problem) == (f"{path.name}{END}", "archive ends in zeros, in place of what may have stood there")
    path.write_bytes(compressed(whole, kind))
    assert all(not record.problem for record in read(path))


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_archive_cut_anywhere_says_so(tmp_path, kind):
    whole = compressed(write_tar(tmp_path / "whole.tar", both(*"abcdef")).read_bytes(), kind)
    path = tmp_path / f"a.tar.{kind}"
    for length in range(0, len(whole) - 8, 40):
        path.write_bytes(whole[:length])
        assert read(path)[-1].problem == "archive is damaged from here on"


STEMS = st.sampled_from(["0", "1", "2024", "in/0", "x.y/0"])
MIDDLES = st.sampled_from(["", ".05.01", ".05.02", ".seg", ".image", ".1"])
SUFFIXES = st.sampled_from([".png", ".jpg", ".txt", ".json", ".mp4", ".psd", "", ".PNG"])
NAMES = st.one_of(
    st.builds(lambda *parts: "".join(parts), STEMS, MIDDLES, SUFFIXES), st.sampled_from([".DS_Store", ".git/0.png", "a/.b.txt"])
)


@given(names=st.lists(NAMES, max_size=12), zipped=st.booleans())
def test_every_file_is_kept_rejected_or_passed_over(tmp_path_factory, names, zipped):
    """Each picture is the one of a record or passed over, each caption belongs to a record, and everything else is passed over."""
    path = tmp_path_factory.mktemp("archive") / ("a.zip" if zipped else "a.tar")
    names = sorted(set(names))
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, WORDS)
    else:
        write_tar(path, [(name, WORDS) for name in names])
    records = read(path)
    hidden = [name for name in names if kind_of(name) == "hidden file"]
    pictures = [name for name in names if name not in hidden and name.lower().endswith((".png", ".jpg"))]
    captions = [name for name in names if name not in hidden and name.endswith((".txt", ".json"))]
    others = [name for name in names if name not in (*hidden, *pictures, *captions)]
    counts = passed_over(records)
    pictures_left = sum(count for kind, count in counts.items() if kind.endswith((".png", ".jpg")))
    assert sum(bool(record.image) or record.problem == SEVERAL for record in records) + pictures_left == len(pictures)
    assert Counter(kind_of(name) for name in [*hidden, *others]) == Counter(
        {kind: count for kind, count in counts.items() if not kind.endswith((".png", ".jpg"))}
    )
    assert 1 <= len(records) <= len(pictures) + len(captions) + 1
