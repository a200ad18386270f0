"""`microdit lab report`: a study's results as Markdown with figures: means and spreads at equal budgets, and whether claims hold."""

import io
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from microdit.config.schema import Recipe
from microdit.errors import UserError
from microdit.io.files import write_aside
from microdit.io.untrusted_text import code, plain
from microdit.lab.claims import CLEAR, MOST_SEEDS, ClaimResult, Spread, at_budget, check_claims, diverged, holm, jumped
from microdit.lab.equal_cost import ArmPlan
from microdit.lab.study import HIGHER_IS_BETTER, Budget, Study
from microdit.reports.formats import duration, figure
from microdit.reports.grids import save_png

AFFORDABLE = 2 * 3600  # seconds on the study's device that deciding a claim may take
TITLES = {
    "held_out_loss": "Held-out loss",
    "frechet_distance": "Frechet distance, EfficientNet-Lite0",
    "kid": "KID, EfficientNet-Lite0",
    "recognised": "Recognised among the 10 nearest, EfficientNet-Lite0",
    "recognised_pixels": "Recognised among the 10 nearest, raw pixels",
    "frechet_distance_classifier": "Frechet distance, classifier of pictures",
    "recognised_classifier": "Recognised among the 10 nearest, classifier of pictures",
}
COLOURS = ("#1f5fbf", "#c2500a", "#14713a", "#7a3fb0", "#b3261e", "#5d6675", "#008b8b", "#b8860b", "#d6338a", "#3b3b3b")
MARKERS = "osD^vPX*<>"
AXES: dict[Budget, tuple[str, float]] = {
    "flops": ("TFLOPs of training", 1e12),
    "seconds": ("seconds of training", 1.0),
    "images": ("batches of training", 1.0),
}
EQUAL: dict[Budget, str] = {"flops": "equal FLOPs", "seconds": "equal seconds", "images": "equal images"}


def write_report(
    study: Study,
    recipes: dict[str, Recipe],
    plans: dict[str, ArmPlan],
    results: list[dict[str, Any]],
    device: str,
    out: Path,
    folder: Path,
) -> Path:
    """Write `folder`/README.md with figures and a copy of the results, and return the page. `out` is where the study was run, on `device`.

    Raises UserError if `folder` cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The report's folder {folder} cannot be created: {error.strerror}. Choose another --to.") from error
    for measure in study.measures:
        draw_study(study, plans, results, measure, TITLES[measure], folder / f"{measure}.png")
    strips = _join_strips(study, plans, out, folder / "strips.png")
    for name in ("plan.json", "results.jsonl"):
        if out.resolve() != folder.resolve():
            shutil.copyfile(out / name, folder / name)
    parts = [_head(study, recipes, plans, results, device, folder), _claims(check_claims(study, plans, results))]
    parts += [_table(study, plans, results, budget) for budget in study.budgets]
    parts += [f"![{TITLES[measure]} against cost]({measure}.png)" for measure in study.measures]
    if strips:
        equal = EQUAL[study.budgets[0]]
        parts.append(f"Samples for the same prompts and noise, seed {study.seeds[0]}, at {equal}:\n\n![samples of each arm](strips.png)")
    page = folder / "README.md"
    page.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return page


def _head(
    study: Study, recipes: dict[str, Recipe], plans: dict[str, ArmPlan], results: list[dict[str, Any]], device: str, folder: Path
) -> str:
    plan, steps = plans[study.reference.arm], study.reference.steps
    flops, seconds = steps * plan.flops_per_step, steps * plan.seconds_per_step
    ends = [at_budget(results, arm, plans[arm].steps[budget], study.measures[0]) for arm in study.arms for budget in study.budgets]
    number = max((spread.seeds for spread in ends if spread), default=1)  # the latest seed may not have come that far
    seeds = f"{number} seeds" if number > 1 else "One seed"
    lost = [
        f"{plain(arm)} diverged for seed {line['seed']} before step {line['step']:,}"
        for arm in study.arms
        for line in diverged(results, arm)
    ]
    words: dict[Budget, str] = {
        "flops": f"the FLOPs ({figure(flops / 1e12, 3)} T)",
        "seconds": f"the seconds ({figure(seconds, 3)}, all arms timed in turns)",
        "images": "the images",
    }
    budgets = ", ".join(words[budget] for budget in study.budgets)
    file = shlex.quote(f"recipes/lab/{study.name}.yaml")
    where = "a CPU" if device == "CPU" else plain(device)
    reduced = " --device cpu" if device == "CPU" and study.on_cpu else ""
    run, report = f"microdit lab run {file}{reduced}", f"microdit lab report {file} --out {shlex.quote(folder.as_posix())}"
    sampler = f"{study.pictures} images, {study.num_inference_steps} steps, guidance {figure(study.guidance_scale)}"
    lines = [
        f"# {plain(study.name)}: {plain(study.question)}",
        f"Arms are compared at equal cost: {budgets} that {code(study.reference.arm)} takes for {steps:,} steps on {where}. "
        f"{seeds}, with "
        f"{_shared_randomness(recipes)}. Quality is measured on EMA weights without masking, with {sampler}. "
        "± is one standard deviation over seeds.",
        f"Generated by {code(run)} and {code(report)}.",
        study.notes,
    ]
    return "\n\n".join([*(line for line in lines if line), *(f"**{one}.**" for one in lost), *_jumps(results)])


def _shared_randomness(recipes: dict[str, Recipe]) -> str:
    """Describe what a seed fixes for all arms. Noise depends on the seed, the step and the sample's place in the batch."""
    if len({phase.batch_size for recipe in recipes.values() for phase in recipe.phases}) > 1:
        return "samples in the same order for every arm, and other noise for arms with another batch size"
    if len({(*recipe.data.sets, *sorted({str(phase.weights) for phase in recipe.phases})) for recipe in recipes.values()}) > 1:
        return "the same noise for every arm and different data"
    return "the same samples, noise and captions for every arm"


