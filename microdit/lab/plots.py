"""Figures of a study for its report, with the spread over seeds: quality against cost if measured on the way, else arm beside arm."""

import io
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from microdit.files import write_aside
from microdit.lab.plan import ArmPlan
from microdit.lab.study import HIGHER_IS_BETTER, Budget, Study
from microdit.lab.summary import at_budget

COLOURS = ("#1f5fbf", "#c2500a", "#14713a", "#7a3fb0", "#b3261e", "#5d6675", "#008b8b", "#b8860b", "#d6338a", "#3b3b3b")
MARKERS = "osD^vPX*<>"
AXES: dict[Budget, tuple[str, float]] = {
    "flops": ("TFLOPs of training", 1e12),
    "seconds": ("seconds of training", 1.0),
    "images": ("batches of training", 1.0),
}
EQUAL: dict[Budget, str] = {"flops": "equal FLOPs", "seconds": "equal seconds", "images": "equal images"}


def draw_study(study: Study, plans: dict[str, ArmPlan], results: list[dict[str, Any]], measure: str, title: str, path: Path) -> None:
    """A panel for each budget. A bar is one standard deviation over seeds."""
    label = f"{title} ({'higher' if measure in HIGHER_IS_BETTER else 'lower'} is better)"
    if all(line["step"] in plans[line["arm"]].steps.values() for line in results):
        figure = _draw_ends(study, plans, results, measure, label)
    else:
        figure = _draw_curves(study, plans, results, measure, label)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_aside(path, buffer.getvalue())


def _draw_ends(study: Study, plans: dict[str, ArmPlan], results: list[dict[str, Any]], measure: str, label: str) -> Figure:
    """All arms at the end of each budget, one under the other; small dots are seeds."""
    figure = Figure((1.5 + 4.5 * len(study.budgets), 1.2 + 0.35 * len(study.arms)), layout="constrained")
    panels = figure.subplots(1, len(study.budgets), sharex=True, sharey=True, squeeze=False)[0]
    arms = list(study.arms)
    for budget, axes in zip(study.budgets, panels, strict=True):
        for place, arm in enumerate(arms):
            step, colour = plans[arm].steps[budget], COLOURS[place % len(COLOURS)]
            spread = at_budget(results, arm, step, measure)
            if spread is None:
                continue
            seeds = [line[measure] for line in results if (line["arm"], line["step"]) == (arm, step) and not line.get("diverged")]
            axes.plot(seeds, [place] * len(seeds), ".", color=colour, alpha=0.5, markersize=5)
            bar = spread.deviation if spread.seeds > 1 else 0.0
            axes.errorbar([spread.mean], [place], xerr=[bar], color=colour, marker="o", markersize=6, capsize=3)
        axes.set_title(EQUAL[budget], fontsize=10)
        _dress(axes)
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].set_ylim(len(arms) - 0.4, -0.6)  # the first on top, and no marker at the frame
    figure.supxlabel(label, fontsize=10)
    return figure


def _draw_curves(study: Study, plans: dict[str, ArmPlan], results: list[dict[str, Any]], measure: str, label: str) -> Figure:
    """By each budget, up to its end, one line an arm."""
    figure = Figure((2 + 4.5 * len(study.budgets), 4.2), layout="constrained")
    for budget, axes in zip(study.budgets, figure.subplots(1, len(study.budgets), squeeze=False)[0], strict=True):
        for number, arm in enumerate(study.arms):
            _draw_arm(axes, budget, plans[arm], results, arm, measure, number)
        axes.set_xlabel(AXES[budget][0])
        axes.set_ylabel(label)
        _dress(axes)
    figure.axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def _draw_arm(axes: Axes, budget: Budget, plan: ArmPlan, results: list[dict[str, Any]], arm: str, measure: str, number: int) -> None:
    """Only readings within the budget: behind it no other arm would be there to compare with."""
    steps = sorted(
        {
            line["step"]
            for line in results
            if line["arm"] == arm and line["step"] <= plan.steps.get(budget, math.inf) and not line.get("diverged")
        }
    )
    spreads = [(step, spread) for step in steps if (spread := at_budget(results, arm, step, measure))]
    if not spreads:
        return
    x = [plan.cost(budget, step) / AXES[budget][1] for step, _ in spreads]
    y = [spread.mean for _, spread in spreads]
    bars = [spread.deviation if spread.seeds > 1 else 0.0 for _, spread in spreads]
    colour = COLOURS[number % len(COLOURS)]
    # Arms with an end alone lie above each other: hollow, so that each is seen.
    look = {"markersize": 5} if len(x) > 1 else {"markersize": 8, "markerfacecolor": "none"}
    axes.errorbar(x, y, bars, color=colour, marker=MARKERS[number % len(MARKERS)], capsize=3, linewidth=1.4, label=arm, **look)


def _dress(axes: Axes) -> None:
    axes.grid(linewidth=0.5, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
