"""`microdit evaluate --watch`: each new checkpoint of a run is evaluated, and its quality plotted against what it has cost.

OUT/step-00000500/   one evaluation
OUT/quality.html     all of them: every metric against images seen, GPU-hours and, where a price is known, dollars
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from microdit.checkpoint import Checkpoint, checkpoint_folders, default_weights, open_checkpoint
from microdit.cli.terminal import console, warn
from microdit.data.sources.base import Source
from microdit.distributed import World
from microdit.errors import UserError
from microdit.evaluation.evaluate import Question, evaluate
from microdit.evaluation.generators import Compute, DrawSettings, RunPainter
from microdit.evaluation.metrics.registry import METRICS, label
from microdit.io.console import styled
from microdit.io.files import write_aside
from microdit.io.text import parse_json
from microdit.pipelines.load import opened_run
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.reports.curves import Curve, draw_points
from microdit.reports.html import page_template
from microdit.reports.run_folder import RunFolder, is_run, state_of

TEMPLATE = "quality.html.jinja"
PAUSE = 10.0  # seconds between two looks at the run
COSTS = {"images_seen": "images seen", "gpu_hours": "GPU-hours", "dollars": "dollars"}


def watch_run(run: Path, reference: Source, question: Question, settings: DrawSettings, out: Path, world: World, compute: Compute) -> Path:
    """Until the run has ended and all of its checkpoints are evaluated; those that are already there stay. Returns the page.

    Every process must call this. Raises UserError if there is no run, or it has ended without a checkpoint.
    """
    if not is_run(run):
        raise UserError(f"{run} is no run folder: there is no recipe.yaml in it. --watch needs what 'microdit train' writes.")
    page, waiting = out / "quality.html", False
    said: set[str] = set()

    def warn_once(sentence: str) -> None:
        if sentence not in said:
            warn(sentence)
        said.add(sentence)

    while True:
        ended = state_of(RunFolder(run).status) != "running"  # asked before the folder is read: a last checkpoint is not missed
        checkpoint = world.share(next_checkpoint(run, out, settings.weights, warn_once) if world.is_main else None)
        if checkpoint is not None:
            waiting = False
            console.print(styled(f"Step {checkpoint.step:,}"))
            painter = open_watched(run, checkpoint, settings, world, compute)
            if painter is None:
                warn(f"{checkpoint.folder} was deleted before it could be read: record.keep_every keeps checkpoints.")
                continue
            evaluate(painter, reference, question, settings, out / checkpoint.folder.name, world)
            if world.is_main:
                _write_page(page, run, out)
        elif world.share(ended):
            break
        else:
            if not waiting:
                console.print("Waiting for the next checkpoint; Ctrl-C ends the watch, and the same command goes on.")
            waiting = True
            time.sleep(PAUSE)
    if world.share(not page.is_file()):
        raise UserError(f"{run} has ended without a checkpoint that holds whole weights: there is nothing to evaluate.")
    return page


def next_checkpoint(run: Path, out: Path, weights: str | None, warn: Callable[[str], None]) -> Checkpoint | None:
    """The oldest one that is whole and not evaluated. Damaged ones are passed over with a sentence, those that vanish without."""
    for folder in reversed(checkpoint_folders(run)):
        if _result(out / folder.name / "metrics.json"):
            continue
        try:
            checkpoint = open_checkpoint(folder)
            name = weights or default_weights(checkpoint)
            if damaged := checkpoint.damage_of(name):
                raise UserError(f"{folder} is damaged ({', '.join(damaged)}: not what was written).")
            if name in checkpoint.weights:
                return checkpoint
        except UserError as error:
            if folder.is_dir():
                warn(str(error))
    return None


def open_watched(run: Path, checkpoint: Checkpoint, settings: DrawSettings, world: World, compute: Compute) -> RunPainter | None:
    """None on all processes if the trainer has deleted it in the meantime."""
    painter = None
    try:
        opened = opened_run(run, MicroDiTPipeline.from_checkpoint(checkpoint, settings.weights), checkpoint)
        painter = RunPainter(opened, settings, warn, compute)
    except UserError:
        if checkpoint.folder.is_dir():
            raise
    return painter if all(world.gather(painter is not None)) else None


def _write_page(path: Path, run: Path, out: Path) -> None:
    read = {file: _result(file) for file in sorted(out.glob("step-*/metrics.json"))}
    found = [file for file, result in read.items() if result]
    results = [read[file] for file in found]
    names = [name for name in METRICS if any(name in result["metrics"] for result in results)]
    curves = [curve for name in names for cost in COSTS if (curve := _curve(name, cost, results))]
    rows = [(file.parent.name, result) for file, result in zip(found, results, strict=True)]
    page = page_template(TEMPLATE).render(title=str(run), names=names, rows=rows, curves=curves, written=time.time())
    write_aside(path, page.encode(errors="replace"))


def _result(file: Path) -> dict[str, Any]:
    """What an evaluation has written; empty if there is none, or it is damaged, so that it is made anew."""
    try:
        result = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) and isinstance(result.get("metrics"), dict) else {}


def _curve(name: str, cost: str, results: list[dict[str, Any]]) -> Curve | None:
    """None where the cost is not known."""
    known = sorted(
        ((r[cost], r["metrics"][name]) for r in results if r.get(cost) is not None and name in r["metrics"]), key=lambda pair: pair[0]
    )
    if not known:
        return None
    x, entries = [x for x, _ in known], [entry for _, entry in known]
    y, low, high = ([entry[key] for entry in entries] for key in ("value", "low", "high"))
    metric = METRICS[name]
    better = "Lower" if metric.lower_is_better else "Higher"
    title = f"{label(name, entries[0]['network'])} ({entries[0]['network']}) by {COSTS[cost]}"
    return draw_points(title, COSTS[cost], label(name, entries[0]["network"]), x, y, low, high, f"{better} is better. Bars: 95% intervals.")
