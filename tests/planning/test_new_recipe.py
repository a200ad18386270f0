"""Recipes that `microdit new` writes."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from microdit.config.load import load_recipe
from microdit.data.sources.base import Part, Record, Source
from microdit.data.sources.subsets import HoldOut
from microdit.errors import UserError
from microdit.planning import new_recipe as module
from microdit.planning.new_recipe import Choices, new_recipe, recipe_file, survey
from tests.data.pictures import picture, write_file


def fill(folder: Path, count: int, side: int = 64, colour: str = "white") -> Path:
    for number in range(count):
        file = io.BytesIO()
        Image.new("RGB", (side, side + 8), colour).save(file, "PNG")
        write_file(folder / f"{number:03}.png", file.getvalue())
        write_file(folder / f"{number:03}.txt", f"caption {number}".encode())
    return folder


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    return fill(tmp_path_factory.mktemp("pictures") / "my drawings", 120)


def test_the_recipe_loads_and_shows_captions_of_the_set(drawings, tmp_path):
    found = new_recipe(str(drawings), Choices())
    (tmp_path / "mine.yaml").write_text(recipe_file(found, str(drawings)))
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe == found.recipe
    assert (recipe.name, recipe.data.path, recipe.data.held_out) == ("my-drawings", "data/my-drawings", "data/my-drawings-held-out")
    assert len(set(recipe.record.sample_prompts)) == 8
    assert all(prompt.startswith("caption ") for prompt in recipe.record.sample_prompts)
    assert found.encode == [str(drawings), "--out", "data/my-drawings", "--resolutions", "64", "--hold-out", "5%"]
    assert len(found.notes) == 1
    assert "With 120 pictures, expect the model to repeat them" in found.notes[0]


def test_what_the_user_chooses_is_taken_over(drawings):
    choices = Choices("data/x", "sdxl", "dfn-clip-h", 256, HoldOut.parse("7"))
    found = new_recipe(str(drawings), choices)
    assert found.encode[1:] == [
        *("--out", "data/x", "--resolutions", "256", "--autoencoder", "sdxl", "--text-encoder", "dfn-clip-h", "--hold-out", "7")
    ]
    assert (found.recipe.data.resolution, found.recipe.data.autoencoder, found.recipe.data.held_out) == (256, "sdxl", "data/x-held-out")
    assert "120 of 120 pictures have a side shorter than 256 px and will be rejected (the median is 64 px)" in found.notes[0]


@pytest.mark.parametrize(("record", "resolution"), [({"settings": {"image_size": 48}}, 48), ({"settings": None}, 256), (None, 256)])
def test_an_own_autoencoder_is_used_at_the_size_of_its_training(drawings, tmp_path, record, resolution):
    if record is not None:
        write_file(tmp_path / "autoencoder" / "record.json", json.dumps(record).encode())
    found = new_recipe(str(drawings), Choices(autoencoder=str(tmp_path / "autoencoder")))
    assert found.recipe.data.resolution == resolution


def test_an_encoded_set_needs_no_encoding_and_names_its_held_out_set(encoded_emoji):
    found = new_recipe(str(encoded_emoji), Choices())
    data = found.recipe.data
    assert found.encode is None
    assert (data.path, data.resolution, data.autoencoder, data.held_out) == (str(encoded_emoji), 16, "pixels", None)
    assert found.recipe.name == "emoji"
    assert len(found.recipe.record.sample_prompts) == 8


def test_few_pictures_are_not_held_out_and_small_ones_lower_the_size(tmp_path):
    found = new_recipe(str(fill(tmp_path / "few", 12, side=40)), Choices())
    assert found.recipe.data.held_out is None
    assert found.recipe.data.resolution == 32
    assert "--hold-out" not in found.encode


def test_photographs_are_told_from_drawings(tmp_path):
    found = new_recipe(str(fill(tmp_path / "photos", 12, colour="green")), Choices())
    assert any("Only 0% of the pictures are drawings on white" in note for note in found.notes)


def test_larger_collections_get_larger_models_and_fewer_epochs():
    names = ("emoji-fast", "emoji-long", "microdit-tiny/1-256-masked")
    data = module.DataRecipe("data/x")
    for images, name, seen in ((3_000, names[0], 57), (50_000, names[1], 40), (1_000_000, names[2], 20)):
        recipe = module._scaled("x", images, ["a"], data)
        assert recipe.model == load_recipe(name).model
        assert sum(phase.steps * phase.batch_size for phase in recipe.phases) / images == pytest.approx(seen, rel=0.01)
    smallest = module._scaled("x", 10, ["a"], data)
    assert smallest.total_steps == load_recipe("emoji-fast").total_steps


def test_the_number_of_records_beyond_those_counted_is_estimated(monkeypatch):
    monkeypatch.setattr(module, "COUNTED", 100)
    records = [Record(str(number), {"caption": f"c {number}"}, picture(number)) for number in range(60)]
    source = Source("many", [Part(str(number), lambda: iter(records)) for number in range(10)])
    found = survey(source)
    assert (found.images, found.is_estimate) == (600, True)
    assert len(found.captions) == module.SURVEYED
    assert survey(Source("few", source.parts[:1])).is_estimate is False


def test_a_recipe_from_the_demo_model_has_its_size_and_encoders(drawings, tmp_path):
    scratch = new_recipe(str(drawings), Choices()).recipe
    found = new_recipe(str(drawings), Choices(autoencoder="sdxl", init_from="demo"))
    (tmp_path / "mine.yaml").write_text(recipe_file(found, str(drawings)))
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe == found.recipe
    assert (recipe.init_from, recipe.data.autoencoder, recipe.data.resolution) == ("demo", "icon", 64)
    assert (recipe.model.dim, recipe.model.depth, recipe.diffusion.P_mean) == (128, 4, 0.8)
    assert recipe.total_steps == round(scratch.total_steps / 4)
    assert recipe.phases[0].learning_rate == pytest.approx(0.3 * scratch.phases[0].learning_rate)
    with pytest.raises(UserError, match="nowhere is neither a run nor an exported or imported model"):
        new_recipe(str(drawings), Choices(init_from="nowhere"))


def test_what_cannot_be_trained_on_is_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no images"):
        new_recipe(str(tmp_path / "empty"), Choices())
    write_file(tmp_path / "bare" / "a.png", picture(0, "PNG"))
    with pytest.raises(UserError, match=r"None of the pictures looked at in bare can be used: 1 x no caption. A caption is a .txt file"):
        new_recipe(str(tmp_path / "bare"), Choices())
    with pytest.raises(UserError, match="There is no file or folder"):
        new_recipe(str(tmp_path / "nowhere"), Choices())
    write_file(tmp_path / "run" / "recipe.yaml", b"name: x")
    with pytest.raises(UserError, match="is a run or a recipe, not pictures"):
        new_recipe(str(tmp_path / "run"), Choices())
