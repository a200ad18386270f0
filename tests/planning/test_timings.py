"""Measurements of recipes: kept, found again, and refused when they are damaged, foreign, or of a recipe that costs something else."""

import json
from dataclasses import replace

import pytest

from microdit.config.load import load_recipe
from microdit.errors import UserError
from microdit.io.files import to_checked_json
from microdit.planning.timings import (
    Repeated,
    StepTime,
    Stretch,
    Timings,
    conditions,
    find_timings,
    keep_timings,
    read_timings,
    stretches,
    timings_file,
)
from microdit.planning.workload import assumed_shapes
from tests.training.processes import RECIPE

TIMINGS = Timings(
    date="2026-11-27 20:00",
    recipe="tiny",
    start=2.0,
    steps=(StepTime(0, False, 0.5, 1.0, 8), StepTime(1, False, 0.25, 0.5, 6)),
    checkpoint_copy=0.125,
    checkpoint_write=3.0,
    grid=Repeated(5.0, 1.0),
    held_out=Repeated(0.75, 0.5),
    quality=None,
    picture=0.25,
    features=0.0625,
    pictures_encoded_per_second=20.0,
    memory_gb=1.5,
    notes=("A note.",),
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def recipe_of(*overrides: str):
    return load_recipe(RECIPE, ["data.path=nowhere", *overrides])


def kept(*overrides: str):
    recipe = recipe_of(*overrides)
    where = conditions(recipe, assumed_shapes(recipe))
    keep_timings(TIMINGS, where, timings_file(where))
    return recipe, timings_file(where), where


def found(recipe):
    shapes = assumed_shapes(recipe)
    return find_timings(recipe, shapes, shapes)


def test_what_was_kept_is_found_again():
    recipe, _, _ = kept()
    assert found(recipe) == TIMINGS


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "seed=7",
        "phases.0.steps=1000",
        "phases.0.name=other",
        "phases.1.learning_rate=1e-2",
        "ema.0.decay=0.5",
        "record.checkpoint_every=7",
        "record.samples_every=7",
        "diffusion.sigma_data=0.7",
        "guard.loss_jump=3",
        "engine.device=cpu",
        "data.path=elsewhere",
    ],
)
def test_what_costs_nothing_may_change(override):
    kept()
    assert found(recipe_of(override)) == TIMINGS


@pytest.mark.parametrize(
    "override",
    [
        "model.dim=64",
        "phases.0.batch_size=16",
        "phases.0.mask_ratio=0.5",
        "phases.1.mask_schedule=[[0, 0.75], [1, 0]]",
        "ema=[]",
        "optimizer.method=muon",
        "engine.micro_batch=2",
        "engine.precision=bfloat16",
        "engine.activation_checkpointing=true",
        "data.resolution=512",
        "data.text_encoder=minilm",
        "data.held_out=somewhere",
        "record.metrics_every=9",
        "record.sample_prompts=[owl]",
        "record.quality_every=10",
        "alignment={encoder: efficientnet, block: 1}",
    ],
)
def test_a_recipe_that_changed_in_a_way_that_matters_has_no_measurement(override):
    kept()
    assert found(recipe_of(override)) is None


def test_other_processes_and_other_captions_have_no_measurement():
    recipe, _, _ = kept()
    shapes = assumed_shapes(recipe)
    longer = replace(shapes, caption_tokens=shapes.caption_tokens + 1)
    assert find_timings(recipe, shapes, shapes, processes=2) is None
    assert find_timings(recipe, longer, longer) is None
    assert find_timings(recipe, longer, shapes) == TIMINGS  # measured before the data was encoded


def test_a_recipe_for_a_device_that_is_not_here_has_no_measurement():
    assert found(recipe_of("engine.device=cuda:99")) is None


def changed(content: dict, path: str, value: object) -> dict:
    *outer, last = path.split(".")
    item = content
    for key in outer:
        item = item[int(key)] if isinstance(item, list) else item[key]
    item[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("conditions.machine", "another one", "made on another machine or for another recipe"),
        ("conditions.recipe.model.dim", 64, "made on another machine or for another recipe"),
        ("timings.start", -1.0, "-1.0 is no time"),
        ("timings.start", True, "True is no time"),
        ("timings.steps.0.seconds", "fast", "fast is no time"),
        ("timings.steps", [], "steps of other phases"),
        ("timings.grid", 3, "cannot be used"),
        ("timings.more", 3, "other keys"),
        ("timings", None, "cannot be used"),
        ("format", 2, "its format is 2"),
    ],
)
def test_a_file_of_others_is_one_sentence_although_its_checksum_is_right(path, value, sentence):
    recipe, file, _ = kept()
    content = changed(json.loads(file.read_text()), path, value)
    del content["checked_by"], content["self_sha256"]
    file.write_bytes(to_checked_json(content))
    with pytest.raises(UserError, match="Delete it, and measure again: microdit bench --recipe") as error:
        found(recipe)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["edited", "cut", "without a checksum", "not JSON", "a number"])
def test_a_damaged_file_is_refused(damage):
    recipe, file, where = kept()
    raw = file.read_bytes()
    bare = json.loads(raw)
    del bare["checked_by"], bare["self_sha256"]
    file.write_bytes(
        {
            "edited": raw.replace(b'"start": 2.0', b'"start": 1.0'),
            "cut": raw[: len(raw) // 2],
            "without a checksum": json.dumps(bare).encode(),
            "not JSON": b"\xff\x00{",
            "a number": b"7",
        }[damage]
    )
    assert file.read_bytes() != raw
    with pytest.raises(UserError, match="cannot be used"):
        found(recipe)
    with pytest.raises(UserError, match="cannot be used"):
        read_timings(file, where)


def test_a_phase_in_which_the_alignment_ends_is_two_stretches():
    recipe = recipe_of("alignment={encoder: efficientnet, block: 1, until: 0.25}")  # 10 of 40 steps
    assert stretches(recipe) == [Stretch(0, True, 10), Stretch(0, False, 15), Stretch(1, False, 15)]
    assert stretches(recipe_of()) == [Stretch(0, False, 25), Stretch(1, False, 15)]
