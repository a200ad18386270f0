"""Every file below a folder is an image, a caption of one, or passed over and counted."""

import json
from collections import Counter
from contextlib import ExitStack

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.cli.data import _report_encoded
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.look import look
from microdit.data.sources.folders import folder_source, listed_once
from microdit.data.sources.open import open_source
from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError
from tests.data.pictures import picture, problems_of, records_of, write_file, write_tar


def fill(folder, **files):
    for name in ("a.png", "in/b.jpg"):
        write_file(folder / name, picture(len(name), "PNG"))
        write_file((folder / name).with_suffix(".txt"), b"words")
    for name in files.get("more", ()):
        write_file(folder / name, b"")
    return folder


def test_what_is_no_picture_and_no_caption_is_counted_by_kind(tmp_path):
    more = [
        "logo.psd",
        "in/logo.PSD",
        "film.mp4",
        "lonely.txt",
        "README",
        ".DS_Store",
        ".ipynb_checkpoints/a-checkpoint.png",
        "in/x.tar.gz",
    ]
    folder = fill(tmp_path / "set", more=more)
    (folder / "again").symlink_to(folder / "in")
    source = open_source(str(folder))
    assert problems_of(records_of(source)) == {"a.png": "", "in/b.jpg": ""}
    assert source.passed_over == {
        ".psd": 2,
        ".mp4": 1,
        ".txt": 1,
        ".gz": 1,
        "without a suffix": 1,
        "hidden file": 1,
        "hidden folder": 1,
        "linked folder": 1,
    }


def test_captions_beside_pictures_are_passed_over_where_a_list_has_them(tmp_path):
    folder = fill(tmp_path / "set", more=["notes.md"])
    write_file(folder / "odd.name", picture(3, "PNG"))
    lines = [{"file_name": name, "text": "listed"} for name in ("a.png", "odd.name")]
    write_file(folder / "metadata.jsonl", "\n".join(map(json.dumps, lines)).encode())
    source = open_source(str(folder))
    assert problems_of(records_of(source)) == {"a.png": "", "odd.name": "", "in/b.jpg": "no caption"}
    assert source.passed_over == {".txt": 2, ".md": 1}


def test_archives_are_found_at_any_depth_and_files_beside_them_are_counted(tmp_path):
    for name in ("0.tar", "deep/1.tar"):
        write_tar(tmp_path / "tars" / name, [("a.png", picture()), ("a.txt", b"words"), ("a.cls", b"1")])
    for name in ("stats.json", "deep/0.parquet", "examples/a.png", ".git/config"):
        write_file(tmp_path / "tars" / name, b"")
    source = open_source(str(tmp_path / "tars"))
    assert [part.name for part in source.parts] == ["0.tar", "deep/1.tar"]
    assert source.passed_over == {".json": 1, ".parquet": 1, ".png": 1, "hidden folder": 1}
    (tmp_path / "clone" / "data").mkdir(parents=True)  # as the hub's own data sets are laid out
    pq.write_table(pa.table({"image": [picture()], "text": ["words"]}), tmp_path / "clone" / "data" / "train-0.parquet")
    write_file(tmp_path / "clone" / "README.md", b"")
    source = open_source(str(tmp_path / "clone"))
    assert (problems_of(records_of(source)), source.passed_over) == ({"train-0.parquet/0": ""}, {".md": 1})


def test_a_table_beside_pictures_lists_them(tmp_path):
    folder = fill(tmp_path / "set", more=["notes.md"])
    columns = {"file_name": ["in/b.jpg", "gone.png"], "text": ["from the table", "x"]}
    pq.write_table(pa.table(columns), folder / "metadata.parquet")
    source = open_source(str(folder))
    assert problems_of(records_of(source)) == {"metadata.parquet/0": "", "metadata.parquet/1": "no such file", "a.png": "no caption"}
    assert records_of(source)[0].captions == {"text": "from the table"}
    assert source.passed_over == {".txt": 2, ".md": 1}
    pq.write_table(pa.table({"image": [picture()], "text": ["words"]}), folder / "metadata.parquet")
    with pytest.raises(UserError, match=r"holds images beside metadata.parquet"):
        open_source(str(folder))


def test_a_folder_without_pictures_is_refused_with_what_it_holds(tmp_path):
    for number in range(3):
        write_file(tmp_path / f"{number}.psd", b"8BPS")
    with pytest.raises(UserError, match=r"holds no images .*, archives or tables, only 3 \.psd\."):
        open_source(str(tmp_path))


def test_encode_and_look_say_what_was_passed_over(tmp_path, text_encoder, capsys):
    files = [("a.png", picture(1, "PNG")), ("a.txt", b"words"), ("b.png", b""), ("b.txt", b"words"), ("c.mp4", b""), ("d.mp4", b"")]
    write_tar(tmp_path / "set" / "0.tar", files)
    write_file(tmp_path / "set" / "logo.psd", b"")
    source = open_source(str(tmp_path / "set"))
    manifest = encode_source(source, tmp_path / "out", EncodeSettings((8,)), Pixels(), text_encoder)
    assert (manifest["rows"], sum(manifest["rejected"].values()), manifest["passed_over"]) == (1, 1, {".mp4": 2, ".psd": 1})
    assert look(source)[2]["passed_over"] == {".psd": 1, ".mp4": 2}
    _report_encoded(manifest, tmp_path / "out")
    assert "passed over: 2 .mp4, 1 .psd" in capsys.readouterr().out


def test_another_process_counts_the_same(tmp_path):
    folder = fill(tmp_path / "set", more=["film.mp4"])
    with ExitStack() as stack:
        first, second = (
            folder_source(folder, None, stack.enter_context(listed_once(tmp_path / "out", tmp_path / ".part", 2))) for _ in range(2)
        )
        assert first.passed_over == second.passed_over == {".mp4": 1}


NAMES = st.tuples(
    st.sampled_from(["", "in/", "in/deeper/", ".hidden/", "x.y/"]),
    st.sampled_from(["a", "b", "a.b", ".c", "\u00fc"]),
    st.sampled_from([".png", ".jpg", ".txt", ".json", ".psd", ".md", "", ".TXT"]),
).map("".join)


@given(names=st.sets(NAMES, min_size=1, max_size=12))
def test_pictures_captions_and_the_files_passed_over_are_all_files(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("set")
    write_file(folder / "z.png", b"")
    for name in names:
        write_file(folder / name, b"words")
    source = folder_source(folder)
    keys = {record.key for record in records_of(source)}
    seen = {"z.png", *(name for name in names if not name.startswith(".hidden/"))}
    pictures = {name for name in seen if name.endswith((".png", ".jpg")) and not name.rpartition("/")[2].startswith(".")}
    captions = {name for name in seen if name.endswith((".txt", ".json")) and f"{name.rpartition('.')[0]}" in {p[:-4] for p in pictures}}
    hidden_folder = Counter({"hidden folder": int(any(name.startswith(".hidden/") for name in names))})
    assert keys == pictures
    assert sum(source.passed_over.values()) == len(seen) - len(pictures) - len(captions) + hidden_folder.total()
