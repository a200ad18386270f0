"""`microdit lab run`: train every arm of a study for every seed, and measure quality at equal cost. Resumes where it was interrupted.

    OUT/plan.json                    the cost of a step of each arm, and the steps that each budget buys
    OUT/results.jsonl                a line per measurement: arm, seed, step, FLOPs, seconds and quality metrics
    OUT/strips/ARM-SEED-STEP.png     images of fixed prompts from fixed noise
    OUT/runs/ARM/seed-N/             run folders, deleted once all measurements of an arm are taken, unless --keep

All arms see the same samples, noise and mask randomness, which depend only on the seed, the step and the sample's place in the batch.
Several processes may share a study: each claims an arm and seed that no other is training. OUT/.lock lets one process time the arms while
the others wait.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from microdit.checkpoint import find_weights
from microdit.config.schema import Recipe
from microdit.data.sources.open import open_source
from microdit.distributed import World
from microdit.errors import DivergedError, UserError
from microdit.evaluation.extraction import extract, feature_cache
from microdit.evaluation.features import EfficientNetFeatures
from microdit.evaluation.metrics.frechet import Gaussian, fit_gaussian, sample_distance
from microdit.evaluation.metrics.kid import kid
from microdit.evaluation.recognition import retrieval, spread_ids
from microdit.io.console import QUIET, PlainConsole, Reporter
from microdit.io.files import keep_damaged, write_aside
from microdit.io.locks import sole_writer
from microdit.io.untrusted_text import parse_json
from microdit.lab.equal_cost import ArmPlan, make_plan
from microdit.lab.study import Study, is_scheduled, stretched
from microdit.pipelines.pipeline import Encoders, MicroDiTPipeline, load_encoders
from microdit.pipelines.settings import SamplerSettings
from microdit.reports.grids import draw_grid, save_png
from microdit.training.parallel import DenoisingLoss
from microdit.training.trainer import Trainer
from microdit.training.validation import HeldOut

HELD_OUT = 106  # samples, the number of held-out emoji
RESULTS = "results.jsonl"
MEASUREMENT = ("arm", "seed", "step")  # the keys of each line; then `diverged`, or
COSTS = ("flops", "seconds")  # and the quality metrics


def run_study(study: Study, recipes: dict[str, Recipe], out: Path, world: World, keep: bool = False, reporter: Reporter = QUIET) -> None:
    """Train and measure all arms that have no results in `out` yet. An arm that diverges is recorded as such.

    Raises UserError if `out` holds results of a different study or an arm cannot be trained, and StoppedError if training is stopped.
    """
    with _alone(out):
        drop_damaged(out, reporter)
        plans = make_plan(study, recipes, out, world, reporter)
    todo = [(arm, seed) for seed in study.seeds for arm in study.arms]  # seed by seed, so that every arm has a first result early
    evaluator = QualityEvaluator(study, world, reporter)
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
        write_aside(out / RESULTS, "".join(f"{json.dumps(one)}\n" for one in results).encode())


@dataclass(frozen=True)
class QualityMetrics:
    """One measurement. `recognised` is top-10 retrieval among all training images, with EfficientNet-Lite0 features."""

    held_out_loss: float
    frechet_distance: float
    kid: float
    recognised: float


class QualityEvaluator:
    """Measures checkpoints with fixed captions and noise, without masking, on EMA weights.

    It holds what all measurements of a study share: captions, the feature network, the features of the reference set, and encoders.
    """

    def __init__(self, study: Study, world: World, reporter: Reporter):
        self._study, self._world, self._reporter = study, world, reporter
        self._network = EfficientNetFeatures()
        self._records = [record for part in open_source(study.source).parts for record in part.records()]
        self._right_N = spread_ids(len(self._records), study.pictures)
        self._captions = [self._records[i].captions["caption"] for i in self._right_N]
        self._real: tuple[Tensor, Gaussian] | None = None
        self._encoders: dict[tuple[str, str], Encoders] = {}  # by their names, so that each is loaded once

    def measure(self, run: Path, held_out: str | None) -> tuple[QualityMetrics, list[Image.Image]]:
        """Measure the newest checkpoint of `run`; return its metrics and images of the study's prompts.

        `held_out` is the folder of the encoded set for the held-out loss. Raises UserError if the checkpoint is damaged.
        """
        pipeline, side = self._open(run)
        real_MD, gaussian = self._reference(side)
        settings = SamplerSettings(self._study.num_inference_steps, self._study.guidance_scale)
        generated_ND = self._network(pipeline.generate(self._captions, settings, warn=self._reporter.warn))
        strip = pipeline.generate(self._study.prompts, settings, warn=self._reporter.warn)
        subset = min(len(generated_ND), len(real_MD), 1000)
        metrics = QualityMetrics(
            held_out_loss=self._held_out_loss(pipeline, side, held_out),
            frechet_distance=sample_distance(generated_ND, gaussian),
            kid=kid(generated_ND, real_MD, subset_size=subset, subsets=20).value,
            recognised=retrieval(generated_ND, real_MD, self._right_N).top_10,
        )
        return metrics, strip

    def _open(self, run: Path) -> tuple[MicroDiTPipeline, int]:
        """Return the newest checkpoint's pipeline, and the side of its images."""
        checkpoint = find_weights(run, _raise)
        assert checkpoint is not None, "the run has just ended"
        data = checkpoint.state["data"]
        names = data["autoencoder"]["name"], data["text_encoder"]["name"]
        if names not in self._encoders:
            self._encoders[names] = load_encoders(data)
        return MicroDiTPipeline.from_checkpoint(checkpoint, encoders=self._encoders[names]), data["resolution"]

    def _held_out_loss(self, pipeline: MicroDiTPipeline, side: int, folder: str | None) -> float:
        assert folder is not None
        held_out = HeldOut(Path(folder), side, HELD_OUT, pipeline.edm, self._world)
        found = held_out.measure(DenoisingLoss(pipeline.model, pipeline.edm, pipeline.config.mask_padding))["held_out_loss"]
        assert isinstance(found, float)
        return found

    def _reference(self, side: int) -> tuple[Tensor, Gaussian]:
        if self._real is None:
            parts = [lambda: (record.image for record in self._records)]
            found = extract(self._network, self._study.source, parts, side, feature_cache(), self._world, self._reporter)
            self._real = found.features_ND, fit_gaussian(found.features_ND)
        return self._real


