from dataclasses import replace
from pathlib import Path

import pytest

from microdit.config.load import load_recipe, load_recipes
from microdit.errors import UserError
from microdit.planning.estimate import estimate
from microdit.planning.memory import HEADROOM, Layout, PhaseMemory, usable
from microdit.planning.workload import shapes_of
from tests.planning.test_workload_bill import PUBLISHED, machine


def load_of(path: Path, ranks: int, *overrides: str) -> PhaseMemory:
    recipe = load_recipe(path, list(overrides))
    return PhaseMemory(recipe, recipe.phases[0], shapes_of(recipe), ranks)


def sizes(load: PhaseMemory, card_gb: float, layout: Layout) -> list[int]:
    """By trying all: micro-batches that divide the share and fit."""
    fits = [size for size in range(1, load.share + 1) if load.share % size == 0]
    room = card_gb * 1e9 * (1 - HEADROOM)
    return [size for size in fits if load.footprint(size, replace(layout, accumulates=size < load.share)).total <= room]


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("card_gb", [16, 24, 40, 80])
@pytest.mark.parametrize("name", ["1-256-masked", "4-512-full"])
def test_the_way_is_the_largest_micro_batch_that_fits(name, card_gb, ranks):
    load = load_of(PUBLISHED / f"{name}.yaml", ranks)
    found = load.best_plan(card_gb)
    possible = {layout: sizes(load, card_gb, layout) for layout in load.layouts(card_gb)}
    if found is None:
        assert not any(possible.values())
        return
    assert found.micro_batch == max(possible[replace(found.layout, accumulates=True)])
    assert found.gigabytes == pytest.approx(load.footprint(found.micro_batch, found.layout).total / 1e9)
    kept = 64 if name == "1-256-masked" else 1024
    for layout, fitting in possible.items():  # all that are dearer, only where too few samples would be computed at a time otherwise
        if layout == replace(found.layout, accumulates=True):
            break
        assert max([0, *fitting]) * kept < 4096


def test_the_published_recipes_fit_their_card_and_one_of_24_gb():
    found = estimate(load_recipes(PUBLISHED, None), machine())
    assert all(phase.fits for phase in found.phases)
    assert all(phase.small is not None and phase.small_alone is not None for phase in found.phases)


@pytest.mark.parametrize("phase", ["1-256-masked", "2-256-full", "3-512-masked", "4-512-full"])
def test_what_is_advised_is_what_the_recipe_then_asks_for(phase):
    """The overrides that are printed, read back by the recipe and estimated as the trainer would do it."""
    plain = estimate(load_recipes(PUBLISHED / f"{phase}.yaml", None), machine(count=1, chip="rtx4090")).phases[0]
    assert not plain.fits
    overrides = plain.advice.overrides()
    assert "optimizer.moments=int8" in overrides
    (said,) = estimate(load_recipes(PUBLISHED / f"{phase}.yaml", overrides), machine(count=1, chip="rtx4090")).phases
    assert said.fits
    assert said.asked == plain.advice
    assert said.bill.hours == pytest.approx(plain.bill.hours * plain.advice.time)


def test_what_fits_no_card_is_refused_with_what_it_needs():
    """The weights, a copy of them and their moments alone are more than 10.8 GB."""
    twelve = machine(count=1, chip="v100")
    twelve = replace(twelve, chip=replace(twelve.chip, memory_gb=12))
    with pytest.raises(
        UserError, match=r"256-masked does not fit: one sample at a time, .* needs 12\.\d GB on each of 1 V100, and 10\.8 of its 12"
    ):
        estimate(load_recipes(PUBLISHED, None), twelve)
    assert usable(16) == pytest.approx(14.4e9)


def test_the_recipes_own_settings_are_taken_as_the_trainer_would():
    load = load_of(PUBLISHED / "1-256-masked.yaml", 8, "engine.micro_batch=null")
    way, parts = load.as_configured(load_recipe(PUBLISHED / "1-256-masked.yaml", ["engine.micro_batch=null"]), 80)
    assert (way.micro_batch, way.layout.sharding) == (256, "fsdp")  # its whole share; more than 500 M parameters
    assert way.gigabytes == parts.total / 1e9
    alone = load_recipe(PUBLISHED / "1-256-masked.yaml")
    assert load_of(PUBLISHED / "1-256-masked.yaml", 1).as_configured(alone, 80)[0].layout.sharding == "none"


def test_several_machines_shard_inside_of_each():
    asked = {}
    for gpus, setting in ((64, "auto"), (64, "fsdp"), (8, "auto")):
        recipe = load_recipe(PUBLISHED / "1-256-masked.yaml", [f"engine.sharding={setting}", "engine.micro_batch=32"])
        way, _ = load_of(PUBLISHED / "1-256-masked.yaml", gpus).as_configured(recipe, 80)
        asked[gpus, setting] = way
    assert [way.layout.sharding for way in asked.values()] == ["hybrid", "fsdp", "fsdp"]
    assert asked[64, "auto"].gigabytes > asked[64, "fsdp"].gigabytes
    with pytest.raises(UserError, match=r"engine\.sharding is hybrid, and 8 GPUs are not several machines of 8"):
        load_of(PUBLISHED / "1-256-masked.yaml", 8).as_configured(
            load_recipe(PUBLISHED / "1-256-masked.yaml", ["engine.sharding=hybrid"]), 80
        )


@pytest.mark.parametrize(("gpus", "divides"), [(16, True), (32, False)])
def test_a_micro_batch_larger_than_the_gpus_share_is_reported(gpus, divides):
    """128 in the recipe, of a batch of 2,048."""
    (phase,) = estimate(load_recipes(PUBLISHED / "1-256-masked.yaml", None), machine(count=gpus)).phases
    assert phase.divides is divides
    assert 2048 // gpus % phase.advice.micro_batch == 0
