"""`microdit lab report`: a study's results as Markdown with figures, for docs/lab/."""

import shlex
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from microdit.errors import UserError
from microdit.formats import figure
from microdit.grids import save_png
from microdit.lab.plan import ArmPlan
from microdit.lab.plots import EQUAL, draw_study
from microdit.lab.study import HIGHER_IS_BETTER, Budget, Study
from microdit.lab.summary import Spread, Verdict, at_budget, diverged, judge, jumped
from microdit.markdown import code, plain
from microdit.recipe import Recipe

TITLES = {
    "held_out_loss": "Held-out loss",
    "frechet_distance": "Frechet distance, EfficientNet-Lite0",
    "kid": "KID, EfficientNet-Lite0",
    "recognised": "Recognised among the 10 nearest",
}
ANSWERS = {True: "holds", False: "does not hold", None: "open"}


def write_report(
    study: Study, recipes: dict[str, Recipe], plans: dict[str, ArmPlan], results: list[dict[str, Any]], out: Path, folder: Path
) -> Path:
    """`folder`/README.md, its figures, and the results themselves. `out` is where the study was run. Returns the page.

    Raises UserError if the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be the report's folder: {error.strerror}. Choose another --to.") from error
    for measure in study.measures:
        draw_study(study, plans, results, measure, TITLES[measure], folder / f"{measure}.png")
    strips = _join_strips(study, plans, out, folder / "strips.png")
    for name in ("plan.json", "results.jsonl"):
        if out.resolve() != folder.resolve():
            shutil.copyfile(out / name, folder / name)
    parts = [_head(study, recipes, plans, results, folder), _claims(judge(study, plans, results))]
    parts += [_table(study, plans, results, budget) for budget in study.budgets]
    parts += [f"![{TITLES[measure]} against cost]({measure}.png)" for measure in study.measures]
    if strips:
        equal = EQUAL[study.budgets[0]]
        parts.append(f"The same prompts from the same noise, seed {study.seeds[0]}, at {equal}:\n\n![samples of each arm](strips.png)")
    page = folder / "README.md"
    page.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return page


def _head(study: Study, recipes: dict[str, Recipe], plans: dict[str, ArmPlan], results: list[dict[str, Any]], folder: Path) -> str:
    plan, steps = plans[study.reference.arm], study.reference.steps
    flops, seconds = steps * plan.flops_per_step, steps * plan.seconds_per_step
    number = len({line["seed"] for line in results})
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
    run, report = f"microdit lab run {file}", f"microdit lab report {file} --out {shlex.quote(folder.as_posix())}"
    sampler = f"{study.pictures} pictures, {study.num_inference_steps} steps, guidance {figure(study.guidance_scale)}"
    lines = [
        f"# {plain(study.name)}: {plain(study.question)}",
        f"Each arm is read at equal cost, {budgets} that {code(study.reference.arm)} takes for {steps:,} steps. {seeds}; "
        f"{_same_luck(recipes)}. Averaged weights; {sampler}; nothing is masked when quality is measured. "
        "± is one standard deviation over seeds.",
        f"Made by {code(run)} and {code(report)}.",
        study.notes,
    ]
    return "\n\n".join([*(line for line in lines if line), *(f"**{one}.**" for one in lost), *_jumps(results)])


def _same_luck(recipes: dict[str, Recipe]) -> str:
    """What one seed gives all arms alike: draws depend on the seed, the step and the sample's place in the batch."""
    if len({phase.batch_size for recipe in recipes.values() for phase in recipe.phases}) > 1:
        return "samples in the same order for every arm; arms with another batch draw other noise"
    if len({(*recipe.data.sets, *sorted({str(phase.weights) for phase in recipe.phases})) for recipe in recipes.values()}) > 1:
        return "the same noise for every arm, the data being what differs"
    return "the same samples, noise and captions for every arm"


def _jumps(results: list[dict[str, Any]]) -> list[str]:
    """Such runs are in the means: an arm that is easily lost is worse for it. But who reads the means should know."""
    lines = [
        f"{plain(line['arm'])}, seed {line['seed']}, at step {line['step']:,}: {line['held_out_loss']:.3f}" for line in jumped(results)
    ]
    return [f"**Their held-out loss had jumped, and is far above that of the arm's other seeds:** {'; '.join(lines)}."] if lines else []


def _claims(verdicts: list[Verdict]) -> str:
    """The table that people look for first."""
    rows = [f"| {' | '.join(claim_cells(verdict))} |" for verdict in verdicts]
    return "\n".join(["| claim | measured here | holds? |", "|---|---|---|", *rows]) if rows else ""


def claim_cells(verdict: Verdict) -> list[str]:
    """The claim, what was measured, and whether it holds."""
    claim, found = verdict.claim, verdict.why
    if verdict.better and verdict.worse:
        found = f"{TITLES[claim.measure]}: {claim.better} {_words(verdict.better)}, {claim.worse} {_words(verdict.worse)}; {verdict.why}"
    return [plain(claim.says), plain(found), f"**{ANSWERS[verdict.holds]}** ({EQUAL[claim.budget]})"]


def _table(study: Study, plans: dict[str, ArmPlan], results: list[dict[str, Any]], budget: Budget) -> str:
    rows = [f"### {EQUAL[budget].replace('equal', 'Equal')}", ""]
    timed = "seconds" in study.budgets
    heads = ["arm", "steps", "GFLOPs a step", *(["ms a step"] if timed else []), *(TITLES[measure] for measure in study.measures)]
    rows += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    found = {arm: [at_budget(results, arm, plan.steps[budget], measure) for measure in study.measures] for arm, plan in plans.items()}
    for arm in study.arms:
        plan, cells = plans[arm], []
        for column, spread in enumerate(found[arm]):
            others = [values[column].mean for values in found.values() if values[column]]  # type: ignore[union-attr]
            best = (max if study.measures[column] in HIGHER_IS_BETTER else min)(others) if others else None
            words = "–" if spread is None else _words(spread)
            cells.append(f"**{words}**" if spread is not None and spread.mean == best else words)
        costs = [f"{plan.steps[budget]:,}", f"{plan.flops_per_step / 1e9:.1f}", *([f"{plan.seconds_per_step * 1e3:.1f}"] if timed else [])]
        rows.append(f"| {' | '.join([plain(arm), *costs, *cells])} |")
    return "\n".join(rows)


def _words(spread: Spread) -> str:
    return figure(spread.mean, 3) + (f" ± {figure(spread.deviation, 2)}" if spread.seeds > 1 else " (one seed)")


def _join_strips(study: Study, plans: dict[str, ArmPlan], out: Path, path: Path) -> bool:
    """The strips of the first seed at the end of the first budget, one under the other. Without them, a picture made earlier stays."""
    names = [out / "strips" / f"{arm}-{study.seeds[0]}-{plans[arm].steps[study.budgets[0]]}.png" for arm in study.arms]
    strips = [Image.open(name) for name in names if name.is_file()]
    if not strips:
        return path.is_file()
    joined = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        joined.paste(strip, (0, top))
        top += strip.height
    save_png(joined, path)
    return True
