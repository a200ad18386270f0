"""The training loop.

Notable:
- step n depends on the recipe's seed and on n alone (samples, noise, masks, dropped captions), so resuming needs no generator state, and an
  interrupted run continues with the same losses to the last bit;
- the phases of a recipe share one optimizer and its weight averages; each has its own mask ratio, batch size and learning-rate schedule;
- Ctrl-C and SIGTERM finish the current step, write a checkpoint, and print how to continue;
- a step whose loss is not finite or jumps is skipped; after several skips in a row the weights return to a checkpoint, the data continues;
- steps are queued one ahead on a GPU: the program reads a step's numbers while the next one runs, so the GPU never waits for the program,
  and warnings, stops and rollbacks come one step later;
- all processes run the same loop; only the first one writes the record.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microdit.checkpoint import Checkpoint
from microdit.config.schema import PhaseRecipe, Recipe
from microdit.devices import device_name
from microdit.distributed import World
from microdit.errors import EXIT_BY_USER, EXIT_RESTART, DivergedError, StoppedError, UserError
from microdit.io.console import Reporter, joined
from microdit.io.places import DEADLINE
from microdit.pipelines.sampling import recorded_objective
from microdit.planning.bill import (
    CHECKPOINTS,
    ENCODING,
    FID,
    GRIDS,
    HELD_OUT,
    QUALITY,
    START,
    Bill,
    comparison,
    planned_bill,
    settled,
    steps_part,
)
from microdit.planning.estimate_tables import print_comparison
from microdit.planning.hardware import peak_flops
from microdit.planning.workload import FlopCounter
from microdit.process_limits import keep_freed_memory
from microdit.reports.grids import save_png
from microdit.training.checkpointing import CheckpointWriter, newest_intact
from microdit.training.distillation import open_teacher
from microdit.training.init_from import find_initial_weights
from microdit.training.logging import Cost, RunRecord, last_cost
from microdit.training.meters import Meters, PendingStep, StepResult, peak_memory, progress_text
from microdit.training.noise import MicroBatch, StoredMicroBatch, noise_settings, sample_noise
from microdit.training.optim import learning_rate
from microdit.training.parallel import compute_dtype, keep_compiled
from microdit.training.preemption import StopRequests, stop_requests
from microdit.training.prefetch import Prefetcher
from microdit.training.run_store import RunStore
from microdit.training.setup import (
    check_recipe_fits,
    describe,
    find_checkpoint,
    fingerprints,
    model_config,
    open_dataset,
    start_message,
    with_data_order,
    with_sigma_data,
)
from microdit.training.stability import SpikeDecision, SpikeGuard
from microdit.training.state import TrainingState, read_step
from microdit.training.validation import PromptGrid, open_held_out, open_quality

if TYPE_CHECKING:
    from microdit.training.fid import TrainingFID

AHEAD = 2  # batches to prefetch
MAX_ROLLBACKS = 3  # in a row without a new checkpoint in between
CAPTION_MULTIPLE = 8  # tokens: masked attention kernels on GPUs need lengths divisible by 8


@dataclass(frozen=True)
class StepBatch:
    """This process's part of one step's global batch, with the numbers of image and caption tokens of each sample."""

    micro_batches: list[MicroBatch]
    tokens: int
    caption_tokens: int


@dataclass(frozen=True)
class QueuedStep:
    """A step that was queued on the device. `number` counts from 1; `waited` is how many seconds the loop waited for data."""

    number: int
    phase: PhaseRecipe
    step_in_phase: int
    batch: StepBatch
    waited: float
    pending: PendingStep


@dataclass(frozen=True)
class Encoded:
    """The number of records of the recipe's sources that were encoded for a run, and the seconds it took; none if the cache held all."""

    records: int
    seconds: float


