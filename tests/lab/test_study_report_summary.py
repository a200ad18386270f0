import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.lab.equal_cost import ArmPlan, _plan
from microdit.lab.study import BUDGETS, Claim, ReferenceArm, Study
from microdit.lab.study_report import Spread, at_budget, check_claims, jumped

PLAN = ArmPlan(1e9, 0.1, {"flops": 10, "seconds": 20, "images": 10})
CLAIM = Claim("a is better", "a", "b", "frechet_distance", "flops")


def line(arm: str, seed: int, value: float, step: int = 10, **more: Any) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "step": step, "frechet_distance": value, "recognised": value, "held_out_loss": 1.0, **more}


PAIR = {"a": [1.0, 1.5, 0.5], "b": [5.0, 5.1, 4.9]}


def outcome(results: list[dict[str, Any]], claim: Claim = CLAIM):
    study = Study("s", "?", reference=ReferenceArm("a", 10), arms={"a": [], "b": []}, claims=[claim])
    return check_claims(study, {"a": PLAN, "b": PLAN}, results)[0]


def results(a: list[float], b: list[float]) -> list[dict[str, Any]]:
    return [line(arm, seed, value) for arm, values in (("a", a), ("b", b)) for seed, value in enumerate(values)]


def test_a_clear_difference_decides_and_a_small_one_does_not():
    assert outcome(results([1.0, 1.1, 0.9], [5.0, 5.1, 4.9])).holds is True
    assert outcome(results([5.0, 5.1, 4.9], [1.0, 1.1, 0.9])).holds is False
    assert outcome(results([1.0, 3.0, 2.0], [2.2, 3.1, 1.2])).holds is None


def test_two_standard_errors_of_few_seeds_decide_nothing():
    """By hand: 2 / sqrt(1/3 + 1/3) = 2.449 standard errors; with 4 degrees of freedom Student's distribution is 1/2 + 3/8 u (1 - u^2 / 3),
    u = t / sqrt(4 + t^2), doubled: 0.96476."""
    t = 2 / math.sqrt(2 / 3)
    u = t / math.sqrt(4 + t * t)
    by_hand = 2 * (1 - (0.5 + 0.75 * (u - u**3 / 3)))
    assert by_hand == pytest.approx(0.0705, abs=1e-4)
    found = outcome(results([1.0, 2.0, 3.0], [3.0, 4.0, 5.0]))
    assert found.holds is None
    assert found.why == f"p = {by_hand:.2g}, 3 and 3 seeds"
    assert Spread(2.0, 1.0, 3).chance(Spread(4.0, 1.0, 3)) == pytest.approx(by_hand)


def test_equal_arms_are_told_apart_by_chance_as_often_as_promised():
    """2 + 2 seeds of one distribution, a thousand times: at two standard errors 18% would be told apart."""
    generator = random.Random(0)
    found = [outcome(results(*([generator.gauss(0, 1) for _ in range(2)] for _ in range(2)))).holds for _ in range(1000)]
    assert sum(one is not None for one in found) / 1000 < 0.06


def test_a_loss_that_jumped_is_told_and_what_the_claim_is_without_it():
    lines = [line(arm, seed, value, held_out_loss=0.6 + 0.01 * value) for arm, values in PAIR.items() for seed, value in enumerate(values)]
    assert outcome(lines).holds is True
    assert "jumped" not in outcome(lines).why
    lines[5] |= {"held_out_loss": 1.0, "frechet_distance": 50.0}
    assert jumped(lines) == [lines[5]]
    found = outcome(lines)
    assert found.holds is None
    assert "; without b, seed 2, whose loss had jumped: 1 and 5.05, p = " in found.why
    lines[4] |= {"held_out_loss": 1.0}
    assert "too few seeds remain without it" in outcome(lines).why


def test_where_more_is_better_the_sign_turns():
    more = Claim("a is better", "a", "b", "recognised", "flops")
    assert outcome(results([5.0, 5.1, 4.9], [1.0, 1.1, 0.9]), more).holds is True


def test_the_reading_is_that_of_the_claims_budget():
    late = [line(arm, seed, value, step=20) for arm, value in (("a", 9.0), ("b", 1.0)) for seed in range(2)]
    both = [*results([1.0, 1.0], [5.0, 5.0]), *late]
    assert outcome(both).holds is True
    assert outcome(both, Claim("a is better", "a", "b", "frechet_distance", "seconds")).holds is False


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "not run yet"),
        (results([1.0], [2.0]), "a single seed allows no test"),
        ([*results([1.0, 1.0], [2.0]), {"arm": "b", "seed": 1, "step": 5, "diverged": "NaN"}], "1 seeds of b diverged"),
    ],
)
def test_what_is_not_known_is_open(lines, why):
    found = outcome(lines)
    assert found.holds is None
    assert why in found.why


def test_a_spread_is_that_of_the_seeds_that_got_there():
    lines = [*results([1.0, 3.0], []), {"arm": "a", "seed": 2, "step": 10, "diverged": "NaN"}]
    found = at_budget(lines, "a", 10, "frechet_distance")
    assert found == Spread(2.0, math.sqrt(2), 2)
    assert at_budget(lines, "a", 20, "frechet_distance") is None


@given(st.integers(1, 10**5), st.floats(1e6, 1e15), st.floats(1e-4, 1e2), st.floats(0.02, 50), st.floats(0.02, 50))
def test_every_budget_is_spent_to_within_a_step(steps, flops, seconds, flops_ratio, seconds_ratio):
    plan = _plan(list(BUDGETS), steps, flops, seconds, flops * flops_ratio, seconds * seconds_ratio)
    for budget, spent in (("flops", steps * flops), ("seconds", steps * seconds), ("images", steps)):
        taken = plan.cost(budget, plan.steps[budget])
        assert abs(taken - spent) <= plan.cost(budget, 1) * (1 + 1e-9)
    assert plan.measured_steps([0.5, 1.0])[-1] == max(plan.steps.values())
    assert set(plan.steps.values()) <= set(plan.measured_steps([0.25, 1.0]))
    only = _plan(["seconds"], steps, flops, seconds, flops * flops_ratio, seconds * seconds_ratio)
    assert only.steps == {"seconds": plan.steps["seconds"]}
