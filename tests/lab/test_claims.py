import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.lab.claims import CLEAR, Spread, at_budget, check_claims, holm, jumped, power, relative_deviation, seeds_needed
from microdit.lab.equal_cost import ArmPlan, _plan
from microdit.lab.study import BUDGETS, Claim, ReferenceArm, Study

PLAN = ArmPlan(1e9, 0.1, {"flops": 10, "seconds": 20, "images": 10})
CLAIM = Claim("a is better", "a", "b", "frechet_distance", "flops")


def line(arm: str, seed: int, value: float, step: int = 10, **more: Any) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "step": step, "frechet_distance": value, "recognised": value, "held_out_loss": 1.0, **more}


STUDENT = {3: 2.776, 5: 2.306, 8: 2.145}  # the 97.5% quantiles of Student's distribution with 4, 8 and 14 degrees of freedom
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
def test_what_is_not_known_is_undecided(lines, why):
    found = outcome(lines)
    assert found.holds is None
    assert why in found.why


def test_a_spread_is_that_of_the_seeds_that_got_there():
    lines = [*results([1.0, 3.0], []), {"arm": "a", "seed": 2, "step": 10, "diverged": "NaN"}]
    found = at_budget(lines, "a", 10, "frechet_distance")
    assert found == Spread(2.0, math.sqrt(2), 2)
    assert at_budget(lines, "a", 20, "frechet_distance") is None


def test_power_is_the_share_of_simulated_tests_that_find_the_difference():
    generator = random.Random(1)
    for difference, seeds in ((1.5, 3), (1.0, 8), (0.0, 5)):
        found = 0
        for _ in range(4000):
            ours, theirs = ([generator.gauss(mean, 1) for _ in range(seeds)] for mean in (0.0, difference))
            gap = abs(sum(theirs) - sum(ours)) / seeds
            pooled = math.sqrt((Spread.of(ours).deviation ** 2 + Spread.of(theirs).deviation ** 2) / seeds)
            found += gap / pooled > STUDENT[seeds]
        assert found / 4000 == pytest.approx(power(difference, 1.0, seeds), abs=0.025)  # three standard errors


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 394), (0.5, 64), (0.8, 26), (1.0, 17), (1.2, 12)])
def test_the_number_of_seeds_is_cohens(effect, seeds):
    """Cohen 1988, table 2.4.1: n for two means, 5% two-sided and a power of 0.80 (393 there at 0.2, by his approximation)."""
    assert seeds_needed(effect, 1.0) == seeds
    assert power(effect, 1.0, seeds) >= 0.8 > power(effect, 1.0, seeds - 1)


@given(st.floats(1e-3, 30), st.floats(1e-3, 1))
def test_seeds_are_the_fewest_that_suffice(effect, deviation):
    seeds = seeds_needed(effect * deviation, deviation)
    if seeds is None:
        assert power(effect, 1.0, 10_000) < 0.8
    else:
        assert power(effect, 1.0, seeds) >= 0.8
        assert seeds == 2 or power(effect, 1.0, seeds - 1) < 0.8


def test_holm_is_the_step_down_of_bonferroni():
    """By hand: three tests, 0.01 * 3, 0.02 * 2, and 0.5 * 1; a later one is never below an earlier one."""
    assert holm([0.5, 0.01, 0.02]) == pytest.approx([0.5, 0.03, 0.04])
    assert holm([0.04, 0.03, 0.03]) == pytest.approx([0.09, 0.09, 0.09])
    assert holm([None, 0.2, None]) == [None, 0.2, None]
    assert holm([]) == []


def test_holm_finds_nothing_where_there_is_nothing_in_95_of_100_families():
    generator = random.Random(2)
    families = [holm([generator.random() for _ in range(10)]) for _ in range(4000)]
    assert sum(min(family) < CLEAR for family in families) / 4000 == pytest.approx(0.05, abs=0.011)


def test_the_spread_is_pooled_over_arms_relative_to_their_means():
    plans = {"a": PLAN, "b": PLAN}
    lines = [*results([9.0, 11.0], [95.0, 100.0, 105.0])]
    expected = math.sqrt((1 * (math.sqrt(2) / 10) ** 2 + 2 * 0.05**2) / 3)
    assert relative_deviation(plans, lines, "flops", "frechet_distance") == pytest.approx(expected)
    assert relative_deviation(plans, results([1.0], [2.0]), "flops", "frechet_distance") is None


def test_an_open_claim_says_how_many_seeds_and_hours_would_decide_it():
    found = outcome(results([100.0, 102.0, 98.0], [101.0, 103.0, 99.0]))
    assert found.holds is None
    assert found.needed.origin == "seen here"
    assert found.needed.difference == pytest.approx(1 / 101)
    ratio = found.needed.deviation / found.needed.difference
    assert found.needed.seeds == pytest.approx(15.7 * ratio**2, rel=0.05)  # (1.96 + 0.84)^2 * 2
    assert found.needed.seconds == pytest.approx(2 * (found.needed.seeds - 3) * 10 * 0.1)
    nothing = outcome([])
    assert (nothing.needed.origin, nothing.needed.difference) == ("assumed", 0.05)
    assert nothing.needed.seeds == 3


def test_a_published_difference_is_excluded_only_by_its_interval():
    published = Claim("a is better", "a", "b", published=(7.0, 10.0))
    same = outcome(results([100.0, 102.0, 98.0], [101.0, 103.0, 99.0]), published)
    assert (same.holds, same.excluded, same.needed.origin) == (None, True, "published")
    assert same.needed.difference == pytest.approx(0.3)
    wide = outcome(results([100.0, 140.0, 60.0], [101.0, 141.0, 61.0]), published)
    assert (wide.holds, wide.excluded) == (None, False)


def test_the_interval_of_a_difference_covers_it_as_often_as_promised():
    generator = random.Random(3)
    covered = 0
    for _ in range(3000):
        ours = Spread.of([generator.gauss(5, 1) for _ in range(4)])
        theirs = Spread.of([generator.gauss(3, 2) for _ in range(3)])
        covered += -theirs.most_above(ours) <= 2 <= ours.most_above(theirs)
    assert 0.93 < covered / 3000 < 0.98


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