class Trainer:
    """Trains a recipe into a run folder."""

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        reporter: Reporter,
        world: World,
        resume: bool = False,
        accept_changes: bool = False,
        price_per_hour: float | None = None,
        initial: Checkpoint | None = None,
        store: RunStore | None = None,
    ):
        """Open data and checkpoint, build the model, and load its weights.

        `initial` is the checkpoint that the recipe's `init_from` refers to, if the caller has found and verified it already. `store` is
        where the run lies if that is an object store; `run` is its workspace then.
        Raises UserError if the run exists and `resume` is not set, or if recipe, data, checkpoint and processes do not fit together.
        """
        started = time.monotonic()
        recipe = with_data_order(recipe)
        self.recipe, self.run, self.reporter, self.world, self.store = recipe, run, reporter, world, store
        self.place = run if store is None else store.place  # for people to read
        self.mixture = open_dataset(recipe, self.reporter.warn, world)
        self.data = self.mixture.sets[0]  # the others have the same shapes and encoders
        check_recipe_fits(recipe, self.mixture.sets, world)
        checkpoint = find_checkpoint(
            run, recipe, self.mixture.sets, world, self.reporter.warn, resume or store is not None, accept_changes, store
        )
        hours, dollars = last_cost(run) if world.is_main else (0.0, 0.0)
        self.cost = Cost(world.size, price_per_hour, hours, dollars, started)
        self.config = model_config(recipe, self.data)
        if recipe.engine.compile:
            with world.together():
                keep_compiled(run)
        first = None
        if checkpoint is None or recipe.distillation:
            first = find_initial_weights(recipe, run, self.config, self.data, world, self.reporter.warn, initial)
        before = first.origin.objective if first else None
        if checkpoint:
            before = recorded_objective(checkpoint.state)
        self.recipe = recipe = with_sigma_data(recipe, self.mixture.sets, before, self.reporter.warn)
        self.teacher = open_teacher(recipe, first, self.config, checkpoint, world)
        fill = None if checkpoint or first is None else partial(first.fill, world=world)
        channels = self.data.feature_shape()[0] if recipe.alignment else None
        self.state = TrainingState(recipe, self.config, world, fill, checkpoint is None, channels, self.teacher)
        self.guard = SpikeGuard(recipe.guard, world.device)
        self.step = 0  # number of steps that were queued on the device
        self.lag = 1 if world.device.type == "cuda" else 0  # steps that may be running when the next one is queued
        self._rolled_back_from: int | None = None  # step of the newest checkpoint at the last rollback
        self._rollbacks_here = 0  # rollbacks since that checkpoint
        self._last: dict[str, Any] = {}  # metrics
        if checkpoint:
            self._restore(checkpoint)
        self.held_out = open_held_out(recipe, self.data, self.state.objective, world)
        self.quality = open_quality(recipe, self.held_out.data if self.held_out else self.data, self.state.objective, world)
        record, dtype = recipe.record, compute_dtype(recipe.engine, world.device)
        self.prompt_grid = PromptGrid(recipe, world, dtype, self.reporter.warn)
        self.fid: TrainingFID | None = None
        if record.fid_every:
            from microdit.training import fid  # imports readers of sources and more, which few trainings need

            self.fid = fid.TrainingFID(recipe, self.data.shortest_side, world, dtype, self.prompt_grid.encoders, self.reporter)
        self.checkpoints = CheckpointWriter(run, world, record.keep_checkpoints, record.keep_every, self.reporter.warn, store)
        if checkpoint:
            self.checkpoints.last_saved = self.checkpoints.last_kept = checkpoint.step
        with world.together():
            self.record = RunRecord(run, recipe, self.reporter.warn, self.step) if world.is_main else None
        self.flops = FlopCounter(recipe, self.config, channels)
        self.peak, self.peak_source = peak_flops(world.device, compute_dtype(recipe.engine, world.device))
        self.planned: Bill | None = None
        self.to_encode = 0  # records of the recipe's sources that were encoded for this run
        self.cost.lap(START)

    def train(self, on_step: Callable[[], None] = lambda: None) -> None:
        """Train from the current step to the end of the last phase. `on_step` is called after each step.

        Raises StoppedError on a stop request, UserError on a failure.
        """
        recipe, total = self.recipe, self.recipe.total_steps
        keep_freed_memory()
        self._announce()
        self.cost.lap(START)
        batches = Prefetcher(self.step_batch, range(self.step, total), AHEAD, recipe.data.read_timeout, self.mixture.where)
        meters = Meters(self.step, total, self.peak, self.world.size, self.world.device, self.reporter.console)
        result, queued = StepResult([], []), deque[QueuedStep]()
        with (
            self._status_recorded(),
            self.world.naming_the_lost(),
            meters,
            stop_requests() as stop,
            batches as reader,
            closing(self.mixture),
        ):
            while self.step < total and not result.stop:
                queued.append(self._queue_step(reader, stop))
                last = self.step == total
                running = 0 if last or self._something_is_due() else self.lag
                while len(queued) > running:
                    done = queued.popleft()
                    result, decision = self._read_step(done, meters)
                    if result.stop or self.guard.must_roll_back:
                        running = 0
                    newest = done.number == self.step  # then the weights are those after this step
                    if newest and self.guard.must_roll_back:
                        self._roll_back(decision)
                    in_haste = result.stop_by_machine and not last  # the machine is about to be preempted
                    measured = self._measure(last, in_haste) if newest else {}
                    if _due(done.number, recipe.record.metrics_every) or measured or (newest and (last or result.stop)):
                        self._write_metrics(meters, measured, done, decision.grad_norm)
                self.cost.lap(steps_part(queued[-1].phase if queued else done.phase))
                if not queued:
                    if (_due(self.step, recipe.record.checkpoint_every) and not self.guard.in_a_row) or last or result.stop:
                        self.save(result.stop_by_machine and not last)
                    if recipe.record.sample_prompts and (_due(self.step, recipe.record.samples_every) or last):
                        self.sample()
                self.checkpoints.check()
                on_step()
            self._end(result)
        self._settle()

    def step_batch(self, step: int) -> StepBatch:
        """Read this process's part of step number `step` (from 0).

        For a GPU, samples stay as they are stored, in pinned memory; the GPU expands them and samples the noise itself.
        """
        recipe, world = self.recipe, self.world
        phase, step_in_phase = recipe.phase_at(step)
        on_gpu = world.device.type == "cuda"
        multiple = CAPTION_MULTIPLE if on_gpu and recipe.model.mask_padding else 1
        stored = self.mixture.stored(step, world.rank, world.size, multiple, recipe.aligned_at(step))
        height, width = stored.sides
        grid = height // self.config.patch_size, width // self.config.patch_size
        settings = noise_settings(recipe, self.state.objective, phase, step_in_phase)
        add_noise = partial(sample_noise, settings=settings, seed=recipe.seed, step=step, grid=grid)
        numbers, size = range(world.rank, phase.batch_size, world.size), recipe.engine.micro_batch or len(stored)
        parts = [
            StoredMicroBatch(part.pin() if on_gpu else part, partial(add_noise, numbers=numbers[index * size : (index + 1) * size]))
            for index, part in enumerate(stored.split(size))
        ]
        micro_batches: list[MicroBatch] = [*parts] if on_gpu else [part.to(world.device) for part in parts]
        return StepBatch(micro_batches, math.prod(grid), stored.text.numbers_BRV.shape[1])

    def _queue_step(self, reader: Prefetcher[StepBatch], stop: StopRequests) -> QueuedStep:
        """Queue one more step on the device."""
        phase, step_in_phase = self.recipe.phase_at(self.step)
        started = time.monotonic()
        batch = reader.next()
        waited = time.monotonic() - started
        rate, stops = learning_rate(phase, step_in_phase), (stop.by_machine, stop.by_user)
        pending = self.state.train_step(batch.micro_batches, self.step, rate, phase.grad_clip, self.guard, stops)
        self.step += 1
        return QueuedStep(self.step, phase, step_in_phase, batch, waited, pending)

    def _read_step(self, done: QueuedStep, meters: Meters) -> tuple[StepResult, SpikeDecision]:
        """Read the numbers of a queued step, waiting for it if needed; print warnings about it; add it to the meters."""
        result, decision = read_step(done.pending.values())
        rise = self.guard.record(decision, done.phase.name, done.number - 1)
        if decision.objection:
            self.reporter.warn(
                f"Step {done.number} was skipped: {decision.objection}. {self.guard.skipped} of {done.number} steps were skipped so far."
            )
        if rise:
            self.reporter.warn(rise)
        aligned = self.recipe.aligned_at(done.number - 1)
        flops = self.flops.of_step(done.phase, done.step_in_phase, done.batch.tokens, done.batch.caption_tokens, aligned)
        meters.step(done.phase.name, done.number, result, flops, done.waited, decision.taken)
        return result, decision

    def _something_is_due(self) -> bool:
        """Return whether a checkpoint, a measurement or a grid needs the weights after the newest step, and so must wait for it."""
        record = self.recipe.record
        intervals = [record.checkpoint_every, record.quality_every, record.fid_every]
        intervals += [record.held_out_every] if self.held_out else []
        intervals += [record.samples_every] if record.sample_prompts else []
        return any(_due(self.step, every) for every in intervals)

    def _roll_back(self, decision: SpikeDecision) -> None:
        """Return to the weights of a checkpoint after several skipped steps in a row. The data continues."""
        self.checkpoints.finish()
        checkpoint = self._earlier_checkpoint()
        if checkpoint is None:
            raise DivergedError(
                f"{self.recipe.guard.rollback_after} steps in a row, up to step {self.step}, were skipped ({decision.objection}), and "
                "there is no earlier checkpoint that helps. Resume with a lower learning rate (--accept-changes), or check the data of "
                "these steps."
            )
        self.reporter.warn(f"Rolled back to the weights of step {checkpoint.step}; the data goes on from step {self.step}.")
        self.state.load(checkpoint)
        self.guard.roll_back(checkpoint.state["guard"])

    def _earlier_checkpoint(self) -> Checkpoint | None:
        """Return the newest checkpoint, or, if the last rollback went there and did not help, the one before it."""
        newest = self.checkpoints.last_saved
        if newest != self._rolled_back_from:
            self._rolled_back_from, self._rollbacks_here = newest, 0
        self._rollbacks_here += 1
        if self._rollbacks_here > MAX_ROLLBACKS:
            return None
        if self.store is not None:
            self.store.fetch(self._rollbacks_here)
        return newest_intact(self.run, self.world, self.reporter.warn, self._rollbacks_here - 1, self.store)

    def _measure(self, last: bool, in_haste: bool) -> dict[str, Any]:
        """Return the held-out loss, image quality and Frechet distance that are due at this step. All processes must call this."""
        record = self.recipe.record
        measured: dict[str, Any] = {}
        self.cost.lap(steps_part(self.recipe.phase_at(self.step - 1)[0]))
        if self.held_out and (_due(self.step, record.held_out_every) or last):
            measured |= self.held_out.measure(self.state.gradients.current_loss(), self.recipe.engine.compile)
            self.cost.lap(HELD_OUT)
        if self.quality and (_due(self.step, record.quality_every) or last) and not in_haste:
            figures = self.quality.measure(self.state.ema_model())
            self.reporter.say(self.quality.describe(self.step, figures))
            measured |= figures
            self.cost.lap(QUALITY)
        if self.fid and (_due(self.step, record.fid_every) or last) and not in_haste:
            figures = self.fid.measure(self.state.ema_model(), describe(self.recipe, self.config, self.data, self.mixture.sets))
            self.reporter.say(self.fid.describe(self.step, figures))
            measured |= figures
            self.cost.lap(FID)
        return measured

    def _write_metrics(self, meters: Meters, measured: dict[str, Any], done: QueuedStep, grad_norm: float) -> None:
        numbers: dict[str, Any] = meters.read()
        if self.record is None:
            return
        phase, step_in_phase = done.phase, done.step_in_phase
        seconds_left = meters.seconds_left(self.flops.remaining(done.number, done.batch.tokens, done.batch.caption_tokens))
        dollars = self.cost.dollars()
        values = {
            "step": done.number,
            "phase": phase.name,
            **numbers,
            **measured,
            "learning_rate": learning_rate(phase, step_in_phase),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "mask_ratio": phase.mask_ratio_at(step_in_phase),
            "images_seen": self.recipe.samples_before(done.number),
            "skipped": self.guard.skipped,
            "gpu_hours": self.cost.gpu_hours(),
            **({} if dollars is None else {"dollars": dollars}),
            "seconds_left": round(seconds_left),
            "time": round(time.time(), 2),
        }
        self.record.metrics(values)
        self._last = values
        self._status("running")
        shown = (numbers["loss"], numbers["images_per_second"], numbers["mfu"], seconds_left, dollars, self.cost.to_go(seconds_left))
        meters.show(progress_text(*shown))

    def _status(self, state: str, reason: str | None = None) -> None:
        if self.record is None:
            return
        keys = ("phase", "loss", "images_per_second", "seconds_left")
        values = {key: self._last.get(key) for key in keys}
        counts = {"skipped": self.guard.skipped, "rollbacks": self.guard.rollbacks, "checkpoints_failed": self.checkpoints.failed}
        self.record.status(state, reason, step=self.step, total_steps=self.recipe.total_steps, **values, **self.cost.so_far(), **counts)

    def save(self, in_haste: bool = False) -> None:
        """Start to write a checkpoint; `in_haste`, before preemption, with only what resuming needs.

        Weights that are not finite are never saved, because a rollback needs the older checkpoints.
        """
        if not self.state.is_finite():
            self.reporter.warn(f"Some weights are not finite after step {self.step}, so no checkpoint is written.")
            return
        position = {"images_seen": self.recipe.samples_before(self.step), "guard": self.guard.state(), **self.cost.so_far()}
        teacher = {} if self.teacher is None else {"teacher": self.teacher.fingerprint}
        description = describe(self.recipe, self.config, self.data, self.mixture.sets) | teacher
        exports = [] if in_haste else ["model", *self.state.averages]
        self.checkpoints.save(self.step, self.state.tensors(), {**description, **position}, exports)
        self.cost.lap(CHECKPOINTS)

    def sample(self) -> None:
        """Write a grid of the recipe's prompts to samples/. All processes must call this; each generates some of the images."""
        description = describe(self.recipe, self.config, self.data, self.mixture.sets)
        grid = self.prompt_grid.draw(self.state.ema_model(), description, self.step)
        if self.record is not None:
            self.record.picture(lambda path: save_png(grid, path), self.step)
        self.cost.lap(GRIDS)

    @contextmanager
    def _status_recorded(self) -> Iterator[None]:
        """Record the status of training: running, then finished, stopped or failed."""
        self._status("running")
        try:
            yield
            self._status("finished")
        except StoppedError as error:
            self._status("stopped", str(error))
            raise
        except BaseException as error:
            self._status("failed", f"{type(error).__name__}: {error}")
            if self.store is not None and isinstance(error, UserError):
                self.checkpoints.wait(DEADLINE)
            raise
        finally:
            if self.record is not None:
                self.record.close()

    def _end(self, result: StepResult) -> None:
        """Wait for the last checkpoint. Raises StoppedError, UserError or DivergedError unless training is complete and saved."""
        saved = self.checkpoints.finish() and self.checkpoints.last_kept == self.step  # weights that are not finite are not saved
        self.cost.lap(CHECKPOINTS)
        replaced = sum(self.world.gather(self.mixture.replaced))
        if replaced:
            self.reporter.warn(f"{replaced} samples were damaged and replaced by others: encode the data again.")
        if self.guard.plateau.warning:
            self.reporter.warn(self.guard.plateau.warning)  # repeated, because it may have been printed days ago
        if self.step < self.recipe.total_steps:
            where = f"saved in {self.place}" if saved else "NOT saved (see above)"
            code = EXIT_BY_USER if result.stop_by_user else EXIT_RESTART
            raise StoppedError(f"Stopped at step {self.step} of {self.recipe.total_steps}, {where}. Continue with --resume.", code)
        if not saved:
            cause = UserError if self.state.is_finite() else DivergedError
            raise cause(
                f"Trained to the end, but the last checkpoint is not in {self.place} (see above): fix that, then continue with --resume."
            )

    def book(self, encoded: Encoded) -> None:
        """Book the encoding of the recipe's sources, if it took place before this trainer was made."""
        if encoded.records:
            self.cost.add(ENCODING, encoded.seconds)
            self.to_encode = encoded.records

    def _plan(self) -> None:
        """Plan the run's time and memory, if its recipe was measured on this machine."""
        try:
            self.planned = planned_bill(self.recipe, self.mixture.sets, self.world.size, self.to_encode)
        except UserError as error:
            self.reporter.warn(f"This run is not compared with a plan. {error}")

    def _settle(self) -> None:
        """Print and record planned beside actual time, memory and dollars."""
        if self.record is None:
            return
        price = self.cost.price_per_hour
        memory = peak_memory(self.world.device) / 1e9
        bill = settled(self.planned, self.cost.seconds, memory, None if price is None else price * self.world.size)
        self.record.settle(bill)
        print_comparison(self.recipe.name, comparison(bill), self.reporter.console)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.state.load(checkpoint)
        self.guard.restore(checkpoint.state["guard"])
        self.step = checkpoint.step
        self.cost.earlier_hours = max(self.cost.earlier_hours, checkpoint.state["gpu_hours"])
        self.cost.earlier_dollars = max(self.cost.earlier_dollars, checkpoint.state["dollars"] or 0.0)
        self.cost.seconds = dict(checkpoint.state.get("seconds", {}))  # older checkpoints have none

    def _announce(self) -> None:
        """Print what is about to be trained, and add this start to the record."""
        world, data = self.world, fingerprints(self.recipe, self.mixture.sets)
        with world.together():
            if self.record is not None:
                machine = {"world_size": world.size, "device": device_name(world.device), "price_per_hour": self.cost.price_per_hour}
                self.record.started(data, {**machine, "from_step": self.step})
                self._plan()
        text = start_message(self.recipe, self.place, self.mixture.sets, self.state, self.step, world)
        self.reporter.say(joined(text, f" Utilisation is relative to {self.peak / 1e12:.3g} TFLOP/s, {self.peak_source}."))


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
