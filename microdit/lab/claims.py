"""Claims of a study: whether they hold, and how many seeds would decide those that stay open.

A claim holds if the means of its arms over seeds differ as claimed with p < 0.05 (Welch's t-test, which accounts for small numbers of
seeds). It does not hold if they differ as clearly the other way. Otherwise the result says how many seeds of both arms would show a
difference of the published size, or of the size seen here where none is published.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from scipy.stats import nct, t, ttest_ind_from_stats

from microdit.lab.equal_cost import ArmPlan
from microdit.lab.study import HIGHER_IS_BETTER, Budget, Claim, Study

CLEAR = 0.05  # two-sided significance level
POWER = 0.8  # the chance with which a difference is to be found
MOST_SEEDS = 10_000  # beyond which their number is not computed
JUMPED = 1.15  # ratio to the lowest held-out loss of an arm's seeds above which a loss has jumped; seeds usually differ by a few percent
# For arms of a single seed: the standard deviation over seeds relative to the mean, pooled over the studies that were run
# (benchmarks/lab_claims.py prints it); and the difference to look for where none is published or seen.
USUAL_SPREAD = 0.011
USUAL_DIFFERENCE = 0.05


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds. The deviation is NaN for one seed."""

    mean: float
    deviation: float
    seeds: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(mean(values), stdev(values) if len(values) > 1 else math.nan, len(values))

    def chance(self, other: "Spread") -> float:
        """Return the p-value of Welch's t-test for equal means. Both spreads need at least two seeds."""
        if self.deviation == other.deviation == 0:
            return float(self.mean == other.mean)
        ours, theirs = ((spread.mean, spread.deviation, spread.seeds) for spread in (self, other))
        return float(ttest_ind_from_stats(*ours, *theirs, equal_var=False).pvalue)

    def most_above(self, other: "Spread") -> float:
        """Return the upper end of the 95% confidence interval of this mean less the other, by Welch's t-test."""
        ours, theirs = (spread.deviation**2 / spread.seeds for spread in (self, other))
        if ours + theirs == 0:
            return self.mean - other.mean
        freedom = (ours + theirs) ** 2 / (ours**2 / (self.seeds - 1) + theirs**2 / (other.seeds - 1))
        return float(self.mean - other.mean + t.isf(CLEAR / 2, freedom) * math.sqrt(ours + theirs))


@dataclass(frozen=True)
class SeedsNeeded:
    """The seeds that find a difference with a probability of 80%, and what they cost.

    `difference` and `deviation` (of seeds) are relative to the mean; `origin` says whose difference it is. `seeds` is the number for each
    arm, None beyond 10,000; `seconds` is what the missing ones would take on the study's device.
    """

    difference: float
    origin: str
    deviation: float
    seeds: int | None
    seconds: float | None


@dataclass(frozen=True)
class ClaimResult:
    """The outcome of a claim. `holds` is None if it is undecided: then `needed` says what would decide it, unless an arm has diverged.

    `why` gives the p-value, which is also `chance`, or the reason why there is none. `excluded` is True if the 95% confidence interval of
    the difference lies below the published one: what is seen here is smaller, or nothing.
    """

    claim: Claim
    holds: bool | None
    better: Spread | None
    worse: Spread | None
    why: str
    chance: float | None = None
    needed: SeedsNeeded | None = None
    excluded: bool = False


def check_claims(study: Study, plans: dict[str, ArmPlan], results: list[dict[str, Any]]) -> list[ClaimResult]:
    """Return the outcome of each claim of the study."""
    return [_check_claim(claim, plans, results) for claim in study.claims]


def _check_claim(claim: Claim, plans: dict[str, ArmPlan], results: list[dict[str, Any]]) -> ClaimResult:
    better, worse = _both(claim, plans, results)
    lost = {arm: len(diverged(results, arm)) for arm in (claim.better, claim.worse)}
    if any(lost.values()):
        return ClaimResult(
            claim, None, better, worse, ", ".join(f"{count} seeds of {arm} diverged" for arm, count in lost.items() if count)
        )
    needed = _seeds_needed(claim, plans, results, better, worse)
    if better is None or worse is None:
        return ClaimResult(claim, None, better, worse, "not run yet", needed=needed)
    if min(better.seeds, worse.seeds) < 2:
        return ClaimResult(claim, None, better, worse, "a single seed allows no test", needed=needed)
    ahead = (better.mean - worse.mean) * (1 if claim.measure in HIGHER_IS_BETTER else -1)
    chance = better.chance(worse)
    why = f"p = {chance:.2g}, {better.seeds} and {worse.seeds} seeds" + _claim_without_jumps(claim, plans, results)
    if chance < CLEAR:
        return ClaimResult(claim, ahead > 0, better, worse, why, chance)
    first, second = (better, worse) if claim.measure in HIGHER_IS_BETTER else (worse, better)
    excluded = claim.published is not None and first.most_above(second) < needed.difference * max(better.mean, worse.mean)
    return ClaimResult(claim, None, better, worse, why, chance, needed, excluded)


