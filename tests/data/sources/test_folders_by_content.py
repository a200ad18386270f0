"""Images in folders are recognised by their content where their names say nothing, or something else."""

import os

import pytest
from PIL import features

from microdit.data.decode import decode
from microdit.data.sources.open import open_source
from microdit.errors import UserError
from tests.data.pictures import picture, problems_of, records_of, write_file

FORMS = ["JPEG", "PNG", "GIF", "BMP", "WEBP", "JPEG2000", *(["AVIF"] if features.check("avif") else [])]


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_of_any_name_is_read(tmp_path, form):
    for name in ("photo", "other.dat", "below/third.mp4", "fourth.jpg"):
        write_file(tmp_path / "set" / name, picture(3, form, (40, 32)))
        write_file((tmp_path / "set" / name).with_suffix(".txt"), name.encode())
    records = records_of(open_source(str(tmp_path / "set")))
    assert {record.key: record.captions["caption"] for record in records} == {
        name: name for name in ("photo", "other.dat", "below/third.mp4", "fourth.jpg")
    }
    assert all(decode(record.image).size == (40, 32) for record in records)
    assert open_source(str(tmp_path / "set")).passed_over == {}


def test_what_only_looks_like_a_picture_is_passed_over_or_rejected_by_name(tmp_path):
    write_file(tmp_path / "set" / "a.png", picture(1, "PNG"))
    write_file(tmp_path / "set" / "raw.cr2", b"II*\0" + bytes(60))  # a camera's raw file begins like a TIFF
    write_file(tmp_path / "set" / "b.txt", picture(2, "PNG"))
    write_file(tmp_path / "set" / "pipe", b"")
    (tmp_path / "set" / "pipe").unlink()
    os.mkfifo(tmp_path / "set" / "pipe")
    write_file(tmp_path / "outside", picture(3, "PNG"))
    (tmp_path / "set" / "link").symlink_to(tmp_path / "outside")
    source = open_source(str(tmp_path / "set"))
    assert problems_of(records_of(source)) == {"a.png": "no caption"}
    assert source.passed_over == {"without a suffix": 2, ".cr2": 1, ".txt": 1}


def test_a_folder_of_such_pictures_alone_is_a_source(tmp_path):
    write_file(tmp_path / "set" / "below" / "photo", picture(1, "PNG"))
    write_file(tmp_path / "set" / "below" / "photo.txt", b"words")
    assert len(records_of(open_source(str(tmp_path / "set")))) == 1
    write_file(tmp_path / "other" / "film", b"no picture")
    with pytest.raises(UserError, match="holds no images"):
        open_source(str(tmp_path / "other"))
