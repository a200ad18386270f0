"""The bill of the published run, against what is known of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from microdit.config.load import load_recipe, load_recipes
from microdit.config.recipes import RECIPES
from microdit.errors import UserError
from microdit.models.routing import kept_tokens
from microdit.planning.estimate import estimate
from microdit.planning.hardware import Machine, Price, named_chip
from microdit.planning.workload import KnownShapes, config_of, phase_costs, shapes_of
from tests.models.test_flops import counted, one_hot_flops

PUBLISHED = RECIPES / "microdit-xl"


def machine(count: int = 8, price: float = 2.5, utilisation: float = 0.45, chip: str = "h100") -> Machine:
    return Machine(named_chip(chip), count, Price(price, "the test"), utilisation, "the test")


@pytest.fixture(scope="module")
def published():
    return estimate(load_recipes(PUBLISHED, None), machine())


@pytest.mark.parametrize("count", [{2}, pytest.param({0, 1, 2, 3}, marks=pytest.mark.slow)], ids=["third", "all"])
def test_phase_flops_match_the_formula_and_the_authors_code(published, count):
    """`count`: the phases that PyTorch counts here. At 256 pixels it counts this model in `test_flops.py` as well."""
    recipes = load_recipes(PUBLISHED, None).values()
    for number, (recipe, phase, authors) in enumerate(zip(recipes, published.phases, (285, 731, 1122, 3265), strict=True)):
        config = config_of(recipe, shapes_of(recipe))
        side = phase.bill.resolution // 8
        tokens = (side // 2) ** 2
        kept = kept_tokens(tokens, recipe.phases[0].mask_ratio)
        ours = phase.bill.flops_per_sample
        if number in count:
            assert ours == counted(config, side, kept if kept < tokens else None, 77)[1]
        assert (ours + one_hot_flops(config, tokens, kept)) / 1e9 == pytest.approx(authors, rel=0.01)


def test_the_published_days_are_19_percent_of_eight_chips(published):
    """2.6 days on 8 x H100 (2407.15811), with what the authors' code computes."""
    recipes = list(load_recipes(PUBLISHED, None).values())
    flops = sum(
        phase.bill.flops + phase.bill.images * one_hot_flops(config_of(recipe, shapes_of(recipe)), tokens, kept_tokens(tokens, ratio))
        for recipe, phase in zip(recipes, published.phases, strict=True)
        for tokens, ratio in [((phase.bill.resolution // 16) ** 2, recipe.phases[0].mask_ratio)]
    )
    assert flops == pytest.approx(339e18, rel=0.005)
    assert machine(utilisation=0.19).hours(flops) / 24 == pytest.approx(2.6, rel=0.02)


def test_totals_are_sums_and_money_is_hours_times_gpus_times_price(published):
    assert published.images == 2048 * 335_000
    assert published.dollars == pytest.approx(published.hours * 8 * 2.5)
    assert published.flops == pytest.approx(published.hours * 3600 * 8 * 989.4e12 * 0.45)
    assert published.hours == pytest.approx(sum(phase.bill.hours for phase in published.phases))
    assert published.parameters == 1_165_442_320


def test_recomputation_costs_time_and_no_method_flops():
    plain = load_recipe(PUBLISHED / "1-256-masked.yaml")
    again = replace(plain, engine=replace(plain.engine, activation_checkpointing=True))
    (a,), (b,) = (phase_costs(recipe, shapes_of(recipe), machine()) for recipe in (plain, again))
    assert a.flops == b.flops
    assert b.hours == pytest.approx(4 / 3 * a.hours, rel=0.03)  # all but the little that is not in blocks


def test_a_falling_mask_costs_between_its_ends():
    recipe = load_recipe(PUBLISHED / "1-256-masked.yaml")
    masked, full, falling = (
        phase_costs(load_recipe(PUBLISHED / "1-256-masked.yaml", overrides), shapes_of(recipe), machine())[0].flops_per_sample
        for overrides in ([], ["phases.0.mask_ratio=0"], ["phases.0.mask_ratio=0", "phases.0.mask_schedule=[[0, 0.75], [1, 0]]"])
    )
    assert masked < falling < full


@pytest.mark.parametrize("path", sorted(path for path in RECIPES.iterdir() if path.name != "lab"), ids=lambda path: path.name)
def test_every_recipe_of_ours_has_a_bill(path):
    found = estimate(load_recipes(path, None), machine(count=1))
    assert found.dollars > 0
    assert all(phase.advice is not None for phase in found.phases)


@pytest.mark.parametrize("name", ["emoji", "emoji-fast", "emoji-long"])
def test_emoji_recipes_cost_the_same_with_and_without_data(name, monkeypatch, tmp_path):
    """Their sets' captions have up to 14 tokens; MiniLM's are taken to have 16 before they are encoded."""
    monkeypatch.chdir(tmp_path)
    recorded = json.loads((Path(__file__).parents[2] / "docs" / "results" / f"{name}.json").read_text())[0]["flops"]
    recipes = load_recipes(RECIPES / f"{name}.yaml", None)
    assert estimate(recipes, machine(count=1), KnownShapes(caption_tokens=14)).flops == recorded
    assert recorded < estimate(recipes, machine(count=1)).flops < 1.05 * recorded


def test_the_dry_run_is_billed_for_the_latents_of_its_encoder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shapes = [shapes_of(recipe) for recipe in load_recipes(RECIPES / "microdit-dry", None).values()]
    assert [item.sides for item in shapes] == [((1.0, side, side),) for side in (4, 4, 8, 8)]
    assert {(item.latent_channels, item.caption_channels) for item in shapes} == {(8, 384)}


def test_a_batch_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(UserError, match="the batch of 2048 cannot be split evenly over 3 GPUs: use a multiple of 3"):
        estimate(load_recipes(PUBLISHED, None), machine(count=3))