def _jumps(results: list[dict[str, Any]]) -> list[str]:
    """List runs whose loss had jumped. They are part of the means, since an arm that is easily lost is a worse arm."""
    lines = [
        f"{plain(line['arm'])}, seed {line['seed']}, at step {line['step']:,}: {line['held_out_loss']:.3f}" for line in jumped(results)
    ]
    return [f"**The held-out loss had jumped far above that of the arm's other seeds:** {'; '.join(lines)}."] if lines else []


def _claims(outcomes: list[ClaimResult]) -> str:
    """Return the table of claims and their outcomes."""
    corrected = holm([outcome.chance for outcome in outcomes])
    rows = [f"| {' | '.join(claim_cells(outcome, chance))} |" for outcome, chance in zip(outcomes, corrected, strict=True)]
    return "\n".join(["| claim | measured here | holds? |", "|---|---|---|", *rows]) if rows else ""


def claim_cells(outcome: ClaimResult, corrected: float | None) -> list[str]:
    """Return a table row: the claim, what was measured, and whether it holds. `corrected` is the p-value corrected for their number."""
    claim, found = outcome.claim, outcome.why
    if outcome.better and outcome.worse:
        arms = f"{claim.better} {_spread_text(outcome.better)}, {claim.worse} {_spread_text(outcome.worse)}"
        found = f"{TITLES[claim.measure]}: {arms}; {outcome.why}"
    return [plain(claim.says), plain(found), f"{_verdict(outcome, corrected)} ({EQUAL[claim.budget]})"]


def _verdict(outcome: ClaimResult, corrected: float | None) -> str:
    """Return whether the claim holds, before and after correction; or how many seeds would decide it, and whether that is affordable."""
    if outcome.holds is not None:
        assert corrected is not None
        after = "" if corrected < CLEAR else ", not clear after correction"
        return f"**{'holds' if outcome.holds else 'does not hold'}**, p = {corrected:.2g} corrected{after}"
    needed = outcome.needed
    if needed is None:
        return "**not decidable**: an arm diverges"
    size = f"a difference of {needed.difference:.1%} ({needed.origin})"
    if outcome.excluded:
        return f"**does not show**: {size} lies outside the 95% interval"
    if needed.seeds is None or needed.seconds is None:
        return f"**not decidable at this size**: {size} needs over {MOST_SEEDS:,} seeds"
    cost = f"{needed.seeds:,} seeds for {size}, {duration(needed.seconds)} of training"
    return f"**open**: {cost}" if needed.seconds <= AFFORDABLE else f"**not decidable at this size**: {cost}"


