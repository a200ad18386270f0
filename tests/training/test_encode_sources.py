"""A source in place of an encoded set: encoded into the cache when training begins, the same as by `microdit data encode`."""

import json
from pathlib import Path

import pytest
from PIL import Image

from microdit.config.load import load_recipe
from microdit.distributed import start_world
from microdit.errors import UserError
from microdit.io.console import QUIET
from microdit.training.encode_sources import with_encoded_sources
from tests.commands import microdit
from tests.training.processes import RECIPE, losses, start

SHORT = ["phases.0.steps=2", "phases.1.steps=1", "record.samples_every=100", "data.resolution=16", "data.autoencoder=pixels"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".logs" / "cache"))  # that of the commands
    for number in range(12):
        path = tmp_path / "pictures" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 24), (20 * number, 255 - 20 * number, 60)).save(path)
        path.with_suffix(".txt").write_text(f"picture {number}")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "pictures" / "broken.txt").write_text("broken")
    recipe = RECIPE.read_text().replace("data: {path: set-by-the-test}", "data: {sets: {mine: {source: pictures}}}")
    (tmp_path / "recipe.yaml").write_text(recipe)
    return tmp_path


def cached(place: Path) -> list[Path]:
    return sorted((place / ".logs" / "cache" / "microdit" / "encoded").glob("[0-9a-f]*"))


def train(place: Path, run: str, *more: str, ranks: int = 1):
    running = start(place / ".logs", ["train", "recipe.yaml", "--out", run, *SHORT, *more], ranks, cwd=place)
    assert running.wait() == [0] * ranks, running.output
    return running.output


def test_records_order_and_checksums_are_those_of_encoding_first(place):
    output = train(place, "runs/a")
    assert "12 of 13 records of pictures kept in" in output
    assert "1 rejected" in output
    done = microdit("data", "encode", "pictures", "--out", "set", "--resolutions", 16, "--autoencoder", "pixels", cwd=place)
    assert done.returncode == 0, done.output
    (folder,) = cached(place)
    shards = [json.loads((path / "card.json").read_text())["shards"] for path in (folder, place / "set")]
    assert shards[0] == shards[1]
    train(place, "runs/b", "data.sets={mine: {path: set}}")
    assert losses(place / "runs/a") == losses(place / "runs/b")


def test_it_is_encoded_once_and_again_when_the_source_changes(place):
    train(place, "runs/a")
    before = {path: path.stat().st_mtime_ns for path in cached(place)[0].iterdir()}
    assert "kept in" not in train(place, "runs/b")
    assert {path: path.stat().st_mtime_ns for path in cached(place)[0].iterdir()} == before
    assert "finished" in train(place, "runs/a", "--resume")
    (place / "pictures" / "11.txt").write_text("another caption, of another length")
    assert "12 of 13 records" in train(place, "runs/c")
    assert len(cached(place)) == 2


def test_two_processes_use_one_encoding(place):
    train(place, "runs/one")
    train(place, "runs/two", ranks=2)
    assert len(cached(place)) == 1
    assert losses(place / "runs/two") == pytest.approx(losses(place / "runs/one"), abs=2e-5)


def test_the_run_names_the_encoded_set_and_can_be_evaluated_and_drawn_from(place):
    train(place, "runs/a")
    recorded = load_recipe(place / "runs" / "a" / "recipe.yaml")
    assert recorded.data.sets["mine"].folder == cached(place)[0]
    drawn = microdit("sample", "runs/a", "picture 3", "--steps", 2, "--out", "x.png", cwd=place)
    assert drawn.returncode == 0, drawn.output


@pytest.mark.parametrize("mine", ["{}", "{path: a, source: b}"])
def test_a_set_has_either_a_path_or_a_source(place, mine):
    with pytest.raises(UserError, match=r"data\.sets\.mine needs either a path or a source, such as my-pictures"):
        load_recipe(place / "recipe.yaml", [f"data.sets={{mine: {mine}}}"])


def test_a_source_that_cannot_be_encoded_is_a_sentence(place):
    recipe = load_recipe(place / "recipe.yaml", ["data.sets={mine: {source: nowhere/at/all}}"])
    with pytest.raises(UserError, match="nowhere/at/all"):
        with_encoded_sources(recipe, start_world("cpu"), QUIET)
    with pytest.raises(UserError, match=r"The source pictures of data\.sets is encoded by 'microdit train' only"):
        load_recipe(place / "recipe.yaml").data.sets["mine"].folder  # noqa: B018
