"""Quality of a checkpoint for the lab: small, always the same pictures and noise, nothing masked, averaged weights.

`microdit lab run`: every arm for every seed on both budgets, whatever was done before left alone.

OUT/plan.json                    what a step costs, and the steps that the budgets buy
OUT/results.jsonl                one line a reading: arm, seed, step, FLOPs, seconds, and the quality
OUT/strips/ARM-SEED-STEP.png     the same prompts from the same noise
OUT/runs/ARM/seed-N/             the run folders; deleted once all of an arm's readings are taken, unless --keep

The same samples, noise and masks' random numbers for every arm: draws depend on the seed, the step and the sample's place alone.

Processes may share a study: each takes an arm and seed that no other is at. OUT/.lock lets one time the arms while the others wait.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from microdit.checkpoint import find_weights
from microdit.cli.terminal import console, progress, warn
from microdit.config.schema import Recipe
from microdit.data.sources.base import open_source
from microdit.distributed import World
from microdit.errors import DivergedError, UserError
from microdit.evaluation.extraction import extract, feature_cache
from microdit.evaluation.features import EfficientNetFeatures
from microdit.evaluation.metrics.frechet import Gaussian, fit_gaussian, sample_distance
from microdit.evaluation.metrics.kid import kid
from microdit.evaluation.recognition import retrieval, spread_ids
from microdit.io.console import PlainConsole
from microdit.io.files import keep_damaged, write_aside
from microdit.io.locks import sole_writer
from microdit.io.text import parse_json
from microdit.lab.equal_cost import ArmPlan, make_plan
from microdit.lab.study import Study, is_scheduled, stretched
from microdit.pipelines.pipeline import Encoders, MicroDiTPipeline, load_encoders
from microdit.pipelines.settings import SamplerSettings
from microdit.reports.grids import draw_grid, save_png
from microdit.training.parallel import DenoisingLoss
from microdit.training.trainer import Trainer
from microdit.training.validation import HeldOut

HELD_OUT = 106  # samples: as many as there are held-out emoji


@dataclass(frozen=True)
class Reading:
    """`recognised`: share of captions whose picture is among the 10 nearest of all training pictures, by EfficientNet-Lite0."""

    held_out_loss: float
    frechet_distance: float
    kid: float
    recognised: float


class Reader:
    """Holds what all readings of a study share: the reference's features, captions, the network."""

    def __init__(self, study: Study, world: World):
        self._study, self._world = study, world
        self._network = EfficientNetFeatures()
        self._records = [record for part in open_source(study.source).parts for record in part.records()]
        self._right_N = spread_ids(len(self._records), study.pictures)
        self._captions = [self._records[i].captions["caption"] for i in self._right_N]
        self._real: tuple[Tensor, Gaussian] | None = None
        self._encoders: dict[tuple[str, str], Encoders] = {}  # by their names: loaded once for all readings

    def read(self, run: Path, held_out: str | None) -> tuple[Reading, list[Image.Image]]:
        """Of the newest checkpoint, and pictures of the study's prompts. `held_out`: the folder of samples that were not learnt from."""
        pipeline, side = self._open(run)
        real_MD, gaussian = self._reference(side)
        settings = SamplerSettings(self._study.num_inference_steps, self._study.guidance_scale)
        drawn_ND = self._network(pipeline.generate(self._captions, settings, warn=warn))
        strip = pipeline.generate(self._study.prompts, settings, warn=warn)
        subset = min(len(drawn_ND), len(real_MD), 1000)
        reading = Reading(
            held_out_loss=self._held_out_loss(pipeline, side, held_out),
            frechet_distance=sample_distance(drawn_ND, gaussian),
            kid=kid(drawn_ND, real_MD, subset_size=subset, subsets=20).value,
            recognised=retrieval(drawn_ND, real_MD, self._right_N).top_10,
        )
        return reading, strip

    def _open(self, run: Path) -> tuple[MicroDiTPipeline, int]:
        """The newest checkpoint's pipeline, and the side of its pictures."""
        checkpoint = find_weights(run, _refuse)
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
            found = extract(self._network, self._study.source, [self._pictures], side, feature_cache(), self._world, warn)
            self._real = found.features_ND, fit_gaussian(found.features_ND)
        return self._real

    def _pictures(self) -> Iterator[bytes]:
        return (record.image for record in self._records)


def _refuse(sentence: str) -> None:
    """A run of the lab that is damaged is no result."""
    raise UserError(sentence)


RESULTS = "results.jsonl"
READING = ("arm", "seed", "step")  # of each line; then `diverged`, or
COSTS = ("flops", "seconds")  # and the quality


