"""What a sum of money buys."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from microdit.config.load import load_recipe, load_recipes
from microdit.errors import UserError
from microdit.models.config import resolve
from microdit.models.microdit import MicroDiT
from microdit.planning.estimate import estimate
from microdit.planning.phases import (
    FAMILIES,
    LAB,
    LARGE,
    PAPER,
    SMALL,
    STAGES,
    WIDTHS,
    Family,
    equivalent_size,
    paper_flops,
    size_of_width,
    stage_recipe,
    target_size,
)
from microdit.planning.planner import LEAST_AT_512, LEAST_IMAGES, STEPS_WANTED, plan_for_dollars, write_recipes
from microdit.planning.workload import KnownShapes, assumed_shapes
from tests.planning.test_workload_bill import PUBLISHED, machine

LAB_PAGES = Path(__file__).parents[2] / "docs" / "lab"
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def buy_on(
    chip: str,
    dollars: float,
    count: int = 1,
    price: float = 1.0,
    utilisation: float = 0.4,
    images: int | None = 1000,
    family: Family = LAB,
):
    return plan_for_dollars(dollars, machine(count, price, utilisation, chip), KnownShapes(), "data/mine", images, family=family)


def test_the_table_of_stages_is_the_published_run():
    """Against microdit-xl, which the paper's numbers were written into by hand."""
    for stage, recipe in zip(STAGES, load_recipes(PUBLISHED, None).values(), strict=True):
        ours = stage_recipe(stage, LARGE, stage.steps, 2048)
        assert ours.phases == recipe.phases
        model = replace(recipe.model, mask_padding=True)  # the authors' captions are stored in full, other people's mostly are not
        assert (ours.model, ours.diffusion, ours.ema, ours.init_from) == (model, recipe.diffusion, recipe.ema, recipe.init_from)


def test_the_ladder_holds_the_papers_sizes():
    assert size_of_width(512) is SMALL
    assert size_of_width(1024) is LARGE


@families
def test_the_ladder_grows(family):
    sizes = [family.size_of_width(width) for width in WIDTHS]
    assert all(1.2 < equivalent_size(b) / equivalent_size(a) < 4 for a, b in pairwise(sizes))
    with torch.device("meta"):
        counts = [sum(weight.numel() for weight in MicroDiT(resolve(size)).parameters()) for size in sizes]
    assert counts == sorted(counts)


@families
def test_the_phases_of_a_family_follow_each_other(family):
    assert [stage.number for stage in family.stages] == list(range(1, len(family.stages) + 1))
    assert [stage.follows for stage in family.stages[1:]] == [f"{stage.number}-{stage.name}" for stage in family.stages[:-1]]
    assert family.stages[0].follows is None
    assert [stage.resolution for stage in family.stages].count(256) == family.at_256
    assert sum(stage.steps for stage in family.stages) == 335_000  # the published run's


def test_the_lab_plans_what_its_reasons_say():
    found = buy_on("h100", 500, family=LAB)
    for recipe in found.recipes.values():
        assert (recipe.diffusion.objective, recipe.optimizer.method) == ("flow", "muon")
        assert (recipe.model.num_experts, recipe.model.attention_range, recipe.model.mixer_depth) == (0, (1.0, 1.0), 2)
        phase = recipe.phases[0]
        assert (phase.mask_ratio_at(0), phase.mask_ratio_at(phase.steps - 1)) == (0.75, 0)
    assert [recipe.diffusion.shift for recipe in found.recipes.values()] == [1, 2]
    assert [line.removeprefix("- ") for line in found.describe()][-len(LAB.reasons) :] == list(LAB.reasons)


def test_the_reasons_of_the_lab_quote_its_studies():
    """Each pair of distances stands in the table of the study that is named with it."""
    quotes = [quote for reason in LAB.reasons for quote in re.findall(r"\((.*?(\d{3}) against (\d{3}).*?)\)", reason)]
    assert len(quotes) == 5
    for quote, better, worse in quotes:
        study = re.search(r"([a-z-]+), \w+ seeds", quote)[1]
        page = (LAB_PAGES / study / "README.md").read_text()
        assert all(re.search(rf"\| \**{number} ± ", page) for number in (better, worse)), quote


def test_the_two_families_are_as_costly_for_the_same_money():
    plans = [buy_on("h100", 250, count=8, family=family) for family in FAMILIES.values()]
    assert plans[0].flops == plans[1].flops
    assert 0.5 < plans[0].equivalent / plans[1].equivalent < 2  # of the same rules


