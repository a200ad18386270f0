"""Read JourneyDB and DiffusionDB from a few images in their real layouts."""

import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microdit.data.sources.open import open_source
from microdit.errors import UserError
from tests.data.pictures import picture, problems_of, records_of, write_file, write_json, write_tar


def journeydb_line(path, prompt="a prompt", caption="a caption"):
    return json.dumps({"img_path": path, "prompt": prompt, "Task1": {}, "Task2": {"Caption": caption}, "Task3": {}}) + "\n"


def test_journeydb_packed_and_unpacked(tmp_path):
    lines = [
        journeydb_line("./000/a.jpg", "prompt a", "caption a"),
        journeydb_line("./001/b.jpg", "prompt b", None),
        journeydb_line("./000/a.jpg", "prompt a again"),
        journeydb_line("./000/gone.jpg"),
        '{"img_path": "./000/',
        journeydb_line("./199/not_downloaded.jpg"),
        journeydb_line("./001/mute.jpg", ""),
    ]
    train = tmp_path / "train"
    write_file(train / "train_anno_realease_repath.jsonl", "".join(lines).encode())
    write_tar(train / "imgs" / "000.tgz", [("000/a.jpg", picture(0)), ("000/unlisted.jpg", picture(1))], "w:gz")
    for number, name in enumerate(("b", "mute")):
        write_file(train / "imgs" / "001" / f"{name}.jpg", picture(number))
    write_tar(train / "imgs" / "001.tgz", [("001/b.jpg", picture(0))], "w:gz")  # kept after it was unpacked
    records = records_of(open_source(f"journeydb:{tmp_path}"))
    offsets = [sum(len(line) for line in lines[:n]) for n in range(len(lines))]
    listing = "train_anno_realease_repath.jsonl"
    assert problems_of(records) == {
        f"{listing}#{offsets[2]}": "listed twice",
        "000/a": "",
        "000/unlisted": "no caption",
        "000/gone": "no such file",
        "001/b": "",
        "001/mute": "no caption",
        f"{listing}#{offsets[4]}": "metadata line is not JSON",
    }
    assert {record.key: record.captions for record in records if not record.problem} == {
        "000/a": {"prompt": "prompt a"},
        "001/b": {"prompt": "prompt b"},
    }
    both = records_of(open_source(f"journeydb:{tmp_path}", {"prompt": 0.5, "caption": 0.5}))
    assert [record.captions for record in both if not record.problem] == [
        {"prompt": "prompt a", "caption": "caption a"},
        {"prompt": "prompt b"},
        {"caption": "a caption"},  # of the picture without a prompt
    ]


def test_a_damaged_archive_of_journeydb_does_not_make_its_lines_wrong(tmp_path):
    names = [f"{n:03}" for n in range(60)]
    write_file(tmp_path / "train_anno_realease_repath.jsonl", "".join(journeydb_line(f"./000/{name}.jpg") for name in names).encode())
    tgz = write_tar(tmp_path / "imgs" / "000.tgz", [(f"000/{name}.jpg", picture(int(name))) for name in names], "w:gz")
    tgz.write_bytes(tgz.read_bytes()[:-400])
    *good, last = records_of(open_source(f"journeydb:{tmp_path}"))
    assert (last.key, last.problem) == ("000/000.tgz#end", "archive is damaged from here on")
    assert 0 < len(good) < 60
    assert not any(record.problem for record in good)


PROMPTS = {"a.png": "prompt a", "b.png": "prompt b", "bad.png": "c", "worse.png": "d", "gone.png": "e"}


def diffusiondb_prompts():
    return {name: {"p": prompt, "se": 1, "c": 7.0, "st": 50, "sa": "k_lms"} for name, prompt in PROMPTS.items()}


def write_scores(folder):
    scores = {"a.png": (0.2, 0.1), "b.png": (0.0, 0.0), "bad.png": (2.0, 0.0), "worse.png": (0.0, 0.21)}
    image_nsfw, prompt_nsfw = zip(*scores.values(), strict=True)
    columns = {"image_name": list(scores), "prompt": ["x"] * 4, "image_nsfw": image_nsfw, "prompt_nsfw": prompt_nsfw}
    pq.write_table(pa.table(columns), folder / "metadata.parquet")


@pytest.mark.parametrize("packed", [True, False])
def test_diffusiondb(tmp_path, packed):
    images = {name: picture(n, "PNG") for n, name in enumerate([*PROMPTS, "unlisted.png"]) if name != "gone.png"}
    part = tmp_path / "images" / "part-000001"
    if packed:
        part.parent.mkdir()
        with zipfile.ZipFile(part.with_suffix(".zip"), "w") as archive:
            for name, content in images.items():
                archive.writestr(name, content)
            archive.writestr("part-000001.json", json.dumps(diffusiondb_prompts()))
    else:
        write_json(part / "part-000001.json", diffusiondb_prompts())
        for name, content in images.items():
            write_file(part / name, content)
    expected = {"a": "", "b": "", "bad": "", "worse": "", "unlisted": "no caption", "gone": "no such file"}
    expected = {f"part-000001/{name}": problem for name, problem in expected.items()}
    records = records_of(open_source(f"diffusiondb:{tmp_path}"))
    assert problems_of(records) == expected
    assert all(record.captions["prompt"] == PROMPTS[f"{record.key.partition('/')[2]}.png"] for record in records if not record.problem)
    assert next(record.image for record in records if record.key == "part-000001/b") == images["b.png"]
    write_scores(tmp_path)
    records = records_of(open_source(f"diffusiondb:{tmp_path}"))
    assert problems_of(records) == expected | {"part-000001/bad": "marked unsafe", "part-000001/worse": "marked unsafe"}


def test_diffusiondb_with_broken_files(tmp_path):
    write_file(tmp_path / "part-000001.zip", b"not a zip")
    assert problems_of(records_of(open_source(f"diffusiondb:{tmp_path}"))) == {
        "part-000001/part-000001.zip#end": "archive is damaged from here on"
    }
    write_file(tmp_path / "metadata.parquet", b"not a table")
    with pytest.raises(UserError, match=r"metadata.parquet is damaged"):
        records_of(open_source(f"diffusiondb:{tmp_path}"))
