"""`microdit lab run`: train every arm of a study for every seed, and measure quality at equal cost. Resumes where it was interrupted.

    OUT/plan.json                    the cost of a step of each arm, and the steps that each budget buys
    OUT/results.jsonl                a line per measurement: arm, seed, step, FLOPs, seconds and quality metrics, with its checksum
    OUT/strips/ARM-SEED-STEP.png     images of fixed prompts from fixed noise
    OUT/runs/ARM/seed-N/             run folders, deleted once all measurements of an arm are taken, unless --keep

All arms see the same samples, noise and mask randomness, which depend only on the seed, the step and the sample's place in the batch.
Several processes may share a study: each claims an arm and seed that no other is training. OUT/.lock lets one process time the arms while
the others wait.
"""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from microdit.config.schema import Recipe
from microdit.data.dataset import EncodedDataset
from microdit.distributed import World
from microdit.errors import EXIT_BY_USER, EXIT_RESTART, DivergedError, StoppedError
from microdit.io.console import QUIET, PlainConsole, Reporter
from microdit.io.files import from_checked_json, keep_damaged, to_checked_lines, write_aside
from microdit.io.locks import claimed, in_turn, sole_writer
from microdit.lab.equal_cost import ArmPlan, make_plan
from microdit.lab.quality import QualityEvaluator
from microdit.lab.study import MEASURES, Study, is_scheduled, stretched
from microdit.reports.grids import draw_grid, save_png
from microdit.training.trainer import Trainer

RESULTS = "results.jsonl"
COSTS = ("flops", "seconds")


def run_study(study: Study, recipes: dict[str, Recipe], out: Path, world: World, keep: bool = False, reporter: Reporter = QUIET) -> None:
    """Train and measure the study's arms that have no results in `out` yet. An arm that diverges is recorded as such.

    `recipes` may hold further arms, such as those that were run before.

    Raises UserError if `out` holds results of a different study or an arm cannot be trained, and StoppedError if training is stopped; the
    same call continues it then.
    """
    data = recipes[study.reference.arm].data
    first = next(iter(data.named_sets.values()))
    with _alone(out):
        drop_damaged(out, reporter)
        plans = make_plan(study, recipes, out, world, reporter)
        evaluator = QualityEvaluator(study, EncodedDataset(first.folder, data.resolution, world), world, reporter)
    todo = [(arm, seed) for seed in study.seeds for arm in study.arms]  # seed by seed, so that every arm has a first result early
    elsewhere = 0
    with reporter.progress(study.name, len(todo)) as advance:
        for arm, seed in todo:
            advance(0, f"{arm}, seed {seed}")
            with _claimed(out, arm, seed) as mine:
                if mine:
                    _ArmRun(study, recipes[arm], plans[arm], arm, seed, evaluator, out, world, keep, reporter).complete()
                elsewhere += not mine
            advance(1)
    if elsewhere:
        reporter.say(f"{elsewhere} of {len(todo)} trainings are being run by other processes: wait for those too.")


class _StopRequest(BaseException):
    """Raised by a signal, wherever the program is. Not an Exception, so that no code takes it for an error that it can handle."""

    def __init__(self, exit_code: int):
        self.exit_code = exit_code