def _table(study: Study, plans: dict[str, ArmPlan], results: list[dict[str, Any]], budget: Budget) -> str:
    rows = [f"### {EQUAL[budget].replace('equal', 'Equal')}", ""]
    timed = "seconds" in study.budgets
    heads = ["arm", "steps", "GFLOPs per step", *(["ms per step"] if timed else []), *(TITLES[measure] for measure in study.measures)]
    rows += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    found = {arm: [at_budget(results, arm, plan.steps[budget], measure) for measure in study.measures] for arm, plan in plans.items()}
    for arm in study.arms:
        plan, cells = plans[arm], []
        for column, spread in enumerate(found[arm]):
            others = [values[column].mean for values in found.values() if values[column]]  # type: ignore[union-attr]
            best = (max if study.measures[column] in HIGHER_IS_BETTER else min)(others) if others else None
            words = "–" if spread is None else _spread_text(spread)
            cells.append(f"**{words}**" if spread is not None and spread.mean == best else words)
        costs = [f"{plan.steps[budget]:,}", f"{plan.flops_per_step / 1e9:.1f}", *([f"{plan.seconds_per_step * 1e3:.1f}"] if timed else [])]
        rows.append(f"| {' | '.join([plain(arm), *costs, *cells])} |")
    return "\n".join(rows)


def _spread_text(spread: Spread) -> str:
    return figure(spread.mean, 3) + (f" ± {figure(spread.deviation, 2)}" if spread.seeds > 1 else " (one seed)")


def _join_strips(study: Study, plans: dict[str, ArmPlan], out: Path, path: Path) -> bool:
    """Stack the strips of the first seed at the end of the first budget. Without any, an existing image is kept."""
    names = [out / "strips" / f"{arm}-{study.seeds[0]}-{plans[arm].steps[study.budgets[0]]}.png" for arm in study.arms]
    strips = [_read_strip(name) for name in names if name.is_file()]
    if not strips:
        return path.is_file()
    joined = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        joined.paste(strip, (0, top))
        top += strip.height
    save_png(joined, path)
    return True


def _read_strip(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a complete PNG file ({error}): delete it, and the report leaves it out.") from error
    return image


def draw_study(study: Study, plans: dict[str, ArmPlan], results: list[dict[str, Any]], measure: str, title: str, path: Path) -> None:
    """Draw a panel for each budget: quality against cost if it was measured on the way, else arm beside arm.

    An error bar is one standard deviation over seeds.
    """
    label = f"{title} ({'higher' if measure in HIGHER_IS_BETTER else 'lower'} is better)"
    if all(line["step"] in plans[line["arm"]].steps.values() for line in results):
        figure = _draw_ends(study, plans, results, measure, label)
    else:
        figure = _draw_curves(study, plans, results, measure, label)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_aside(path, buffer.getvalue())


def _draw_ends(study: Study, plans: dict[str, ArmPlan], results: list[dict[str, Any]], measure: str, label: str) -> Figure:
    """Draw all arms at the end of each budget, one below the other. Small dots are single seeds."""
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
    panels[0].set_ylim(len(arms) - 0.4, -0.6)  # the first arm on top, and no marker on the frame
    figure.supxlabel(label, fontsize=10)
    return figure


def _draw_curves(study: Study, plans: dict[str, ArmPlan], results: list[dict[str, Any]], measure: str, label: str) -> Figure:
    """Draw quality against each budget, with a line per arm."""
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
    """Draw an arm's results within the budget; beyond it there is no other arm to compare with."""
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
    # Single points of several arms may coincide, so they are hollow.
    look = {"markersize": 5} if len(x) > 1 else {"markersize": 8, "markerfacecolor": "none"}
    axes.errorbar(x, y, bars, color=colour, marker=MARKERS[number % len(MARKERS)], capsize=3, linewidth=1.4, label=arm, **look)


def _dress(axes: Axes) -> None:
    axes.grid(linewidth=0.5, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
