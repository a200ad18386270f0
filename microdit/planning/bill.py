"""The bill of a training run, part by part: planned from what was measured, and beside it what the run took.

The trainer books its time under the same names (`Cost.lap`), so that the parts of plan and run can be compared one by one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microdit.config.schema import PhaseRecipe, Recipe
from microdit.data.dataset import EncodedDataset
from microdit.errors import UserError
from microdit.planning.timings import Repeated, Timings, find_timings, stretches, timings_folder
from microdit.planning.workload import assumed_shapes, shapes_of
from microdit.reports.formats import finite
from microdit.reports.run_folder import RunFolder, is_run

ENCODING, START = "encoding", "start"
CHECKPOINTS, GRIDS, HELD_OUT, QUALITY, FID = "checkpoints", "sample grids", "held-out losses", "image quality", "Frechet distances"
EVALUATION_STEPS = 18  # of `microdit evaluate`, for which `Timings.picture` is given
EVALUATED, REFERENCES = 256, 1000  # pictures that `microdit evaluate` draws, and compares them with, if nothing else is said
VIEWS = 2  # each generated caption's own picture is looked at too


_STEPS = "steps of "


def steps_part(phase: PhaseRecipe) -> str:
    """Return the name of the part that the steps of a phase are booked under."""
    return _STEPS + phase.name


@dataclass(frozen=True)
class Line:
    """A part of a bill: `times` as often, `seconds` in all."""

    part: str
    times: int
    seconds: float


@dataclass(frozen=True)
class Bill:
    """The planned time and memory of one training run. `notes` are sentences about what is not in it, or only estimated."""

    lines: tuple[Line, ...]
    memory_gb: float | None
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(line.seconds for line in self.lines)

    @property
    def steps(self) -> tuple[Line, ...]:
        """The lines of the phases' steps, in their order."""
        return tuple(line for line in self.lines if line.part.startswith(_STEPS))


def bill_of(recipe: Recipe, timings: Timings, to_encode: int = 0) -> Bill:
    """Return the bill of a recipe whose parts were timed. `to_encode` is the number of pictures that are not encoded yet."""
    steps = _steps(recipe, timings)
    lines = [Line(START, 1, timings.start), *steps, _checkpoints(recipe, timings, sum(line.seconds for line in steps))]
    record = recipe.record
    for part, every, timed, wanted in (
        (GRIDS, record.samples_every, timings.grid, bool(record.sample_prompts)),
        (HELD_OUT, record.held_out_every, timings.held_out, recipe.data.held_out is not None),
        (QUALITY, record.quality_every or 1, timings.quality, record.quality_every is not None),
    ):
        if wanted and timed is not None:
            lines.append(_repeated(part, _occasions(recipe, every), timed))
    notes = list(timings.notes)
    if record.fid_every and timings.picture is not None and timings.features is not None:
        each = record.fid_samples * (timings.picture * record.sample_steps / EVALUATION_STEPS + timings.features)
        times = _occasions(recipe, record.fid_every)
        lines.append(Line(FID, times, times * each))
        notes.append("Frechet distances: features as fast as EfficientNet's; those of record.fid_reference, computed once, are not in it.")
    if to_encode and timings.pictures_encoded_per_second:
        lines.insert(0, Line(ENCODING, to_encode, to_encode / timings.pictures_encoded_per_second))
    return Bill(tuple(lines), timings.memory_gb, tuple(notes))


def planned_bill(recipe: Recipe, opened: list[EncodedDataset], processes: int, to_encode: int = 0) -> Bill | None:
    """Return the bill of a training that is about to start on its data; None if its recipe was not measured on this machine.

    `to_encode` is as in `bill_of`. Raises UserError if a measurement is damaged.
    """
    if not timings_folder().is_dir():
        return None
    timings = find_timings(recipe, shapes_of(recipe, opened=opened), assumed_shapes(recipe), processes)
    return None if timings is None else bill_of(recipe, timings, to_encode)


def evaluation_seconds(timings: Timings) -> float | None:
    """Return how long `microdit evaluate` takes with its defaults; None if drawing or the feature network was not timed."""
    if timings.picture is None or timings.features is None:
        return None
    return EVALUATED * timings.picture + (VIEWS * EVALUATED + REFERENCES) * timings.features


