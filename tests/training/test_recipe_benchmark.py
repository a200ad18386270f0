"""A recipe timed on this machine by the trainer itself: what is measured, and what is only multiplied."""

from dataclasses import replace
from pathlib import Path

import pytest

from microdit.config.load import load_recipe
from microdit.distributed import start_world
from microdit.errors import UserError
from microdit.io.console import QUIET
from microdit.planning.bill import bill_of
from microdit.planning.timings import StepTime, conditions, keep_timings, read_timings, stretches
from microdit.planning.workload import Shapes, shapes_of
from microdit.training import recipe_benchmark
from microdit.training.recipe_benchmark import _more_steps, _Part, time_training, with_encoding_and_evaluation
from tests.training.processes import RECIPE

DRAWN = ["record.sample_prompts=[owl, cat, dog]", "record.sample_steps=4"]


@pytest.fixture(scope="module")
def world():
    return start_world("cpu")


@pytest.fixture(autouse=True)
def _moments(monkeypatch):
    monkeypatch.setattr(recipe_benchmark, "ENCODING_SECONDS", 0.3)
    monkeypatch.setattr(recipe_benchmark, "LOOKED_AT", 2)


@pytest.fixture
def seen(monkeypatch) -> list:
    """The recipes that are trained while a recipe is timed."""
    recipes, trainer = [], recipe_benchmark.Trainer

    def noted(recipe, *arguments):
        recipes.append(recipe)
        return trainer(recipe, *arguments)

    monkeypatch.setattr(recipe_benchmark, "Trainer", noted)
    return recipes


def timed(recipe, world, seconds=0.5):
    shapes = shapes_of(recipe)
    return with_encoding_and_evaluation(time_training(recipe, shapes, world, seconds), recipe, shapes, world)


def test_everything_that_a_recipe_does_is_timed_on_its_own_data(encoded_emoji, world, seen, tmp_path):
    held_out = [f"data.held_out={encoded_emoji}", "record.quality_every=10", "record.quality_samples=16"]
    recipe = load_recipe(RECIPE, [f"data.path={encoded_emoji}", *held_out, *DRAWN])
    found = timed(recipe, world)
    assert found.notes == ()
    assert [(step.phase, step.aligned, step.samples) for step in found.steps] == [(0, False, 8), (1, False, 6)]
    figures = [found.start, *(step.seconds for step in found.steps), found.checkpoint_copy, found.checkpoint_write]
    figures += [found.grid.first, found.grid.again, found.held_out.again, found.quality.again, found.memory_gb]
    figures += [found.picture, found.features, found.pictures_encoded_per_second]
    assert all(figure > 0 for figure in figures)
    short = seen[0]
    assert [recipe.engine, recipe.model, recipe.optimizer] == [short.engine, short.model, short.optimizer]
    assert [phase.mask_ratio for phase in short.phases] == [0.75, 0.75, 0, 0]  # a warm-up, and steps that are timed, of each
    assert [phase.batch_size for phase in short.phases] == [8, 8, 6, 6]
    where = conditions(recipe, shapes_of(recipe))
    keep_timings(found, where, tmp_path / "kept.json")
    assert read_timings(tmp_path / "kept.json", where) == found


def test_each_stretch_is_timed_for_its_part_of_the_seconds(encoded_emoji, world, seen, tmp_path):
    recipe = load_recipe(RECIPE, [f"data.path={encoded_emoji}", f"data.held_out={encoded_emoji}", *DRAWN])
    part = _Part(recipe, (8, 12), 1.0, 1.0, 1.0)
    rough = [StepTime(0, False, 0.01, 7.0, 8), StepTime(1, False, 0.04, 3.0, 6)]  # of the second, half a batch was timed: 0.02 s
    found = _more_steps(part, rough, tmp_path / "run", world, 0.2, QUIET)
    assert [phase.steps for phase in seen[0].phases] == [2, 10, 2, 5]
    assert [step.warm_up for step in found] == [7.0, 3.0]  # a cold one's, as before
    assert (seen[0].record.sample_prompts, seen[0].data.held_out) == ([], None)
    assert _more_steps(part, rough, tmp_path / "none", world, 0.01, QUIET) == rough  # no time for more
    assert len(seen) == 1


def test_random_numbers_take_the_place_of_data_that_is_not_encoded(world, seen):
    data = ["data={sets: {a: {path: nowhere}, b: {path: neither}}, resolution: 64, autoencoder: icon, text_encoder: minilm}"]
    recipe = load_recipe(RECIPE, [*data, *DRAWN, "phases.0.weights={a: 0.5, b: 0.5}"])
    found = timed(recipe, world, 0.1)
    assert found.notes == ("The data is not encoded yet: random numbers of the shapes that are assumed took its place.",)
    assert found.grid.again > 0
    assert not Path(seen[0].data.sets["a"].path).exists()  # nothing is left


def test_without_the_encoders_drawing_and_encoding_are_left_out_and_told(world):
    data = "data={path: nowhere, resolution: 32, autoencoder: ./no-such-folder, text_encoder: minilm}"
    recipe = load_recipe(RECIPE, [data, *DRAWN])
    found = timed(recipe, world, 0.1)
    assert (found.grid, found.picture, found.pictures_encoded_per_second) == (None, None, None)
    assert [note.partition(":")[0] for note in found.notes[1:]] == ["Drawing pictures was not timed", "Encoding was not timed"]
    assert "sample grids" not in [line.part for line in bill_of(recipe, found).lines]


def test_steps_with_and_without_alignment_are_timed_apart(aligned_emoji, world, seen):
    recipe = load_recipe(RECIPE, [f"data.path={aligned_emoji}", "alignment={encoder: efficientnet, block: 1, until: 0.25}"])
    found = timed(recipe, world, 0.1)
    assert [(step.phase, step.aligned) for step in found.steps] == [(item.phase, item.aligned) for item in stretches(recipe)]
    short = seen[0]
    assert [short.aligned_at(step) for step in range(short.total_steps)] == [True] * 4 + [False] * 8


def test_a_batch_that_is_too_large_for_a_moment_is_timed_in_part(encoded_emoji, world, seen, monkeypatch):
    monkeypatch.setattr(recipe_benchmark, "LONGEST_STEP", 1e-4)
    monkeypatch.setattr(recipe_benchmark, "LONGEST_GRID", 1e-3)
    recipe = load_recipe(RECIPE, [f"data.path={encoded_emoji}", "phases.0.batch_size=512", "engine.micro_batch=2", *DRAWN])
    found = timed(recipe, world, 0.1)
    samples = seen[0].phases[0].batch_size
    assert samples < 512
    assert found.steps[0].samples == samples
    assert found.steps[0].seconds > 512 / samples * 1e-4  # multiplied: no step of this network takes less than 0.1 ms
    assert found.notes[0].startswith(f"Steps were timed on {samples} of 512 samples (masked)")
    assert found.memory_gb is None
    assert (len(seen[0].record.sample_prompts), seen[0].record.sample_steps) < (3, 4)


def test_more_than_one_process_and_too_little_memory_are_one_sentence(world):
    recipe = load_recipe(RECIPE, ["data.path=nowhere"])
    with pytest.raises(UserError, match="without torchrun"):
        timed(recipe, replace(world, size=2))
    huge = load_recipe(RECIPE, ["data.path=nowhere", "model.dim=32768", "model.head_dim=64", "model.mixer_dim=32768"])
    shapes = shapes_of(huge)
    assert isinstance(shapes, Shapes)
    with pytest.raises(UserError, match="does not fit: one sample at a time"):
        time_training(huge, shapes, world, 0.1)
