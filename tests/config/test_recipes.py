"""The recipes that come with microdit, found by name from any folder."""

import doctest
from pathlib import Path

import pytest

from microdit.config import load, recipes
from microdit.config.load import load_recipe, load_recipes
from microdit.config.recipes import RECIPES, find_recipe, list_recipes
from microdit.errors import UserError
from microdit.lab.study import load_study
from tests.commands import microdit


@pytest.mark.parametrize("name", ["emoji-fast", "emoji-fast.yaml", "recipes/emoji-fast", "recipes/emoji-fast.yaml"])
def test_a_bundled_recipe_is_found_by_any_form_of_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == RECIPES / "emoji-fast.yaml"
    assert load_recipe(Path(name)).name == "emoji-fast"


@pytest.mark.parametrize("name", ["microdit-dry", "recipes/microdit-dry", "recipes/microdit-dry/"])
def test_a_folder_of_phases_is_found_by_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert list(load_recipes(Path(name), None)) == ["1-32-masked", "2-32-full", "3-64-masked", "4-64-full"]


@pytest.mark.parametrize("name", ["masking", "lab/masking", "recipes/lab/masking.yaml"])
def test_a_study_is_found_with_the_recipe_that_it_starts_from(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert load_study(Path(name))[0].name == "masking"


def test_an_own_file_takes_precedence_over_a_bundled_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()  # of pictures, say
    assert find_recipe("emoji") == RECIPES / "emoji.yaml"
    (tmp_path / "emoji" / "mine.yaml").write_text("name: mine")
    assert find_recipe("emoji") == Path("emoji")
    (tmp_path / "emoji-fast").write_text("name: mine")
    assert find_recipe("emoji-fast") == Path("emoji-fast")


@pytest.mark.parametrize("name", ["nothing", "../recipes/emoji", "recipes", "/emoji", "recipes/../../demo_model"])
def test_a_name_without_a_recipe_is_a_sentence(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"There is no recipe at .*'microdit recipes' lists those that do"):
        find_recipe(name)


def test_a_folder_where_one_recipe_is_needed_is_a_sentence():
    with pytest.raises(UserError, match=r"is a folder: name one of its recipes, such as .*1-32-masked\.yaml"):
        load_recipe("microdit-dry")


def test_every_recipe_has_a_line_that_says_what_it_is():
    for folder in ("", "lab"):
        summaries = list_recipes(folder)
        assert all(len(line) > 20 and not line.startswith("name:") for line in summaries.values()), summaries
    assert "microdit-xl" in list_recipes()
    assert "lab" not in list_recipes()


def test_the_examples_in_the_docstrings_run():
    for module in (recipes, load):
        results = doctest.testmod(module)
        assert results.attempted
        assert not results.failed


def test_the_command_lists_prints_and_copies(tmp_path):
    listed = microdit("recipes", cwd=tmp_path)
    assert listed.returncode == 0, listed.output
    assert "emoji-fast" in listed.output
    assert "lab/masking" in listed.output
    printed = microdit("recipes", "emoji-fast", cwd=tmp_path)
    assert " ".join((RECIPES / "emoji-fast.yaml").read_text().split()) in printed.output
    copied = microdit("recipes", "emoji-fast", "--copy", "my.yaml", cwd=tmp_path)
    assert "microdit train my.yaml" in copied.output
    assert (tmp_path / "my.yaml").read_bytes() == (RECIPES / "emoji-fast.yaml").read_bytes()
    again = microdit("recipes", "emoji-long", "--copy", "my.yaml", cwd=tmp_path)
    assert again.returncode == 1
    assert "my.yaml exists already" in again.output


def test_copying_a_study_copies_its_base_and_a_folder_all_of_its_phases(tmp_path):
    assert microdit("recipes", "lab/masking", "--copy", "mine/study.yaml", cwd=tmp_path).returncode == 0
    assert load_study(tmp_path / "mine" / "study.yaml")[0].base == "base-unnamed.yaml"
    assert microdit("recipes", "microdit-dry", "--copy", "dry", cwd=tmp_path).returncode == 0
    assert len(load_recipes(tmp_path / "dry", None)) == 4


def test_training_a_bundled_recipe_goes_as_far_as_its_data(tmp_path):
    trained = microdit("train", "emoji-fast", cwd=tmp_path)
    assert trained.returncode == 1
    assert "data/emoji" in trained.output
    assert "Traceback" not in trained.output
