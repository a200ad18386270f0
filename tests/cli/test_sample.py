"""The commands sample and grid, as a person would run them."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from microdit.checkpoint import checkpoint_folders, open_checkpoint
from microdit.pipelines.settings import SamplerSettings
from tests.commands import microdit


def test_sample_takes_all_settings_and_records_them_in_the_file(workplace):
    options = ["--solver", "dpm", "--steps", 4, "--guidance", 3, "--guidance-rescale", 0.5, "--seed", 9]
    options += ["--guidance-interval", 0.2, 5, "--noise-range", 0.01, 60]
    shown = ["--negative", "blue", "--trajectory", "way.gif", "--out", "all.png"]
    done = microdit("sample", "runs/tiny", "red heart", "кот\n", "[/b] owl " + "owl " * 50, *options, *shown, cwd=workplace)
    assert done.returncode == 0, done.output
    assert "seed 9" in done.output
    assert 'The prompt "[/b] owl owl owl' in " ".join(done.output.split())
    assert "is cut: the text encoder minilm reads 32 tokens" in " ".join(done.output.split())
    about = Image.open(workplace / "all.png").info
    assert about["prompt"].split("\n")[:2] == ["red heart", "кот"]
    assert (about["negative_prompt"], about["seed"]) == ("blue", "9")
    written = json.loads(about["settings"])
    written = {name: tuple(value) if isinstance(value, list) else value for name, value in written.items()}
    expected = SamplerSettings(4, 3.0, "dpm", guidance_interval=(0.2, 5.0), guidance_rescale=0.5, noise_range=(0.01, 60.0))
    assert SamplerSettings(**written) == expected
    newest = open_checkpoint(checkpoint_folders(workplace / "runs" / "tiny")[0])
    assert about["model_sha256"] == newest.state["files"]["ema.safetensors"]
    assert Image.open(workplace / "way.gif").n_frames == 4


def test_sample_is_guided_by_another_checkpoint_and_writes_a_strip(workplace):
    strip = ["--trajectory", "way.png", "--steps", 12, "--out", "auto.png"]
    done = microdit("sample", "runs/tiny", "owl", "--autoguide", "runs/tiny", "--autoguide-weights", "model", *strip, cwd=workplace)
    assert done.returncode == 0, done.output
    assert json.loads(Image.open(workplace / "auto.png").info["settings"])["guidance"] == "autoguidance"
    assert Image.open(workplace / "way.png").width > 10 * 128  # ten of the twelve steps


def test_sample_says_where_and_in_what_numbers_it_draws(workplace):
    for dtype in ("float32", "bfloat16"):
        options = ["--device", "cpu", "--dtype", dtype, "--batch-size", 1, "--steps", 3, "--out", f"{dtype}.png"]
        done = microdit("sample", "runs/tiny", "owl", "cat", *options, cwd=workplace)
        assert done.returncode == 0, done.output
        assert re.search(rf"on CPU, \d+ threads, {dtype} ", done.output)
    exact, rounded = (np.asarray(Image.open(workplace / f"{name}.png").convert("RGB"), dtype=int) for name in ("float32", "bfloat16"))
    assert 0 < np.abs(exact - rounded).mean() < 5


def test_several_pictures_of_a_prompt_are_files_of_their_own(workplace):
    options = ["-n", 2, "--steps", 2, "--seed", 5]
    done = microdit("sample", "runs/tiny", "owl", "cat", *options, "--out", "drawn", cwd=workplace)
    assert done.returncode == 0, done.output
    assert "4 pictures of tiny, step 6, seed 5, in drawn" in done.output
    pictures = [Image.open(path) for path in sorted((workplace / "drawn").iterdir())]
    assert [(picture.info["prompt"], picture.info["seed"]) for picture in pictures] == [
        ("owl", "5"),
        ("owl", "6"),
        ("cat", "7"),
        ("cat", "8"),
    ]
    assert {picture.size for picture in pictures} == {(64, 64)}
    assert len({picture.tobytes() for picture in pictures}) == 4
    alone = microdit("sample", "runs/tiny", "cat", "--steps", 2, "--seed", 8, "--out", "alone", cwd=workplace)
    assert alone.returncode == 0, alone.output
    difference = np.asarray(Image.open(workplace / "alone" / "0000.png"), dtype=int) - np.asarray(pictures[3], dtype=int)
    assert np.abs(difference).max() <= 1  # whatever the other pictures of its batch


def test_a_jpeg_is_written_and_says_how_it_was_made(workplace):
    done = microdit("sample", "runs/tiny", "owl", "--steps", 2, "--out", "new/owl.JPG", cwd=workplace)
    assert done.returncode == 0, done.output
    picture = Image.open(workplace / "new" / "owl.JPG")
    assert picture.format == "JPEG"
    assert picture.quantization[0][0] <= 3  # quality 95
    assert json.loads(picture.info["comment"])["prompt"] == "owl"


def test_grid_draws_a_labelled_sheet_from_one_seed(workplace):
    done = microdit("grid", "runs/tiny", "owl", "--sweep", "guidance=1,4,8", "--sweep", "steps=2,3", "--out", "sheet.png", cwd=workplace)
    assert done.returncode == 0, done.output
    assert "6 pictures of tiny, step 6, seed 0" in done.output
    sheet = Image.open(workplace / "sheet.png")
    assert sheet.width > sheet.height > 2 * 128
    assert sheet.info["sweep"] == "guidance=1,4,8; steps=2,3"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sample", "runs/tiny", "x", "--solver", "rk4"], "There is no solver 'rk4'. Known: heun, dpm, euler."),
        (["sample", "runs/tiny", "x", "--guidance-kind", "path-drop"], "use a model trained with model.routing sprint"),
        (["sample", "runs/tiny", "x", "--guidance-kind", "path-drop", "--autoguide", "runs/tiny"], "leave one of the two out"),
        (["sample", "runs/tiny", "x", "--autoguide-weights", "ema"], "name its run with --autoguide"),
        (["sample", "runs/tiny", "x", "--trajectory", "way.mp4"], "must end in .png for a filmstrip, or in .gif"),
        (
            ["sample", "runs/tiny", "x", "--out", "x.bmp"],
            "--out x.bmp must end in .png, or in .jpg for a JPEG, or name a folder, without a",
        ),
        (
            ["sample", "runs/tiny", "x", "--out", "runs/tiny/recipe.yaml/x.png"],
            "recipe.yaml/x.png cannot be written (File exists): choose another place",
        ),
        (["sample", "runs/tiny", "x", "--trajectory", "/proc/way.png"], "--trajectory /proc/way.png cannot be written"),
        (["grid", "runs/tiny", "x", "--sweep", "steps=2", "--out", "runs"], "--out runs must end in .png, or in .jpg for a JPEG."),
        (["sample", "runs/tiny", "x", "--device", "gpu"], "There is no device 'gpu'. Known: auto, cpu, cuda, cuda:N"),
        (["sample", "runs/tiny", "x", "--device", "mps"], "PyTorch sees no Apple GPU here: take auto, or cpu."),
        (["sample", "runs/tiny", "x", "--device", "cpu", "--dtype", "float16"], "float16 is slow and narrow on a CPU"),
        (["grid", "runs/tiny", "x", "--sweep", "steps=2", "--dtype", "fp16"], "There is no dtype 'fp16'. Known: auto, float32"),
        (["grid", "runs/tiny", "x", "--sweep", "steps=1,2"], "from 2 to 1000 steps, not 1"),
    ],
)
def test_mistakes_about_pictures_end_in_one_sentence(workplace, arguments, sentence):
    done = microdit(*arguments, cwd=workplace)
    assert done.returncode == 1
    assert sentence in " ".join(done.output.split())
    assert "Traceback" not in done.output
