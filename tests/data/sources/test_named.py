"""Read each named data set from a few images in its real layout."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microdit.data.sources.named import NAMED, open_named
from microdit.data.sources.open import open_source
from microdit.errors import UserError
from tests.data.pictures import picture, problems_of, records_of, write_file, write_json, write_tar


@pytest.mark.parametrize("name", NAMED)
def test_a_folder_without_the_data_set_is_refused_with_its_source(tmp_path, name):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError) as refusal:
            open_source(f"{name}:{folder}")
        assert all(words in str(refusal.value) for words in (str(folder), name, NAMED[name].layout, NAMED[name].url))


def test_cc12m(tmp_path):
    for shard in range(2):
        files = []
        for n in range(2):
            key = f"{shard:05}{n:04}"
            fields = {"caption": f"caption {key}", "url": "http://x", "key": key, "status": "success", "recaption": "better"}
            files += [(f"{key}.jpg", picture(n)), (f"{key}.txt", fields["caption"].encode()), (f"{key}.json", json.dumps(fields).encode())]
        write_tar(tmp_path / f"{shard:05}.tar", files)
        pq.write_table(pa.table({"url": ["http://x"], "caption": ["x"]}), tmp_path / f"{shard:05}.parquet")
        write_json(tmp_path / f"{shard:05}_stats.json", {"count": 2})
    source = open_source(f"cc12m:{tmp_path}")
    records = records_of(source)
    assert [part.name for part in source.parts] == ["00000.tar", "00001.tar"]
    assert [record.key for record in records] == ["000000000", "000000001", "000010000", "000010001"]
    assert records[1].image == picture(1)
    assert all(record.captions == {"caption": f"caption {record.key}"} and not record.problem for record in records)
    assert records_of(open_source(f"cc12m:{tmp_path}", {"recaption": 1.0}))[0].captions == {"recaption": "better"}
    assert records_of(open_source(str(tmp_path))) == records  # the tables beside the tars hold no pictures


def test_sa1b(tmp_path):
    masks = json.dumps({"image": {}, "annotations": [{"segmentation": {"size": [1, 1], "counts": "x"}}]}).encode()
    files = [(f"./sa_{n}.{kind}", content) for n in (1, 2, 3) for kind, content in (("jpg", picture(n)), ("json", masks))]
    write_tar(tmp_path / "sa_000000.tar", files)
    write_file(tmp_path / "captions" / "sa_1.txt", b"A long caption.\n")
    write_file(tmp_path / "captions" / "sa_3.txt", b"f\xfcr")
    records = records_of(open_source(f"sa1b:{tmp_path}"))
    assert (records[0].captions, records[0].image) == ({"llava": "A long caption."}, picture(1))
    assert problems_of(records) == {"sa_1": "", "sa_2": "no caption", "sa_3": "caption is not UTF-8"}


def test_textcaps_as_its_authors_give_it(tmp_path):
    entries = [
        {"image_id": "aa", "caption_id": 1, "caption_str": "the first", "reference_strs": ["the first", "the second"]},
        {"image_id": "bb", "caption_id": 3, "caption_str": "another"},
        {"image_id": "aa", "caption_id": 2, "caption_str": "the second"},
        {"image_id": "gone", "caption_id": 4, "caption_str": "of nothing"},
        {"image_id": "mute", "caption_id": 5, "caption_str": ""},
    ]
    write_json(tmp_path / "TextCaps_0.1_train.json", {"dataset_type": "train", "data": entries})
    for name in ("aa", "bb", "mute", "picture_of_the_validation_set"):
        write_file(tmp_path / "train_images" / f"{name}.jpg", picture())
    records = records_of(open_source(f"textcaps:{tmp_path}"))
    assert [(record.key.removeprefix("train_images/"), record.captions, record.problem) for record in records] == [
        ("aa.jpg", {"caption": "the first"}, ""),
        ("bb.jpg", {"caption": "another"}, ""),
        ("gone.jpg", {"caption": "of nothing"}, "no such file"),
        ("mute.jpg", {}, "no caption"),
    ]
    write_file(tmp_path / "TextCaps_0.1_train.json", b'{"data": [{"image_id": "aa"}]}')
    with pytest.raises(UserError, match=r"not every entry of 'data' has image_id, caption_str"):
        open_source(f"textcaps:{tmp_path}")
    write_file(tmp_path / "TextCaps_0.1_train.json", b'{"data": [{"ima')
    with pytest.raises(UserError, match=r"TextCaps_0.1_train.json is damaged"):
        open_source(f"textcaps:{tmp_path}")


def test_textcaps_as_tables(tmp_path):
    for split in ("train", "test"):
        columns = {"image": [{"bytes": picture(1), "path": None}], "image_id": ["aa"], "reference_strs": [[f"{split} 1", f"{split} 2"]]}
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    [record] = records_of(open_source(f"textcaps:{tmp_path}"))
    assert (record.captions, record.image, record.problem) == ({"caption": "train 1"}, picture(1), "")


def test_coco2014(tmp_path):
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012}.jpg", "height": 8, "width": 12} for n in (42, 7, 9, 11)]
    annotations = [{"id": 30, "image_id": 42, "caption": "later"}, {"id": 4, "image_id": 42, "caption": "the first \n"}]
    annotations += [{"id": 5, "image_id": 7, "caption": "seven"}, {"id": 6, "image_id": 9, "caption": "nine"}]
    write_json(tmp_path / "annotations" / "captions_val2014.json", {"info": {}, "images": images, "annotations": annotations})
    for n in (42, 7, 11):
        write_file(tmp_path / "val2014" / f"COCO_val2014_{n:012}.jpg", picture(n))
    records = records_of(open_source(f"coco2014:{tmp_path}"))
    assert [(int(record.key[-6:-4]), record.captions, record.problem) for record in records] == [
        (42, {"caption": "the first"}, ""),
        (7, {"caption": "seven"}, ""),
        (9, {"caption": "nine"}, "no such file"),
        (11, {}, "no caption"),
    ]
    assert records[0].image == picture(42)


def test_blip3o60k(tmp_path):
    for name in ("dalle3", "journeyDB"):
        write_tar(tmp_path / f"{name}.tar", [("00000001.jpg", picture(1)), ("00000001.txt", f"of {name}".encode()), ("2.jpg", picture(2))])
    write_file(tmp_path / "README.md", b"# BLIP3o-60k")
    source = open_source(f"blip3o60k:{tmp_path}")
    records = records_of(source)
    assert [(record.key, record.captions, record.problem) for record in records] == [
        ("00000001", {"caption": "of dalle3"}, ""),
        ("2", {}, "no caption"),
        ("00000001", {"caption": "of journeyDB"}, ""),
        ("2", {}, "no caption"),
    ]
    assert records[0].image == picture(1)
    assert source.passed_over == {".md": 1}


def test_dalle3(tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(2):
        columns = {
            "caption": [f"caption {number}", None],
            "image": [{"bytes": picture(number), "path": None}] * 2,
            "link": ["http://x"] * 2,
            "image_hash": [f"{number}a", f"{number}b"],
        }
        pq.write_table(pa.table(columns), tmp_path / "data" / f"train-{number:05}-of-00002.parquet")
    records = records_of(open_source(f"dalle3:{tmp_path}"))
    assert [(record.captions, record.problem) for record in records] == [
        ({"caption": "caption 0"}, ""),
        ({}, "no caption"),
        ({"caption": "caption 1"}, ""),
        ({}, "no caption"),
    ]
    assert records[2].image == picture(1)


def test_sharegpt4o(tmp_path):
    entries = [{"input_prompt": f"prompt {n}", "output_image": f"image/{n}.png", "output_image_resolution": [12, 8]} for n in (7, 8, 10)]
    write_json(tmp_path / "text_to_image.json", entries)
    write_json(tmp_path / "text_and_image_to_image.json", [])
    for part, numbers in enumerate([(7, 8), (9,)]):
        write_tar(tmp_path / f"text_to_image_part_{part}.tar", [(f"image/{n}.png", picture(n, "PNG")) for n in numbers])
    write_tar(tmp_path / "text_and_image_to_image_part_0.tar", [("image/1.png", picture(1, "PNG"))])
    source = open_source(f"sharegpt4o:{tmp_path}")
    records = records_of(source)
    assert [(record.key, record.captions, record.problem) for record in records] == [
        ("image/7", {"prompt": "prompt 7"}, ""),
        ("image/8", {"prompt": "prompt 8"}, ""),
        ("image/9", {}, "no caption"),
    ]
    assert records[1].image == picture(8, "PNG")
    assert source.passed_over == {".json": 1, ".tar": 1}
    for broken in (b'[{"output_image": "image/7.png"}]', b'{"a": 1}', b"[7]", b'[{"out'):
        write_file(tmp_path / "text_to_image.json", broken)
        with pytest.raises(UserError, match=r"text_to_image.json is damaged, or has an entry without output_image and input_prompt"):
            open_source(f"sharegpt4o:{tmp_path}")


def test_captions_that_a_set_does_not_have_are_refused(tmp_path):
    with pytest.raises(UserError, match="sa1b has no caption named alt; it has llava"):
        open_named(NAMED["sa1b"], tmp_path, {"alt": 1.0})
    with pytest.raises(UserError, match="journeydb has no caption named alt; it has prompt, caption"):
        open_named(NAMED["journeydb"], tmp_path, {"alt": 1.0, "caption": 1.0})


def test_the_training_sets_leave_small_pictures_out_as_the_authors_do(tmp_path):
    write_tar(tmp_path / "00000.tar", [("a.jpg", picture(1)), ("a.txt", b"a")])
    assert open_source(f"cc12m:{tmp_path}").min_side == 256