def holm(chances: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for their number (Holm 1979): with m of them, the k-th lowest times m + 1 - k, and never below a lower one's.

    None, for what was not tested, stays None and does not count.

    >>> holm([0.01, None, 0.04, 0.03])
    [0.03, None, 0.06, 0.06]
    """
    tested = sorted((chance, number) for number, chance in enumerate(chances) if chance is not None)
    corrected: list[float | None] = [None] * len(chances)
    highest = 0.0
    for rank, (chance, number) in enumerate(tested):
        highest = max(highest, min(1.0, chance * (len(tested) - rank)))
        corrected[number] = highest
    return corrected


def power(difference: float, deviation: float, seeds: int) -> float:
    """Return the chance that a two-sided t-test of twice `seeds` values finds a true `difference`, by the noncentral t distribution."""
    freedom, shift = 2 * (seeds - 1), difference / deviation * math.sqrt(seeds / 2)
    bound = t.isf(CLEAR / 2, freedom)
    if shift > bound + 10:  # at most 2e-5 from certain
        return 1.0
    opposite = nct.cdf(-bound, freedom, shift) if shift < 3 else 0.0  # below 1e-6, where scipy computes NaN
    return float(nct.sf(bound, freedom, shift) + opposite)


def seeds_needed(difference: float, deviation: float) -> int | None:
    """Return the least number of seeds of each arm that find `difference` with a probability of 80%; None beyond 10,000."""
    if deviation <= 0:
        return 2 if difference > 0 else None
    if difference <= 0 or power(difference, deviation, MOST_SEEDS) < POWER:
        return None
    low, high = 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(difference, deviation, middle) >= POWER else (middle, high)
    return high


def _seeds_needed(
    claim: Claim, plans: dict[str, ArmPlan], results: list[dict[str, Any]], better: Spread | None, worse: Spread | None
) -> SeedsNeeded:
    both = {arm: plans[arm] for arm in (claim.better, claim.worse)}
    steady = relative_deviation(plans, without_jumps(results), claim.budget, claim.measure)
    own = relative_deviation(both, results, claim.budget, claim.measure)  # wider where a loss has jumped
    deviation = max(steady or 0.0, own or 0.0) or USUAL_SPREAD
    if claim.published is not None:
        difference, origin = abs(claim.published[1] - claim.published[0]) / max(claim.published), "published"
    elif better is not None and worse is not None and max(better.mean, worse.mean) > 0:
        difference, origin = abs(worse.mean - better.mean) / max(better.mean, worse.mean), "seen here"
    else:
        difference, origin = USUAL_DIFFERENCE, "assumed"
    seeds, seconds = seeds_needed(difference, deviation), None
    if seeds is not None:
        arms = ((both[claim.better], better), (both[claim.worse], worse))
        missing = [(plan, max(0, seeds - (spread.seeds if spread else 0))) for plan, spread in arms]
        seconds = sum(count * plan.seconds_per_step * plan.steps[claim.budget] for plan, count in missing)
    return SeedsNeeded(difference, origin, deviation, seeds, seconds)


def relative_deviation(plans: dict[str, ArmPlan], results: list[dict[str, Any]], budget: Budget, measure: str) -> float | None:
    """Return the standard deviation over seeds relative to the mean, pooled over the arms at a budget's end.

    None if no arm has two seeds there.
    """
    spreads = [at_budget(results, arm, plan.steps[budget], measure) for arm, plan in plans.items() if budget in plan.steps]
    pooled = [(spread.seeds - 1, spread.deviation / spread.mean) for spread in spreads if spread and spread.seeds > 1 and spread.mean > 0]
    freedom = sum(count for count, _ in pooled)
    return math.sqrt(sum(count * ratio**2 for count, ratio in pooled) / freedom) if freedom else None


def at_budget(results: list[dict[str, Any]], arm: str, step: int, measure: str) -> Spread | None:
    """Return the spread over the seeds that reached `step`, or None if none did."""
    values = [line[measure] for line in results if line["arm"] == arm and line["step"] == step and not line.get("diverged")]
    return Spread.of(values) if values else None


def diverged(results: Iterable[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    """Return the results of an arm that record a divergence."""
    return [line for line in results if line["arm"] == arm and line.get("diverged")]


def _both(claim: Claim, plans: dict[str, ArmPlan], results: list[dict[str, Any]]) -> tuple[Spread | None, Spread | None]:
    better, worse = (at_budget(results, arm, plans[arm].steps[claim.budget], claim.measure) for arm in (claim.better, claim.worse))
    return better, worse


def _claim_without_jumps(claim: Claim, plans: dict[str, ArmPlan], results: list[dict[str, Any]]) -> str:
    """Return the claim's result without runs whose loss had jumped, as text; empty if there are none."""
    steps = {arm: plans[arm].steps[claim.budget] for arm in (claim.better, claim.worse)}
    out = [line for line in jumped(results) if steps.get(line["arm"]) == line["step"]]
    if not out:
        return ""
    arms = " and ".join(f"{line['arm']}, seed {line['seed']}" for line in out)
    better, worse = _both(claim, plans, without_jumps(results))
    if better is None or worse is None or min(better.seeds, worse.seeds) < 2:
        return f"; the loss of {arms} had jumped, and too few seeds remain without it"
    return f"; without {arms}, whose loss had jumped: {better.mean:.3g} and {worse.mean:.3g}, p = {better.chance(worse):.2g}"


def jumped(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results whose held-out loss is far above that of the same arm's best seed at the same step."""
    lines = [line for line in results if not line.get("diverged")]
    lowest: dict[tuple[str, int], float] = {}
    for line in lines:
        place = (line["arm"], line["step"])
        lowest[place] = min(line["held_out_loss"], lowest.get(place, math.inf))
    return [line for line in lines if line["held_out_loss"] > JUMPED * lowest[line["arm"], line["step"]]]


def without_jumps(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results without those that `jumped` lists."""
    out = jumped(results)
    return [line for line in results if line not in out]
