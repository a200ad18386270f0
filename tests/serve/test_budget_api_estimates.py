"""Estimates for hostile recipes and requests."""

import pytest

from microdit.config.recipes import RECIPES
from microdit.errors import UserError
from microdit.planning.estimate import estimate
from microdit.planning.hardware import find_machine, measurements_file
from microdit.planning.planner import plan_for_dollars
from microdit.planning.workload import KnownShapes
from microdit.serve.budget_api import DATA, estimate_text
from microdit.serve.json_requests import APIError
from microdit.serve.schemas import BudgetRequest

RECIPE = """
name: NAME
data: {path: nowhere, resolution: 64, autoencoder: icon, text_encoder: minilm}
model: {dim: 64, depth: 2, head_dim: 32, mixer_dim: 32, mixer_depth: 1, num_experts: 0}
phases:
- {name: a, steps: 10, batch_size: 4, learning_rate: 1e-3}
- {name: b, steps: 10, batch_size: 4, learning_rate: 1e-3}
"""


def estimated(fields: dict, check=lambda: None) -> str:
    return estimate_text(BudgetRequest.parse({"chip": "h100", **fields}), RECIPES, check)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("depth: 2", "depth: 1000000000", r"recipe\.yaml: model\.depth is 1000000000, and must be a whole number from 1 to 256"),
        ("mixer_depth: 1", "mixer_depth: 1000000000", r"model\.mixer_depth is 1000000000, and must be"),
        ("dim: 64", "dim: 1000000000", r"model\.dim is 1000000000, and must be"),
        ("num_experts: 0", "num_experts: 1000000000", r"model\.num_experts is 1000000000, and must be"),
        ("depth: 2", "depth: ${oc.env:API_KEY}", "is not readable YAML"),
        ("depth: 2", "depth: '${oc.env:API_KEY}'", r"model\.depth is \$\{oc\.env:API_KEY\}, and must be"),
    ],
)
def test_a_recipe_that_is_too_large_or_asks_for_secrets_is_a_sentence(monkeypatch, old, new, sentence):
    monkeypatch.setenv("API_KEY", "the-secret")
    with pytest.raises(UserError, match=sentence) as refused:
        estimated({"text": RECIPE.replace(old, new)})
    assert "the-secret" not in str(refused.value)


def test_a_secret_named_in_a_recipe_stays_a_name(monkeypatch):
    monkeypatch.setenv("API_KEY", "the-secret")
    text = estimated({"text": RECIPE.replace("NAME", "${oc.env:API_KEY}")})
    assert "the-secret" not in text


def test_an_estimate_can_be_cancelled_between_its_parts():
    checked = []
    estimated({"text": RECIPE}, lambda: checked.append(1))
    assert len(checked) >= 4 * (1 + 1)  # four models laid out, and at least one way for each
    with pytest.raises(UserError, match="enough"):
        estimated({"text": RECIPE}, lambda: (_ for _ in ()).throw(UserError("enough")))


def test_a_plan_can_be_cancelled_while_made_and_while_estimated():
    machine, planning, estimating, checked = find_machine("h100", 1, None, None, None, measurements_file()), [], [], []
    plan = plan_for_dollars(100, machine, KnownShapes(), DATA, None, lambda: planning.append(1))
    estimate(plan.recipes, machine, check=lambda: estimating.append(1))
    assert planning
    assert estimating
    estimated({"dollars": 100}, lambda: checked.append(1))
    assert len(checked) == len(planning) + len(estimating)


@pytest.mark.parametrize("name", ["a\0b", "x" * 100_000, "../pyproject.toml", "\ud800"])
def test_a_name_of_no_recipe_is_a_sentence(name):
    with pytest.raises(UserError, match="There is no such recipe here"):
        estimated({"recipe": name})


@pytest.mark.parametrize(
    ("fields", "param"), [({"count": None}, "count"), ({"chip": None}, "chip"), ({"recipe": 5}, "recipe"), ({"text": []}, "text")]
)
def test_a_field_of_another_type_is_named(fields, param):
    with pytest.raises(APIError) as refused:
        estimated(fields)
    assert (refused.value.status, refused.value.param) == (400, param)