def test_the_rules_give_their_own_points():
    """1 B parameters at about 1e21 FLOPs (abstract of 2410.08184; its run was of 1.5e21), and the published run itself."""
    assert target_size(1.5e21, 1.0, 1.0).by_fit == pytest.approx(1e9, rel=0.05)
    run, size = paper_flops(LARGE), equivalent_size(LARGE)
    assert target_size(run, run, size).by_paper == size
    assert size / target_size(run, run, size).by_fit == pytest.approx(1.14, abs=0.005)  # as docs/budget.md says
    small = target_size(1e18, run, size)
    assert small.by_paper / small.by_fit == pytest.approx(1.7, abs=0.05)
    assert (round(size / 1e6), round(equivalent_size(SMALL) / 1e6)) == (465, 83)


def test_the_published_runs_money_buys_the_published_run():
    found = buy_on("h100", 513, count=8, price=2.5, utilisation=0.45, family=PAPER)
    assert found.width == 1024
    assert [recipe.phases[0].batch_size for recipe in found.recipes.values()] == [2048] * 4
    assert [recipe.phases[0].steps for recipe in found.recipes.values()] == pytest.approx([250_000, 30_000, 50_000, 5_000], rel=0.002)


@families
@pytest.mark.parametrize(
    ("chip", "count", "dollars", "images"),
    [
        ("rtx4090", 1, 500, None),
        ("rtx4090", 3, 90, 5_000_000),
        ("t4", 1, 4, 1000),
        ("a100", 8, 2000, 37_000_000),
        ("rtx3090", 1, 9, None),
        ("h100", 8, 9000, None),
    ],
)
def test_the_money_is_spent_and_not_more_and_the_recipes_load_and_fit(tmp_path, chip, count, dollars, images, family):
    """Training and encoding together, each as the bill of the recipes that were written says."""
    found = buy_on(chip, dollars, count, images=images, family=family)
    write_recipes(found, tmp_path / "out")
    recipes = load_recipes(tmp_path / "out", None)
    assert recipes == found.recipes
    estimated = estimate(recipes, found.machine, images=images)
    assert estimated.encoding == found.encoding
    assert 0.99 * dollars < estimated.dollars + estimated.encoding.dollars <= dollars
    assert estimated.encoding.images == (images or 1_000_000)
    assert all(phase.fits for phase in estimated.phases)
    assert found.widths[0] <= found.width <= found.widths[1] or found.smaller_for_memory
    assert all(recipe.data.path == "data/mine" for recipe in recipes.values())


@families
def test_more_money_never_buys_a_smaller_model(family):
    widths = [buy_on("h100", dollars, family=family).width for dollars in (0.1, 1, 10, 100, 1000, 10_000)]
    assert widths == sorted(widths)
    assert len(set(widths)) >= 5


@families
def test_little_money_stays_at_256_px_and_more_goes_on_to_512(family):
    little, more = buy_on("h100", 1, family=family), buy_on("h100", 30, family=family)
    stems = [f"{stage.number}-{stage.name}" for stage in family.stages]
    assert list(little.recipes) == stems[: family.at_256]
    assert len(little.recipes[stems[family.at_256 - 1]].ema) == 1
    assert any("All is spent at 256 px" in line for line in little.describe())
    masked = more.recipes[stems[family.at_256]].phases[0]
    assert masked.steps * masked.batch_size >= 0.99 * LEAST_AT_512
    assert sum(recipe.phases[0].steps for recipe in more.recipes.values()) >= 0.99 * STEPS_WANTED


def test_a_small_card_gets_a_smaller_model_and_says_so():
    t4 = machine(1, 1.0, 0.4, "t4")
    found = plan_for_dollars(2000, replace(t4, chip=replace(t4.chip, memory_gb=8)), KnownShapes(), "data/mine", 1000)
    assert found.smaller_for_memory
    assert found.width < buy_on("h100", 2000 * 65 / 989.4).width  # as many FLOPs on a card with room
    assert any("does not fit 1 x 8 GB" in line for line in found.describe())


def test_the_uncertainty_is_said_in_words():
    found = buy_on("h100", 100)
    assert found.widths[0] < found.width < found.widths[1]
    assert any(f"width {found.widths[0]} to {found.widths[1]}" in line for line in found.describe())


