"""Every file in the folder of a named data set is read or counted as passed over, by kind."""

import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microdit.cli.data import _report_encoded
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.look import look
from microdit.data.sources.open import open_source
from microdit.data.sources.untrusted_files import sum_of_kinds
from microdit.encoders.autoencoder import Pixels
from tests.data.pictures import picture, problems_of, records_of, write_file, write_json, write_tar


def passed_over(source):
    """Return the counts of a source: of the files beside its parts, and of those inside."""
    return source.passed_over, sum_of_kinds(*(record.passed_over for record in records_of(source)))


def test_cc12m(tmp_path):
    write_tar(tmp_path / "00000.tar", [("0.jpg", picture()), ("0.txt", b"words"), ("0.cls", b"1")])
    for name in ("00000.parquet", "00000_stats.json", ".cache/x", "later/00001.tar", "logo.png"):
        write_file(tmp_path / name, b"")
    beside, inside = passed_over(open_source(f"cc12m:{tmp_path}"))
    assert beside == {".json": 1, ".parquet": 1, ".png": 1, ".tar": 1, "hidden folder": 1}
    assert inside == {".cls": 1}


def test_sa1b(tmp_path):
    write_tar(tmp_path / "sa_000000.tar", [("sa_1.jpg", picture()), ("sa_1.json", b"{}")])
    for name in ("captions/sa_1.txt", "captions/notes.md", "captions/old/sa_1.txt", "readme.txt"):
        write_file(tmp_path / name, b"words")
    beside, inside = passed_over(open_source(f"sa1b:{tmp_path}"))
    assert beside == {".txt": 2, ".md": 1}
    assert inside == {".json": 1}  # the masks


def test_textcaps(tmp_path):
    write_json(tmp_path / "TextCaps_0.1_train.json", {"data": [{"image_id": "aa", "caption_str": "words"}]})
    write_json(tmp_path / "TextCaps_0.1_val.json", {"data": []})
    for name in ("aa", "picture_of_the_validation_set"):
        write_file(tmp_path / "train_images" / f"{name}.jpg", picture())
    assert passed_over(open_source(f"textcaps:{tmp_path}")) == ({".jpg": 1, ".json": 1}, {})
    for split in ("train", "test"):
        pq.write_table(pa.table({"image": [picture()], "reference_strs": [["words"]]}), tmp_path / f"{split}-0.parquet")
    assert passed_over(open_source(f"textcaps:{tmp_path}")) == ({".jpg": 2, ".json": 2, ".parquet": 1}, {})


def test_coco2014(tmp_path):
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2)]
    annotations = [{"id": n, "image_id": n, "caption": "words"} for n in (1, 2)]
    write_json(tmp_path / "annotations" / "captions_val2014.json", {"images": images, "annotations": annotations})
    write_json(tmp_path / "annotations" / "instances_val2014.json", {})
    for name in ("val2014/1.jpg", "val2014/unlisted.jpg", "train2014/1.jpg"):
        write_file(tmp_path / name, picture())
    source = open_source(f"coco2014:{tmp_path}")
    assert problems_of(records_of(source)) == {"val2014/1.jpg": "", "val2014/2.jpg": "no such file"}
    assert passed_over(source) == ({".jpg": 2, ".json": 1}, {})


def test_journeydb(tmp_path):
    lines = [json.dumps({"img_path": f"./{place}.jpg", "prompt": "words"}) for place in ("000/a", "001/b", "001/c")]
    write_file(tmp_path / "train" / "train_anno_realease_repath.jsonl", "\n".join(lines).encode())
    write_tar(tmp_path / "train" / "imgs" / "000.tgz", [("000/a.jpg", picture()), ("000/film.mp4", b"")], "w:gz")
    for name in ("001/b.jpg", "001/c", "001/film.mp4", "001/.DS_Store"):
        write_file(tmp_path / "train" / "imgs" / name, picture() if name[-1] in "gc" else b"")
    for name in ("train/imgs/001.tgz", "train/imgs/README.md", "valid/imgs/0.jpg"):
        write_file(tmp_path / name, b"")
    source = open_source(f"journeydb:{tmp_path}")
    assert problems_of(records_of(source)) == {"000/a": "", "001/b": "", "001/c": ""}
    beside, inside = passed_over(source)
    assert beside == {".jpg": 1, ".md": 1, ".mp4": 1, ".tgz": 1, "hidden file": 1}
    assert inside == {".mp4": 1}


@pytest.mark.parametrize("inner", ["", "part-000001/"])
def test_diffusiondb(tmp_path, inner):
    for number in (1, 2):
        with zipfile.ZipFile(tmp_path / f"part-00000{number}.zip", "w") as archive:
            for name, content in ((f"{number}.png", picture(number, "PNG")), ("more.json", b"{}"), ("notes.txt", b"")):
                archive.writestr(inner + name, content)
            archive.writestr(f"{inner}part-00000{number}.json", json.dumps({f"{number}.png": {"p": "words"}}))
    write_json(tmp_path / "part-000002" / "part-000002.json", {"2.png": {"p": "words"}})
    write_file(tmp_path / "part-000002" / "2.png", picture(2, "PNG"))
    write_file(tmp_path / "part-000002" / "notes.txt", b"")
    columns = {"image_name": ["x"], "image_nsfw": [0.0], "prompt_nsfw": [0.0]}
    pq.write_table(pa.table(columns), tmp_path / "metadata.parquet")
    write_file(tmp_path / "README.md", b"")
    source = open_source(f"diffusiondb:{tmp_path}")
    assert problems_of(records_of(source)) == {"part-000001/1": "", "part-000002/2": ""}
    beside, inside = passed_over(source)
    assert beside == {".md": 1, ".txt": 1, ".zip": 1}
    assert inside == {".json": 1, ".txt": 1}  # the prompts have been read


def test_encode_and_look_show_the_sum(tmp_path, text_encoder, capsys):
    write_tar(tmp_path / "set" / "00000.tar", [("0.png", picture(1, "PNG", (256, 256))), ("0.txt", b"words"), ("0.mp4", b"")])
    write_file(tmp_path / "set" / "00000.parquet", b"")
    source = open_source(f"cc12m:{tmp_path / 'set'}")
    manifest = encode_source(source, tmp_path / "out", EncodeSettings((8,)), Pixels(), text_encoder)
    assert (manifest["rows"], manifest["rejected"], manifest["passed_over"]) == (1, {}, {".mp4": 1, ".parquet": 1})
    assert look(source)[2]["passed_over"] == {".mp4": 1, ".parquet": 1}
    _report_encoded(manifest, tmp_path / "out")
    assert "passed over: 1 .mp4, 1 .parquet" in capsys.readouterr().out