def _steps(recipe: Recipe, timings: Timings) -> list[Line]:
    timed = {(item.phase, item.aligned): item for item in timings.steps}
    lines = []
    for number, phase in enumerate(recipe.phases):
        parts = [(item.steps, timed[item.phase, item.aligned]) for item in stretches(recipe) if item.phase == number]
        lines.append(Line(steps_part(phase), phase.steps, sum(steps * time.seconds + time.warm_up for steps, time in parts)))
    return lines


def _checkpoints(recipe: Recipe, timings: Timings, seconds_of_steps: float) -> Line:
    """Training waits for the copy of each checkpoint, for the writing of the last one, and of each one that the next overtakes."""
    every, count = recipe.record.checkpoint_every, _occasions(recipe, recipe.record.checkpoint_every)
    between = every * seconds_of_steps / recipe.total_steps
    waiting = (count - 1) * max(0.0, timings.checkpoint_write - between)
    return Line(CHECKPOINTS, count, count * timings.checkpoint_copy + waiting + timings.checkpoint_write)


def _repeated(part: str, times: int, timed: Repeated) -> Line:
    return Line(part, times, timed.first + (times - 1) * timed.again)


def _occasions(recipe: Recipe, every: int) -> int:
    """Return how often something is done that is due at every n-th step and at the last one."""
    return -(-recipe.total_steps // every)


def settled(planned: Bill | None, seconds: Mapping[str, float], memory_gb: float | None, price_per_hour: float | None) -> dict[str, Any]:
    """Return what a finished run records: planned beside actual time, memory and dollars, None where no plan or no price was known.

    `seconds` is the actual time by part. `price_per_hour` is that of all GPUs together.
    """

    def dollars(time: float) -> float | None:
        return None if price_per_hour is None else time / 3600 * price_per_hour

    actual = sum(seconds.values())
    return {
        "planned": None
        if planned is None
        else {
            "seconds": planned.seconds,
            "parts": {line.part: line.seconds for line in planned.lines},
            "memory_gb": planned.memory_gb,
            "dollars": dollars(planned.seconds),
        },
        "actual": {"seconds": actual, "parts": dict(seconds), "memory_gb": memory_gb, "dollars": dollars(actual)},
    }


@dataclass(frozen=True)
class Compared:
    """One row of plan and run: seconds, GB or dollars, None where it is not known."""

    what: str
    planned: float | None
    actual: float | None

    @property
    def ratio(self) -> float | None:
        """Planned over actual."""
        return self.planned / self.actual if self.planned is not None and self.actual else None


@dataclass(frozen=True)
class Comparison:
    """Plan and run: the times of the parts, their sum, memory in GB, dollars."""

    parts: tuple[Compared, ...]
    total: Compared
    memory: Compared
    dollars: Compared
    has_plan: bool


def recorded_comparisons(folder: Path) -> dict[str, Comparison]:
    """Return plan and run of the finished run in a folder, or of all finished runs in a folder of them, by name.

    Raises UserError if there is none.
    """
    runs = [folder] if is_run(folder) else sorted(path for path in folder.glob("*") if is_run(path))
    if not runs:
        raise UserError(f"There is no run in {folder}: name a run folder, or a folder of several phases' runs.")
    bills = {path.resolve().name: RunFolder(path).record.get("bill") for path in runs}
    found = {name: comparison(bill) for name, bill in bills.items() if isinstance(bill, dict)}
    if not found:
        raise UserError(
            f"{folder} holds no finished run whose cost was recorded: wait until training is finished. An earlier version of microdit "
            "recorded none, and an edited run.json is not read."
        )
    return found


def comparison(recorded: Mapping[str, Any]) -> Comparison:
    """Read what `settled` returned from a run's record, which others may have written: whatever is no number counts as unknown."""
    planned, actual = (item if isinstance(item := recorded.get(key), dict) else {} for key in ("planned", "actual"))
    plans, spent = (item if isinstance(item := side.get("parts"), dict) else {} for side in (planned, actual))
    rows = {key: Compared(key, finite(planned.get(key)), finite(actual.get(key))) for key in ("seconds", "memory_gb", "dollars")}
    parts = tuple(Compared(str(part), finite(plans.get(part)), finite(spent.get(part))) for part in {**plans, **spent})
    return Comparison(parts, rows["seconds"], rows["memory_gb"], rows["dollars"], bool(planned))
