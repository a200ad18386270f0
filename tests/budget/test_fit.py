from pathlib import Path

import pytest

from microdit.budget.fit import HEADROOM, Load, usable
from microdit.budget.reckoning import load_recipes, reckon
from microdit.budget.shapes import shapes_of
from microdit.errors import UserError
from microdit.recipe_file import load_recipe
from tests.budget.test_bill import PUBLISHED, machine


def load_of(path: Path, ranks: int, *overrides: str) -> Load:
    recipe = load_recipe(path, list(overrides))
    return Load(recipe, recipe.phases[0], shapes_of(recipe), ranks)


def sizes(load: Load, card_gb: float, sharding: str, checkpointing: bool) -> list[int]:
    """By trying all: micro-batches that divide the share and fit."""
    fits = lambda size: load.footprint(size, sharding, checkpointing).total <= card_gb * 1e9 * (1 - HEADROOM)  # noqa: E731
    return [size for size in range(1, load.share + 1) if load.share % size == 0 and fits(size)]


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("card_gb", [16, 24, 40, 80])
@pytest.mark.parametrize("name", ["1-256-masked", "4-512-full"])
def test_the_way_is_the_largest_micro_batch_that_fits(name, card_gb, ranks):
    load = load_of(PUBLISHED / f"{name}.yaml", ranks)
    found = load.best_way(card_gb)
    possible = {key: sizes(load, card_gb, *key) for key in [("ddp", False), ("fsdp", False), ("ddp", True), ("fsdp", True)]}
    if found is None:
        assert not any(possible.values())
        return
    assert found.micro_batch == max(possible[found.sharding, found.checkpointing])
    assert found.gigabytes == pytest.approx(load.footprint(found.micro_batch, found.sharding, found.checkpointing).total / 1e9)
    if found.checkpointing:  # only where too few samples would be computed at a time otherwise
        kept = 64 if name == "1-256-masked" else 1024
        assert max([0, *possible["ddp", False], *possible["fsdp", False]]) * kept < 4096


def test_the_published_recipes_fit_their_card_and_24_gb_only_when_shared():
    found = reckon(load_recipes(PUBLISHED, None), machine())
    assert all(phase.fits for phase in found.phases)
    assert all(phase.small is not None for phase in found.phases)
    assert [phase.small_alone is not None for phase in found.phases] == [True, True, False, False]  # an average more at 512 px


def test_what_fits_no_card_is_refused_with_what_it_needs():
    with pytest.raises(
        UserError, match=r"256-masked does not fit: one sample at a time, blocks recomputed, needs 19\.\d GB of each of 1 V100"
    ):
        reckon(load_recipes(PUBLISHED, None), machine(count=1, chip="v100"))
    assert usable(16) == pytest.approx(14.4e9)


def test_the_recipes_own_settings_are_taken_as_the_trainer_would():
    load = load_of(PUBLISHED / "1-256-masked.yaml", 8, "engine.micro_batch=null")
    way, parts = load.as_asked(load_recipe(PUBLISHED / "1-256-masked.yaml", ["engine.micro_batch=null"]).engine)
    assert (way.micro_batch, way.sharding) == (256, "fsdp")  # its whole share; more than 500 M parameters
    assert way.gigabytes == parts.total / 1e9
    alone = load_recipe(PUBLISHED / "1-256-masked.yaml")
    assert load_of(PUBLISHED / "1-256-masked.yaml", 1).as_asked(alone.engine)[0].sharding == "ddp"


@pytest.mark.parametrize(("gpus", "divides"), [(16, True), (32, False)])
def test_a_micro_batch_larger_than_a_gpus_share_is_said_to_be_refused_by_training(gpus, divides):
    """128 in the recipe, of a batch of 2,048."""
    (phase,) = reckon(load_recipes(PUBLISHED / "1-256-masked.yaml", None), machine(count=gpus)).phases
    assert phase.divides is divides
    assert 2048 // gpus % phase.advice.micro_batch == 0