@contextmanager
def stoppable(minutes: float | None = None) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM, and the end of so many minutes into a StoppedError that says how to continue.

    Training saves a checkpoint first. For the main thread.
    """

    def stop(number: int, frame: object) -> None:
        raise _StopRequest(EXIT_RESTART if number == signal.SIGTERM else EXIT_BY_USER)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    timer = threading.Timer(60 * (minutes or 0), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    try:
        if minutes is not None:
            timer.start()
        yield
    except (_StopRequest, StoppedError) as error:
        raise StoppedError("The study was asked to stop. The same command continues it where it stopped.", error.exit_code) from error
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def measured_steps(study: Study, recipe: Recipe, plan: ArmPlan) -> list[int]:
    """Return the steps at which an arm is measured, in order. Intermediate quality of a scheduled arm would mislead."""
    return plan.measured_steps([1.0] if is_scheduled(recipe) else study.readings)


def read_results(out: Path, reporter: Reporter = QUIET) -> list[dict[str, Any]]:
    """Return the lines of results.jsonl. Damaged ones are skipped with a warning; a truncated last line is skipped silently."""
    results, damaged = _parse_results(out / RESULTS)
    if damaged:
        reporter.warn(f"{out / RESULTS}: {_lines(damaged)} damaged and skipped: 'microdit lab run' repeats those measurements.")
    return results


def drop_damaged(out: Path, reporter: Reporter = QUIET) -> None:
    """Remove damaged lines from results.jsonl, so that their measurements are repeated, and keep a copy of the file beside it."""
    results, damaged = _parse_results(out / RESULTS)
    if damaged:
        copy = keep_damaged(out / RESULTS)
        reporter.warn(f"{out / RESULTS}: {_lines(damaged)} damaged and dropped: those measurements are repeated. A copy is kept in {copy}.")
        write_aside(out / RESULTS, to_checked_lines(results))


@dataclass(frozen=True)
class _ArmRun:
    """The training and measurements of one arm for one seed."""

    study: Study
    recipe: Recipe
    plan: ArmPlan
    arm: str
    seed: int
    evaluator: QualityEvaluator
    out: Path
    world: World
    keep: bool
    reporter: Reporter = field(repr=False)

    def complete(self) -> None:
        """Train to every step that has no result yet and measure there, then delete the run folder unless `keep`."""
        lines = [line for line in read_results(self.out, self.reporter) if (line["arm"], line["seed"]) == (self.arm, self.seed)]
        known = {line["step"] for line in lines}
        missing = [step for step in measured_steps(self.study, self.recipe, self.plan) if step not in known]
        if not any(line.get("diverged") for line in lines):
            for step in missing:
                if not self._measure_at(step):
                    break
        if not self.keep and self._folder.exists():
            shutil.rmtree(self._folder)

    @property
    def _folder(self) -> Path:
        return self.out / "runs" / self.arm / f"seed-{self.seed}"

    def _measure_at(self, step: int) -> bool:
        """Train to `step` and append a result; return whether training did not diverge."""
        place = {"arm": self.arm, "seed": self.seed, "step": step}
        run = self._folder / f"{step}-steps" if is_scheduled(self.recipe) else self._folder
        try:
            self._train_to(step, run)
        except DivergedError as error:
            self.reporter.warn(f"{self.arm}, seed {self.seed}, diverged before step {step}: {error}")
            self._append({**place, "diverged": str(error)})
            return False
        metrics, strip, captions = self.evaluator.measure(run, self.recipe.data.held_out)
        grid = draw_grid(strip, captions, title=f"{self.arm}, seed {self.seed}, step {step:,}")
        save_png(grid, self.out / "strips" / f"{self.arm}-{self.seed}-{step}.png")
        costs = {"flops": step * self.plan.flops_per_step, "seconds": step * self.plan.seconds_per_step}
        self._append({**place, **costs, **metrics.by_name()})
        return True

    def _train_to(self, step: int, run: Path) -> None:
        """Train to `step`. A run that ended earlier continues: with a constant learning rate, a longer phase is the same phase."""
        record = replace(self.recipe.record, checkpoint_every=max(step, 1), keep_checkpoints=1, sample_prompts=[], held_out_every=step + 1)
        recipe = replace(stretched(self.recipe, step), seed=self.seed, record=record)
        begun = run.exists()
        with sole_writer(run, self.world):
            trainer = Trainer(recipe, run, Reporter(PlainConsole(quiet=True)), self.world, resume=begun, accept_changes=True)
            if trainer.step < step:
                trainer.train()

    def _append(self, line: dict[str, Any]) -> None:
        """Rewrite results.jsonl with one more line, so that a killed process's half line does not corrupt it."""
        with _alone(self.out):
            lines = [*read_results(self.out, self.reporter), line]
            write_aside(self.out / RESULTS, to_checked_lines(lines))


def _parse_results(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the valid lines, and the numbers (from 1) of invalid ones."""
    results: list[dict[str, Any]] = []
    damaged: list[int] = []
    *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            result = from_checked_json(line)
        except ValueError:
            result = {}
        if _is_result(result):
            results.append(result)
        else:
            damaged.append(number)
    return results, damaged


def _is_result(line: dict[str, Any]) -> bool:
    """Return whether a line holds an arm, a seed and a step, and either the reason why training diverged or costs and quality metrics."""
    if [type(line.get(key)) for key in ("arm", "seed", "step")] != [str, int, int]:
        return False
    return isinstance(line.get("diverged"), str) or all(type(line.get(key)) in (int, float) for key in (*COSTS, *MEASURES))


def _lines(numbers: list[int]) -> str:
    return f"line {numbers[0]} is" if len(numbers) == 1 else f"lines {', '.join(map(str, numbers))} are"


@contextmanager
def _claimed(out: Path, arm: str, seed: int) -> Iterator[bool]:
    """Claim an arm and seed until the end of the block; yield whether no other process has claimed it."""
    path = out / ".claims" / f"{arm}-{seed}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with claimed(path) as mine:
        yield mine


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Wait for the lock of `out`, and hold it until the end of the block."""
    out.mkdir(parents=True, exist_ok=True)
    with in_turn(out / ".lock"):
        yield
