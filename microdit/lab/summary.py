"""What a study's results say: means and spreads at equal budgets, and whether claims hold.

A claim holds if the arms' means differ over seeds with p < 0.05 (Welch's t-test, which minds how few the seeds are) and as claimed. It
does not hold if they differ as clearly the other way. Else it is open.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from scipy.stats import ttest_ind_from_stats

from microdit.lab.plan import ArmPlan
from microdit.lab.study import HIGHER_IS_BETTER, Claim, Study

CLEAR = 0.05  # two-sided
JUMPED = 1.15  # times the lowest held-out loss of an arm's seeds: seeds spread by a few hundredths where none jumped


@dataclass(frozen=True)
class Spread:
    """Over seeds; `deviation` is NaN for one seed."""

    mean: float
    deviation: float
    seeds: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(mean(values), stdev(values) if len(values) > 1 else math.nan, len(values))

    def chance(self, other: "Spread") -> float:
        """The p-value of Welch's test: how often means of equal arms would differ as much. Both have two seeds or more."""
        if self.deviation == other.deviation == 0:
            return float(self.mean == other.mean)
        ours, theirs = ((spread.mean, spread.deviation, spread.seeds) for spread in (self, other))
        return float(ttest_ind_from_stats(*ours, *theirs, equal_var=False).pvalue)


@dataclass(frozen=True)
class Verdict:
    """`holds` is None where it is open: `why` says so."""

    claim: Claim
    holds: bool | None
    better: Spread | None
    worse: Spread | None
    why: str


def at_budget(results: list[dict[str, Any]], arm: str, step: int, measure: str) -> Spread | None:
    """Of the seeds that got there; None if none did."""
    values = [line[measure] for line in results if line["arm"] == arm and line["step"] == step and not line.get("diverged")]
    return Spread.of(values) if values else None


def diverged(results: Iterable[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    return [line for line in results if line["arm"] == arm and line.get("diverged")]


def judge(study: Study, plans: dict[str, ArmPlan], results: list[dict[str, Any]]) -> list[Verdict]:
    """Of each claim of the study."""
    return [_judge(claim, plans, results) for claim in study.claims]


def _judge(claim: Claim, plans: dict[str, ArmPlan], results: list[dict[str, Any]]) -> Verdict:
    better, worse = _both(claim, plans, results)
    lost = {arm: len(diverged(results, arm)) for arm in (claim.better, claim.worse)}
    if any(lost.values()):
        return Verdict(claim, None, better, worse, ", ".join(f"{count} seeds of {arm} diverged" for arm, count in lost.items() if count))
    if better is None or worse is None:
        return Verdict(claim, None, better, worse, "not run yet")
    if min(better.seeds, worse.seeds) < 2:
        return Verdict(claim, None, better, worse, "one seed tells nothing of chance")
    ahead = (better.mean - worse.mean) * (1 if claim.measure in HIGHER_IS_BETTER else -1)
    chance = better.chance(worse)
    why = f"p = {chance:.2g}, {better.seeds} and {worse.seeds} seeds"
    return Verdict(claim, None if chance >= CLEAR else ahead > 0, better, worse, why + _without_jumps(claim, plans, results))


def _both(claim: Claim, plans: dict[str, ArmPlan], results: list[dict[str, Any]]) -> tuple[Spread | None, Spread | None]:
    better, worse = (at_budget(results, arm, plans[arm].steps[claim.budget], claim.measure) for arm in (claim.better, claim.worse))
    return better, worse


def _without_jumps(claim: Claim, plans: dict[str, ArmPlan], results: list[dict[str, Any]]) -> str:
    """What the claim's arms come to without readings whose loss had jumped, if there are any."""
    steps = {arm: plans[arm].steps[claim.budget] for arm in (claim.better, claim.worse)}
    out = [line for line in jumped(results) if steps.get(line["arm"]) == line["step"]]
    if not out:
        return ""
    arms = " and ".join(f"{line['arm']}, seed {line['seed']}" for line in out)
    better, worse = _both(claim, plans, [line for line in results if line not in out])
    if better is None or worse is None or min(better.seeds, worse.seeds) < 2:
        return f"; the loss of {arms} had jumped, and without it there are too few seeds"
    return f"; without {arms}, whose loss had jumped: {better.mean:.3g} and {worse.mean:.3g}, p = {better.chance(worse):.2g}"


def jumped(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Readings whose held-out loss is far above that of the same arm's best seed at the same step."""
    lines = [line for line in results if not line.get("diverged")]
    lowest: dict[tuple[str, int], float] = {}
    for line in lines:
        place = (line["arm"], line["step"])
        lowest[place] = min(line["held_out_loss"], lowest.get(place, math.inf))
    return [line for line in lines if line["held_out_loss"] > JUMPED * lowest[line["arm"], line["step"]]]