def run_study(study: Study, recipes: dict[str, Recipe], out: Path, world: World, keep: bool = False) -> None:
    """Goes on where it was stopped. An arm that diverges gets a line that says so. Raises UserError, StoppedError."""
    with _alone(out):
        drop_damaged(out)
        plans = make_plan(study, recipes, out, world)
    todo = [(arm, seed) for seed in study.seeds for arm in study.arms]  # seed by seed: a first result of every arm comes early
    reader = Reader(study, world)
    elsewhere = 0
    with progress(study.name, len(todo)) as advance:
        for arm, seed in todo:
            advance(0, f"{arm}, seed {seed}")
            with _claimed(out, arm, seed) as mine:
                if mine:
                    _do(study, recipes[arm], arm, seed, plans[arm], reader, out, world, keep)
                elsewhere += not mine
            advance(1)
    if elsewhere:
        console.print(f"{elsewhere} of {len(todo)} are being trained by other processes: wait for those too.")


def _do(study: Study, recipe: Recipe, arm: str, seed: int, plan: ArmPlan, reader: Reader, out: Path, world: World, keep: bool) -> None:
    """One arm for one seed, but for readings that were taken before."""
    lines = [line for line in read_results(out) if (line["arm"], line["seed"]) == (arm, seed)]
    known = {line["step"] for line in lines}
    legs = plan.legs([1.0] if is_scheduled(recipe) else study.readings)
    if not any(line.get("diverged") for line in lines) and not set(legs) <= known:
        _train(study, recipe, arm, seed, plan, legs, known, reader, out, world)
    run = _run_folder(out, arm, seed)
    if not keep and run.exists():
        shutil.rmtree(run)


def read_results(out: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl. Damaged ones are left out with a sentence; half a line at the end, of a run that was killed, without."""
    results, damaged = _parse_results(out / RESULTS)
    if damaged:
        warn(f"{out / RESULTS}: {_lines(damaged)} damaged, and left out: 'microdit lab run' takes those readings anew.")
    return results


def _parse_results(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The readings, and the numbers (from 1) of lines that are none."""
    results: list[dict[str, Any]] = []
    damaged: list[int] = []
    *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            result = parse_json(line)
        except ValueError:
            result = None
        if isinstance(result, dict) and ({*READING, "diverged"} <= result.keys() or {*READING, *COSTS} <= result.keys()):
            results.append(result)
        else:
            damaged.append(number)
    return results, damaged


def drop_damaged(out: Path) -> None:
    """So that those readings are taken anew. The file as it was is kept beside."""
    results, damaged = _parse_results(out / RESULTS)
    if damaged:
        copy = keep_damaged(out / RESULTS)
        warn(f"{out / RESULTS}: {_lines(damaged)} damaged, and dropped: those readings are taken anew. As it was it is kept in {copy}.")
        write_aside(out / RESULTS, "".join(f"{json.dumps(one)}\n" for one in results).encode())


def _lines(numbers: list[int]) -> str:
    return f"line {numbers[0]} is" if len(numbers) == 1 else f"lines {', '.join(map(str, numbers))} are"


def _train(
    study: Study,
    recipe: Recipe,
    arm: str,
    seed: int,
    plan: ArmPlan,
    legs: list[int],
    known: set[int],
    reader: Reader,
    out: Path,
    world: World,
) -> None:
    for step in (leg for leg in legs if leg not in known):
        run = _run_folder(out, arm, seed) / (f"{step}-steps" if is_scheduled(recipe) else "")
        try:
            _train_to(recipe, seed, step, run, world)
        except DivergedError as error:
            warn(f"{arm}, seed {seed}, did not reach step {step}: {error}")
            _append(out, {"arm": arm, "seed": seed, "step": step, "diverged": str(error)})
            return
        reading, strip = reader.read(run, recipe.data.held_out)
        save_png(draw_grid(strip, study.prompts, title=f"{arm}, seed {seed}, step {step:,}"), out / "strips" / f"{arm}-{seed}-{step}.png")
        costs = {"flops": step * plan.flops_per_step, "seconds": step * plan.seconds_per_step}
        _append(out, {"arm": arm, "seed": seed, "step": step, **costs, **asdict(reading)})


def _train_to(recipe: Recipe, seed: int, step: int, run: Path, world: World) -> None:
    """A longer phase with a constant rate is the same phase, so a run that ended goes on."""
    record = replace(recipe.record, checkpoint_every=max(step, 1), keep_checkpoints=1, sample_prompts=[], held_out_every=step + 1)
    leg = replace(stretched(recipe, step), seed=seed, record=record)
    begun = run.exists()
    with sole_writer(run, world):
        trainer = Trainer(leg, run, PlainConsole(quiet=True), world, resume=begun, accept_changes=True)
        if trainer.step < step:
            trainer.train()


def _append(out: Path, line: dict[str, Any]) -> None:
    """The file is written anew, so that half a line of a killed process does not spoil the next."""
    with _alone(out):
        content = "".join(f"{json.dumps(one)}\n" for one in [*read_results(out), line])
        write_aside(out / RESULTS, content.encode())


@contextmanager
def _claimed(out: Path, arm: str, seed: int) -> Iterator[bool]:
    """Whether no other process is at this arm and seed; until the end of the block none will be."""
    path = out / ".claims" / f"{arm}-{seed}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the file is closed, also by a process that is killed
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run_folder(out: Path, arm: str, seed: int) -> Path:
    return out / "runs" / arm / f"seed-{seed}"
