import pickle

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microdit.data.sources.open import open_source
from microdit.errors import UserError
from tests.data.pictures import picture, records_of, write_file, write_tar


def fill(folder, count=40):
    for n in range(count):
        write_file(folder / f"{n:03}.jpg", picture(n))
        write_file(folder / f"{n:03}.txt", f"caption {n}".encode())
    return folder


def keys(*arguments):
    return [record.key for record in records_of(open_source(*arguments))]


def test_the_embedded_sets_open_by_name():
    assert open_source("emoji").name == "emoji"
    assert set(keys("emoji")).isdisjoint(keys("emoji:held_out"))
    assert keys("emoji:unnamed_held_out") == keys("emoji:held_out")
    assert {record.captions["caption"] for record in records_of(open_source("emoji:unnamed_held_out"))} == {"an emoji"}
    assert open_source("emoji:unnamed").name == "emoji:unnamed"
    assert len(keys("scenes:7")) == 7
    assert len(open_source("scenes").parts) == 4  # 2,000 scenes


def test_what_lies_at_a_path_is_found_out(tmp_path):
    files = [("0.jpg", picture()), ("0.txt", b"words"), ("1.jpg", picture()), ("1.txt", b"words")]
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / "tars" / name, files)
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table({"image": [picture()] * 3, "caption": ["words"] * 3}), tmp_path / "tables" / "t.parquet")
    datasets.Dataset.from_dict({"image": [picture()], "caption": ["words"]}).save_to_disk(tmp_path / "saved")
    fill(tmp_path / "plain", 2)
    assert keys(str(tmp_path / "plain")) == ["000.jpg", "001.jpg"]
    assert keys(str(tmp_path / "tars")) == ["0", "1", "0", "1"]
    assert keys(str(tmp_path / "tars" / "b.tar")) == ["0", "1"]
    assert keys(str(tmp_path / "tars" / "*.tar")) == ["0", "1", "0", "1"]
    assert keys(str(tmp_path / "tables")) == ["t.parquet/0", "t.parquet/1", "t.parquet/2"]
    assert keys(str(tmp_path / "tables" / "t.parquet")) == keys(str(tmp_path / "*" / "*.parquet")) == keys(str(tmp_path / "tables"))
    assert keys(str(tmp_path / "saved")) == ["saved/0"]
    with pytest.raises(UserError, match="neither archives only nor tables only"):
        open_source(str(tmp_path / "ta*" / "*"))
    write_file(tmp_path / "tars" / "loose.png", picture())
    with pytest.raises(UserError, match=r"holds images beside a.tar"):
        open_source(str(tmp_path / "tars"))


def test_the_datasets_library_is_asked_with_hf(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"image": [picture()], "caption": ["words"]}).to_parquet(tmp_path / "set" / "validation.parquet")
    assert keys(f"hf:{tmp_path / 'set'}:validation") == ["validation/0"]
    with pytest.raises(UserError, match=r"could not load .*, split train"):
        open_source(f"hf:{tmp_path / 'set'}")


def test_captions_and_their_weights_can_be_chosen(tmp_path):
    pq.write_table(pa.table({"image": [picture()], "text": ["a"], "alt": ["b"]}), tmp_path / "t.parquet")
    source = open_source(str(tmp_path), {"text": 0.7, "alt": 0.3})
    assert source.caption_weights == {"text": 0.7, "alt": 0.3}
    assert list(records_of(source)[0].captions.items()) == [("text", "a"), ("alt", "b")]  # in the order asked for
    for wrong in ({}, {"text": 0.0}, {"text": -1.0}, {"text": float("nan")}):
        with pytest.raises(UserError, match="weights above 0"):
            open_source(str(tmp_path), wrong)
    with pytest.raises(UserError, match="emoji has no caption named alt; it has caption"):
        open_source("emoji", {"alt": 1.0})


def test_the_folder_one_stands_in_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(fill(tmp_path / "mine", 1))
    assert open_source(".").name == "mine"


def test_parts_can_be_sent_to_other_processes(tmp_path):
    fill(tmp_path / "plain", 3)
    write_tar(tmp_path / "a.tar", [("0.jpg", picture()), ("0.txt", b"words")])
    pq.write_table(pa.table({"image": [picture()], "caption": ["words"]}), tmp_path / "t.parquet")
    datasets.Dataset.from_dict({"image": [picture()], "caption": ["words"]}).save_to_disk(tmp_path / "saved")
    for name in ("plain", "a.tar", "t.parquet", "saved"):
        for part in open_source(str(tmp_path / name), None, 0.999).parts:
            assert list(pickle.loads(pickle.dumps(part)).records()) == list(part.records())


@pytest.mark.parametrize(
    "name", ["emojis", "emoji:test", "scenes:0", "scenes:many", "cc12m", "nowhere:/data", "hf:", "no/such/place", "*.tar"]
)
def test_what_is_no_source_is_refused_with_the_kinds(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refusal:
        open_source(name)
    for word in (name, "emoji:held_out", "scenes", "cc12m, sa1b, textcaps, journeydb, diffusiondb, coco2014", ".parquet", "hf:NAME:SPLIT"):
        assert word in str(refusal.value)


def test_braces_name_many_files_and_missing_ones_are_named(tmp_path):
    for name in ("train/000.tar", "train/001.tar", "train/003.tar", "more/a.tar"):
        write_tar(tmp_path / name, [(f"{name.replace('/', '-')}.jpg".replace(".tar", ""), picture()), ("x.cls", b"1")])
    records = records_of(open_source(f"{tmp_path}/train/{{000..003}}.tar"))
    assert {record.key: record.problem for record in records} == {
        "train-000": "no caption",
        "train-001": "no caption",
        "002.tar#end": "no such file",
        "train-003": "no caption",
    }
    assert [part.name for part in open_source(f"{tmp_path}/{{train,more}}/*.tar").parts] == [
        *("train/000.tar", "train/001.tar", "train/003.tar", "more/a.tar"),
    ]
    assert [part.name for part in open_source(f"{tmp_path}/train/00{{0..1}}.tar").parts] == ["000.tar", "001.tar"]
    write_tar(tmp_path / "{0..9}.tar", [("0.jpg", picture()), ("0.txt", b"words")])  # a file may have such a name
    assert keys(f"{tmp_path}/{{0..9}}.tar") == ["0"]
    with pytest.raises(UserError, match="names more than 1,000,000 files"):
        open_source(f"{tmp_path}/{{0..99999999}}.tar")
    with pytest.raises(UserError, match="There is no file or folder"):
        open_source(f"{tmp_path}/{{none,neither}}/*.tar")