def _raise(sentence: str) -> None:
    """Treat a warning about a damaged checkpoint as an error: its measurement would be of an older one."""
    raise UserError(sentence)


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
        missing = [
            step for step in self.plan.measured_steps([1.0] if is_scheduled(self.recipe) else self.study.readings) if step not in known
        ]
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
        metrics, strip = self.evaluator.measure(run, self.recipe.data.held_out)
        grid = draw_grid(strip, self.study.prompts, title=f"{self.arm}, seed {self.seed}, step {step:,}")
        save_png(grid, self.out / "strips" / f"{self.arm}-{self.seed}-{step}.png")
        costs = {"flops": step * self.plan.flops_per_step, "seconds": step * self.plan.seconds_per_step}
        self._append({**place, **costs, **asdict(metrics)})
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
            content = "".join(f"{json.dumps(one)}\n" for one in [*read_results(self.out, self.reporter), line])
            write_aside(self.out / RESULTS, content.encode())


def _parse_results(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the valid lines, and the numbers (from 1) of invalid ones."""
    results: list[dict[str, Any]] = []
    damaged: list[int] = []
    *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            result = parse_json(line)
        except ValueError:
            result = None
        if isinstance(result, dict) and ({*MEASUREMENT, "diverged"} <= result.keys() or {*MEASUREMENT, *COSTS} <= result.keys()):
            results.append(result)
        else:
            damaged.append(number)
    return results, damaged


def _lines(numbers: list[int]) -> str:
    return f"line {numbers[0]} is" if len(numbers) == 1 else f"lines {', '.join(map(str, numbers))} are"


@contextmanager
def _claimed(out: Path, arm: str, seed: int) -> Iterator[bool]:
    """Claim an arm and seed until the end of the block; yield whether no other process has claimed it."""
    path = out / ".claims" / f"{arm}-{seed}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released with the file, also when the process is killed
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Wait for the lock of `out`, and hold it until the end of the block."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
