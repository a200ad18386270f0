"""What a study's results say: means and spreads at equal budgets, and whether claims hold.

A claim holds if the difference of the arms' means has its sign and is more than twice its standard error over seeds (Welch). It does not
hold if the difference is as clearly the other way. Else it is open.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from microdit.lab.plan import ArmPlan
from microdit.lab.study import HIGHER_IS_BETTER, Claim, Study

CLEAR = 2.0  # standard errors


@dataclass(frozen=True)
class Spread:
    """Over seeds; `deviation` is NaN for one seed."""

    mean: float
    deviation: float
    seeds: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(mean(values), stdev(values) if len(values) > 1 else math.nan, len(values))

    @property
    def standard_error(self) -> float:
        return self.deviation / math.sqrt(self.seeds)


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
    better, worse = (at_budget(results, arm, plans[arm].steps[claim.budget], claim.measure) for arm in (claim.better, claim.worse))
    lost = {arm: len(diverged(results, arm)) for arm in (claim.better, claim.worse)}
    if any(lost.values()):
        return Verdict(claim, None, better, worse, ", ".join(f"{count} seeds of {arm} diverged" for arm, count in lost.items() if count))
    if better is None or worse is None:
        return Verdict(claim, None, better, worse, "not run yet")
    if min(better.seeds, worse.seeds) < 2:
        return Verdict(claim, None, better, worse, "one seed tells nothing of chance")
    ahead = (better.mean - worse.mean) * (1 if claim.measure in HIGHER_IS_BETTER else -1)
    error = math.hypot(better.standard_error, worse.standard_error)
    apart = abs(ahead) / error if error else math.inf
    why = f"apart by {apart:.1f} standard errors over {better.seeds} and {worse.seeds} seeds"
    return Verdict(claim, None if apart < CLEAR else ahead > 0, better, worse, why)
