"""What is printed: nothing cut at 80 characters, and the documentation's example."""

import io
from dataclasses import replace
from pathlib import Path

import pytest

from microdit.config.load import load_recipes
from microdit.io.console import PlainConsole
from microdit.planning.estimate import Estimate, estimate
from microdit.planning.estimate_tables import print_estimate
from microdit.planning.hardware import find_machine
from microdit.planning.planner import plan_for_dollars
from microdit.planning.workload import KnownShapes
from tests.planning.test_workload_bill import PUBLISHED, machine

DOCS = Path(__file__).parents[2] / "docs" / "budget.md"


def printed(budget: Estimate, width: int = 80) -> str:
    console = PlainConsole(file=io.StringIO(), width=width, no_color=True, record=True)
    print_estimate(budget, console)
    return "".join(f"{line.rstrip()}\n" for line in console.export_text().splitlines())


def test_the_documentation_shows_what_is_printed(tmp_path):
    found = estimate(load_recipes(PUBLISHED, None), find_machine("h100", 8, 2.5, 0.45, None, tmp_path / "none.json"))
    indented = "".join(f"    {line}".rstrip() + "\n" for line in printed(found).splitlines())
    assert indented in DOCS.read_text()


@pytest.mark.parametrize("dollars", [5, 500, 6000])
@pytest.mark.parametrize("chip", ["rtx4090", "h100"])
def test_names_and_numbers_are_whole_at_80_characters(chip, dollars):
    on = machine(count=1, price=0.34, chip=chip)
    found = estimate(plan_for_dollars(dollars, on, KnownShapes(), "nowhere").recipes, on)
    text = printed(found)
    assert "…" not in text
    costs, wide = text.split("in all")[0], printed(found, width=200).split("in all")[0]
    assert [line.split() for line in costs.splitlines() if line.strip(" ─")] == [
        line.split() for line in wide.splitlines() if line.strip(" ─")
    ]
    tables = text[text.index("What it costs") : text.index("Fits?")]
    assert max(map(len, tables.splitlines())) <= 80
    for phase in found.phases:
        assert len([line for line in tables.splitlines() if line.split()[:1] == [phase.bill.name]]) == 3


def test_a_long_name_goes_on_below_and_its_numbers_stay_whole():
    recipe = load_recipes(PUBLISHED / "1-256-masked.yaml", None)["1-256-masked"]
    name = "a-phase-with-a-name-that-is-very-long-and-says-all-of-its-settings"
    found = estimate({"a": replace(recipe, phases=[replace(recipe.phases[0], name=name)])}, machine())
    costs = printed(found).split("in all")[0]
    assert "…" not in costs
    rows = costs.split("─\n")[1].split(" all ")[0].splitlines()
    assert "".join(line[1:].split(" ")[0] for line in rows) == name
    assert rows[0].split()[1:] == ["256", "75%", "250,000", "2,048", "512", "M", "282.1", "144.5", "11.27", "$225.31"]
