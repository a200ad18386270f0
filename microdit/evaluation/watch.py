"""`microdit evaluate --watch`: evaluate each new checkpoint of a run while it trains, and plot quality against cost.

OUT/step-00000500/   the evaluation of one checkpoint
OUT/quality.html     every metric against images seen, GPU-hours and, where a price is known, dollars
"""

import time
from collections.abc import Callable
from pathlib import Path

from microdit.checkpoint import Checkpoint, checkpoint_folders, default_weights, open_checkpoint
from microdit.data.sources.base import Source
from microdit.distributed import World
from microdit.errors import UserError
from microdit.evaluation.evaluate import EvaluationSettings, evaluate
from microdit.evaluation.generators import Compute, DrawSettings, RunGenerator
from microdit.evaluation.html_report import read_evaluation, write_quality_page
from microdit.io.console import QUIET, Reporter, styled
from microdit.pipelines.open_model import opened_run
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.reports.run_folder import RunFolder, is_run, state_of

PAUSE = 10.0  # seconds between two looks at the run


def watch_run(
    run: Path,
    reference: Source,
    evaluation: EvaluationSettings,
    settings: DrawSettings,
    out: Path,
    world: World,
    compute: Compute,
    reporter: Reporter = QUIET,
    refresh: Callable[[], object] = lambda: None,
) -> Path:
    """Evaluate checkpoints until the run has ended and all of them are done; return the page that plots them.

    Finished evaluations are kept. `refresh`, called by the first process before each look, brings the copy of a remote run up to date: its
    record and its newest checkpoint. Every process must call this. Raises UserError if `run` is not a run folder, or if it ended without
    a checkpoint.
    """
    if not is_run(run):
        raise UserError(f"{run} is not a run folder: it has no recipe.yaml. --watch needs a folder that 'microdit train' writes.")
    page, waiting = out / "quality.html", False
    said: set[str] = set()

    def warn_once(sentence: str) -> None:
        if sentence not in said:
            reporter.warn(sentence)
        said.add(sentence)

    while True:
        world.look(refresh)
        ended = state_of(RunFolder(run).status) != "running"  # asked before the folder is listed, so that the last checkpoint is seen
        checkpoint = world.share(next_checkpoint(run, out, settings.weights, warn_once) if world.is_main else None)
        if checkpoint is not None:
            waiting = False
            reporter.say(styled(f"Step {checkpoint.step:,}"))
            generator = open_watched(run, checkpoint, settings, world, compute, reporter)
            if generator is None:
                reporter.warn(f"{checkpoint.folder} was deleted before it could be read: record.keep_every keeps checkpoints.")
                continue
            evaluate(generator, reference, evaluation, settings, out / checkpoint.folder.name, world, reporter)
            if world.is_main:
                write_quality_page(page, run, out)
        elif world.share(ended):
            break
        else:
            if not waiting:
                reporter.say("Waiting for the next checkpoint. Ctrl-C stops watching; the same command continues.")
            waiting = True
            time.sleep(PAUSE)
    if world.share(not page.is_file()):
        raise UserError(f"{run} ended without a checkpoint that holds complete weights: there is nothing to evaluate.")
    return page


def next_checkpoint(run: Path, out: Path, weights: str | None, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the oldest intact checkpoint without an evaluation, or None.

    Damaged checkpoints are skipped with a warning. Those that the trainer deletes meanwhile are skipped silently.
    """
    for folder in reversed(checkpoint_folders(run)):
        if read_evaluation(out / folder.name / "metrics.json"):
            continue
        try:
            checkpoint = open_checkpoint(folder)
            name = weights or default_weights(checkpoint)
            if damaged := checkpoint.damage_of(name):
                raise UserError(f"{folder} is damaged ({', '.join(damaged)}: missing, or its checksum differs).")
            if name in checkpoint.weights:
                return checkpoint
        except UserError as error:
            if folder.is_dir():
                warn(str(error))
    return None


def open_watched(
    run: Path, checkpoint: Checkpoint, settings: DrawSettings, world: World, compute: Compute, reporter: Reporter = QUIET
) -> RunGenerator | None:
    """Load the checkpoint; return None on all processes if the trainer has deleted it meanwhile."""
    generator = None
    try:
        opened = opened_run(run, MicroDiTPipeline.from_checkpoint(checkpoint, settings.weights), checkpoint)
        generator = RunGenerator(opened, settings, reporter.warn, compute)
    except UserError:
        if checkpoint.folder.is_dir():
            raise
    return generator if all(world.gather(generator is not None)) else None
