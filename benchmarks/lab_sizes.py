"""How the best size of a model grows with the budget, by the study of sizes, beside the two rules of `microdit budget --dollars`.

    python benchmarks/lab_sizes.py                   # of docs/lab/size
    python benchmarks/lab_sizes.py --results DIR     # of another study that was run

At each budget the mean held-out loss of the arms is taken as a parabola in the logarithm of the size, and its lowest point is the best
size, if it lies between the arms; through the best sizes of all budgets goes a power law (as Hoffmann et al. 2022, 2203.15556, in their
second approach). A size is that of a dense transformer of the same FLOPs a picture, as in planning/phases.py.
"""

import argparse
import math
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from microdit.lab.equal_cost import ArmPlan, read_plan
from microdit.lab.run_study import read_results
from microdit.lab.study import load_study
from microdit.planning.phases import LARGE, equivalent_size, paper_flops, target_size

PROJECT = Path(__file__).parents[1]
PATCHES = 64  # of the studies' 8 x 8 latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=PROJECT / "docs" / "lab" / "size")
    out = parser.parse_args().results
    study, recipes = load_study("size")
    plans, results = read_plan(out), read_results(out)
    sizes = {arm: plans[arm].flops_per_step / (recipes[arm].phases[0].batch_size * 6 * PATCHES) for arm in study.arms}
    print("| FLOPs | " + " | ".join(f"{arm}, {size / 1e6:.2f} M" for arm, size in sizes.items()) + " | best size |")
    print("|---|" + "---|" * (len(sizes) + 1))
    found: list[tuple[float, float]] = []
    for share in study.readings:
        flops = share * plans[study.reference.arm].flops_per_step * study.reference.steps
        losses = {arm: mean(loss_of(results, plans[arm], arm, seed, share) for seed in study.seeds) for arm in sizes}
        best = best_size(list(sizes.values()), list(losses.values()))
        print(f"| {flops:.2e} | {' | '.join(f'{loss:.3f}' for loss in losses.values())} | {in_words(best, sizes)} |")
        found += [(flops, best)] if best is not None and min(sizes.values()) <= best <= max(sizes.values()) else []
    compare(found)


def loss_of(results: list[dict[str, Any]], plan: ArmPlan, arm: str, seed: int, share: float) -> float:
    """The held-out loss at that share of the budget."""
    step = max(1, round(share * plan.steps["flops"]))
    [line] = [line for line in results if (line["arm"], line["seed"], line["step"]) == (arm, seed, step)]
    return float(line["held_out_loss"])


def best_size(sizes: list[float], losses: list[float]) -> float | None:
    """Where the parabola through loss against log size is lowest. None if it has no lowest point."""
    square, slope, _ = np.polyfit(np.log(sizes), losses, 2)
    return math.exp(-slope / (2 * square)) if square > 0 else None


def power_law(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(factor, exponent) of size = factor x FLOPs^exponent, through (FLOPs, size)."""
    exponent, log_factor = np.polyfit([math.log(flops) for flops, _ in points], [math.log(size) for _, size in points], 1)
    return math.exp(log_factor), float(exponent)


def in_words(best: float | None, sizes: dict[str, float]) -> str:
    if best is None:
        return "none"
    return "below the arms" if best < min(sizes.values()) else "above the arms" if best > max(sizes.values()) else f"{best / 1e6:.2f} M"


def compare(found: list[tuple[float, float]]) -> None:
    print()
    if len(found) < 2:
        print("Fewer than two budgets have a best size between the arms: no law.")
        return
    factor, exponent = power_law(found)
    print(f"Best size = {factor:.3g} x FLOPs^{exponent:.2f}, through {len(found)} budgets.")
    paper = (paper_flops(LARGE), equivalent_size(LARGE))
    for flops, size in found:
        rules = target_size(flops, *paper)
        by_rules = (
            f"{rules.by_fit / 1e6:.2f} M by the fit of 2410.08184, {rules.by_paper / 1e6:.2f} M from the published run by the square root"
        )
        print(f"{flops:.2e} FLOPs: {size / 1e6:.2f} M here; {by_rules}.")
    asked = factor * paper[0] ** exponent
    print(f"At the {paper[0]:.2e} FLOPs of the published run it would ask for {asked / 1e6:,.0f} M; that has {paper[1] / 1e6:,.0f} M.")


if __name__ == "__main__":
    main()
