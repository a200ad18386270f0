"""Figures of a study for its report: quality against cost, one line an arm, with the spread over seeds."""

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
AXES: dict[Budget, tuple[str, float]] = {"flops": ("TFLOPs of training", 1e12), "seconds": ("seconds of training", 1.0)}


def draw_study(study: Study, plans: dict[str, ArmPlan], results: list[dict[str, Any]], measure: str, title: str, path: Path) -> None:
    """Two panels, by FLOPs and by seconds, up to each budget; a bar is one standard deviation over seeds."""
    figure = Figure((11, 4.2), layout="constrained")
    for budget, axes in zip(AXES, figure.subplots(1, 2), strict=True):
        for number, arm in enumerate(study.arms):
            _draw_arm(axes, budget, plans[arm], results, arm, measure, number)
        label, _ = AXES[budget]
        axes.set_xlim(left=0)  # else equal costs, which differ by a rounded step, look far apart
        axes.set_xlabel(label)
        axes.set_ylabel(f"{title} ({'higher' if measure in HIGHER_IS_BETTER else 'lower'} is better)")
        axes.grid(linewidth=0.5, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_aside(path, buffer.getvalue())


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
    axes.errorbar(x, y, bars, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=5, capsize=3, linewidth=1.4, label=arm)