@pytest.mark.parametrize(
    ("dollars", "images", "sentence"),
    [
        (
            0.01,
            1000,
            r"\$0\.01 are too little: on H100 SXM, after \$0\.00 for encoding 1,000 images \(--images\) they pay for .* one is \$0\.\d\d\.",
        ),
        (0.37, None, r"after \$0\.36 for encoding 1,000,000 images \(--images\) they pay for "),
        (
            0.2,
            None,
            r"on H100 SXM, encoding 1,000,000 images alone takes \$0\.36: say how many there are with --images\. .* is \$0\.\d\d\.",
        ),
    ],
)
def test_too_little_money_says_how_much_is_needed_and_that_is_enough(dollars, images, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        buy_on("h100", dollars, images=images)
    enough = float(str(caught.value).rsplit("$", 1)[1].rstrip("."))
    found = buy_on("h100", enough, images=images)
    assert found.width == WIDTHS[0]
    assert sum(recipe.phases[0].steps * recipe.phases[0].batch_size for recipe in found.recipes.values()) > 0.9 * LEAST_IMAGES


def test_costlier_images_leave_less_money_for_training():
    few, many = buy_on("h100", 100, images=1000), buy_on("h100", 100, images=20_000_000)
    assert many.flops / few.flops == pytest.approx(1 - many.encoding.dollars / 100, rel=0.001)
    assert many.gpu_hours * 3600 * 989.4e12 * 0.4 == pytest.approx(many.flops)
    assert "20,000,000 images (--images says how many)" in many.describe()[0]
    little = buy_on("h100", 2, images=None)
    assert list(little.recipes) == ["1-256-falling"]
    assert little.encoding.flops_per_sample < many.encoding.flops_per_sample / 3
    assert "1,000,000 images (assumed; --images says how many)" in little.describe()[0]


def test_what_is_encoded_already_costs_nothing_more(monkeypatch):
    """Each stage's shapes as if read from a set of 1,000 images."""
    there = lambda recipe, given: replace(assumed_shapes(recipe, given), samples=1000, bytes=10**8)  # noqa: E731
    monkeypatch.setattr("microdit.planning.planner.shapes_of", there)
    found = buy_on("h100", 100, images=None)
    assert found.gpu_hours == pytest.approx(100)
    assert "the images are encoded already" in found.describe()[0]


def test_only_the_set_that_is_named_is_looked_at(tmp_path, monkeypatch, encoded_emoji):
    """At 16 px it holds nothing that the phases could be trained on."""
    monkeypatch.chdir(tmp_path)
    before = buy_on("h100", 100)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(encoded_emoji)
    with pytest.raises(
        UserError, match=r"holds the resolutions 16: .* need 256 and 512 px: encode data/mine at both, or name another --data"
    ):
        buy_on("h100", 100)
    other = plan_for_dollars(100, before.machine, KnownShapes(), "data/other", 1000)
    assert (other.flops, other.wanted, other.equivalent) == (before.flops, before.wanted, before.equivalent)


@pytest.mark.parametrize("dollars", [1e300, 1e12])
def test_more_than_is_planned_with_is_refused_and_what_is_named_is_not(dollars):
    with pytest.raises(
        UserError, match=r"--dollars is 1e\+\d+, and more than we plan with: on H100 SXM that ends at \$[\d,.]+, 1e\+24"
    ) as caught:
        buy_on("h100", dollars)
    most = float(str(caught.value).split("$")[1].split(", ")[0].replace(",", ""))
    assert buy_on("h100", most - 1).flops == pytest.approx(1e24, rel=1e-4)


@pytest.mark.parametrize("dollars", [0, -5, float("nan"), float("inf")])
def test_no_sum_is_refused(dollars):
    with pytest.raises(UserError, match="must be a sum above 0"):
        buy_on("h100", dollars)


def test_a_price_of_nothing_and_a_folder_that_is_there_are_refused(tmp_path):
    with pytest.raises(UserError, match="needs a --price above 0"):
        buy_on("h100", 5, price=0)
    found = buy_on("h100", 5)
    write_recipes(found, tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        write_recipes(found, tmp_path / "out")


def test_a_written_recipe_says_only_what_matters(tmp_path):
    write_recipes(buy_on("h100", 5, family=PAPER), tmp_path)
    text = (tmp_path / "1-256-masked.yaml").read_text()
    assert text.startswith("# Phase 1 of ")
    assert "optimizer" not in text  # as the defaults are
    assert load_recipe(Path(tmp_path / "1-256-masked.yaml")).optimizer.betas == (0.9, 0.999)
