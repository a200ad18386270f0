"""The training loop.

Notable:
- what step n does depends on the recipe's seed and on n alone (samples, noise, masks, dropped captions), so resuming needs no
  state of random generators, and a run cut off anywhere goes on with the same losses to the last bit;
- the phases of a recipe share one optimizer and averages; each has its own mask ratio, batch and learning-rate schedule;
- Ctrl-C and SIGTERM end the step, write a checkpoint, and say how to go on;
- a step whose loss is not finite or jumps is not taken; after several in a row the weights go back to a checkpoint, the data goes on;
- a GPU is given its work one step ahead: the program reads a step's numbers while the next one runs, so warnings, stops and rollbacks
  come one step later, and nothing ever waits in front of the optimizer;
- all processes run the same loop; the first one alone keeps the record.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from microdit.checkpoint import Checkpoint
from microdit.config.schema import PhaseRecipe, Recipe
from microdit.devices import device_name
from microdit.distributed import World
from microdit.errors import EXIT_BY_USER, EXIT_RESTART, DivergedError, StoppedError, UserError
from microdit.io.console import PlainConsole, joined, styled
from microdit.io.process_limits import keep_freed_memory
from microdit.models.routing import METHODS
from microdit.planning.hardware import peak_flops
from microdit.planning.workload import Work
from microdit.reports.grids import save_png
from microdit.training.checkpointing import Saver, newest_whole
from microdit.training.init_from import find_origin
from microdit.training.logging import Cost, RunRecord, last_cost
from microdit.training.meters import Meters, Reading, StepSums, in_words
from microdit.training.noise import MicroBatch, UndrawnBatch, add_draws
from microdit.training.optim import learning_rate
from microdit.training.parallel import compute_dtype, keep_compiled
from microdit.training.preemption import StopRequests, stop_requests
from microdit.training.prefetch import Loader
from microdit.training.setup import describe, find_checkpoint, fingerprints, greeting, model_config, open_mixture, refuse_misfits
from microdit.training.stability import Guard, Verdict
from microdit.training.state import TrainingState, what_happened
from microdit.training.validation import PromptGrid, open_held_out, open_quality

AHEAD = 2  # batches read before they are needed
MAX_ROLLBACKS = 3  # without a checkpoint between them
CAPTION_MULTIPLE = 8  # tokens, on a GPU: what its attention with a mask wants


@dataclass(frozen=True)
class Share:
    """What this process learns from in one step, in micro-batches; `tokens` and `caption_tokens` of each sample."""

    parts: list[MicroBatch]
    tokens: int
    caption_tokens: int


@dataclass(frozen=True)
class QueuedStep:
    """A step that the device was given. `number` counts from 1; `waited` is in seconds, for data."""

    number: int
    phase: PhaseRecipe
    step_in_phase: int
    share: Share
    waited: float
    reading: Reading


class Trainer:
    """A recipe, its run folder, and the state that training changes."""

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        console: PlainConsole,
        world: World,
        resume: bool = False,
        accept_changes: bool = False,
        price_per_hour: float | None = None,
        origin: Checkpoint | None = None,
    ):
        """`origin`: the whole checkpoint that `init_from` means, where it is known already.

        Raises UserError if the run exists and `resume` is not set, or if recipe, data, checkpoint and processes do not fit together."""
        self.recipe, self.run, self.console, self.world = recipe, run, console, world
        self.mixture = open_mixture(recipe, self._warn, world)
        self.data = self.mixture.sets[0]  # the others are of the same shapes and encoders
        refuse_misfits(recipe, self.mixture.sets, world)
        checkpoint = find_checkpoint(run, recipe, self.mixture.sets, world, self._warn, resume, accept_changes)
        hours, dollars = last_cost(run) if world.is_main else (0.0, 0.0)
        self.cost = Cost(world.size, price_per_hour, hours, dollars)
        self.config = model_config(recipe, self.data)
        if recipe.engine.compile:
            with world.together():
                keep_compiled(run)
        first = None if checkpoint else find_origin(recipe, run, self.config, self.data, world, self._warn, origin)
        fill = None if first is None else partial(first.fill, world=world)
        self.state = TrainingState(recipe, self.config, world, fill, fresh=checkpoint is None)
        self.guard = Guard(recipe.guard, world.device)
        self.step = 0  # as many have been given to the device
        self.lag = 1 if world.device.type == "cuda" else 0  # steps that may be under way when the next one is given
        self._rollbacks_here = 0  # since the last checkpoint, which was of this step
        self._rolled_back_since: int | None = None
        self._last: dict[str, Any] = {}  # metrics
        if checkpoint:
            self._restore(checkpoint)
        self.held_out = open_held_out(recipe, self.data, self.state.edm, world)
        self.quality = open_quality(recipe, self.held_out.data if self.held_out else self.data, self.state.edm, world)
        self.prompt_grid = PromptGrid(recipe, world, compute_dtype(recipe.engine, world.device), self._warn)
        self.saver = Saver(run, world, recipe.record.keep_checkpoints, recipe.record.keep_every, self._warn)
        if checkpoint:
            self.saver.last_saved = checkpoint.step
        with world.together():
            self.record = RunRecord(run, recipe, self._warn, self.step) if world.is_main else None
        self.work = Work(recipe, self.config)
        self.peak, self.peak_source = peak_flops(world.device, compute_dtype(recipe.engine, world.device))

    def train(self) -> None:
        """From where it stands to the end of the last phase. Raises StoppedError if it was asked to stop, UserError if it cannot go on."""
        recipe, total = self.recipe, self.recipe.total_steps
        keep_freed_memory()
        self._welcome()
        batches = Loader(self.share, range(self.step, total), AHEAD, recipe.data.read_timeout, self.mixture.where)
        meters = Meters(self.step, total, self.peak, self.world.size, self.world.device, self.console)
        sums, queued = StepSums([], []), deque[QueuedStep]()
        with self._reported(), self.world.naming_the_lost(), meters, stop_requests() as stop, batches as reader:
            while self.step < total and not sums.stop:
                queued.append(self._queue_step(reader, stop))
                last = self.step == total
                under_way = 0 if last or self._something_is_due() else self.lag
                while len(queued) > under_way:
                    done = queued.popleft()
                    sums, verdict = self._hear_of(done, meters)
                    if sums.stop or self.guard.must_roll_back:
                        under_way = 0
                    newest = done.number == self.step  # so the weights are those of this step
                    if newest and self.guard.must_roll_back:
                        self._roll_back(verdict)
                    in_haste = sums.stop_by_machine and not last  # before the machine is taken away
                    measured = self._measure(last, in_haste) if newest else {}
                    if _due(done.number, recipe.record.metrics_every) or measured or (newest and (last or sums.stop)):
                        self._write_metrics(meters, measured, done, verdict.grad_norm)
                if not queued:
                    if (_due(self.step, recipe.record.checkpoint_every) and not self.guard.in_a_row) or last or sums.stop:
                        self._save(sums.stop_by_machine and not last)
                    if recipe.record.sample_prompts and (_due(self.step, recipe.record.samples_every) or last):
                        self._sample()
                self.saver.check()
            self._end(sums)

    def share(self, step: int) -> Share:
        """What this process learns from in step number `step` (from 0). For a GPU as it is stored, in pinned memory: it draws itself."""
        recipe, world = self.recipe, self.world
        phase, step_in_phase = recipe.phase_at(step)
        on_gpu = world.device.type == "cuda"
        stored = self.mixture.stored(step, world.rank, world.size, CAPTION_MULTIPLE if on_gpu and recipe.model.mask_padding else 1)
        height, width = stored.sides
        grid = height // self.config.patch_size, width // self.config.patch_size
        draw = partial(
            add_draws,
            edm=self.state.edm,
            seed=recipe.seed,
            step=step,
            grid=grid,
            mask_ratio=phase.mask_ratio_at(step_in_phase),
            caption_dropout=recipe.diffusion.caption_dropout,
            path_drop=METHODS[self.config.routing].path_drop,
            mask_pattern=phase.mask_pattern,
        )
        numbers, size = range(world.rank, phase.batch_size, world.size), recipe.engine.micro_batch or len(stored)
        undrawn = [
            UndrawnBatch(part.pin() if on_gpu else part, partial(draw, numbers=numbers[index * size : (index + 1) * size]))
            for index, part in enumerate(stored.split(size))
        ]
        parts: list[MicroBatch] = [*undrawn] if on_gpu else [part.to(world.device) for part in undrawn]
        return Share(parts, math.prod(grid), stored.text.numbers_BRV.shape[1])

    def _queue_step(self, reader: Loader[Share], stop: StopRequests) -> QueuedStep:
        """Give the device one more step."""
        phase, step_in_phase = self.recipe.phase_at(self.step)
        self.state.optimizers.set_rate(learning_rate(phase, step_in_phase))
        started = time.monotonic()
        share = reader.next()
        waited = time.monotonic() - started
        reading = self.state.learn(share.parts, self.step, phase.grad_clip, self.guard, (stop.by_machine, stop.by_user))
        self.step += 1
        return QueuedStep(self.step, phase, step_in_phase, share, waited, reading)

    def _hear_of(self, done: QueuedStep, meters: Meters) -> tuple[StepSums, Verdict]:
        """Read what came of a step, waiting for it if need be; tell what was wrong with it; add it to the meters."""
        sums, verdict = what_happened(done.reading.values())
        rise = self.guard.note(verdict, done.phase.name, done.number - 1)
        if verdict.objection:
            self._warn(f"Step {done.number} was not taken: {verdict.objection}. That makes {self.guard.skipped} of {done.number} steps.")
        if rise:
            self._warn(rise)
        flops = self.work.of_step(done.phase, done.step_in_phase, done.share.tokens, done.share.caption_tokens)
        meters.step(done.phase.name, done.number, sums, flops, done.waited, verdict.taken)
        return sums, verdict

    def _something_is_due(self) -> bool:
        """Whether something needs the weights as they are after the newest step, and so must wait for it."""
        record = self.recipe.record
        wanted = [record.checkpoint_every]
        wanted += [record.held_out_every] if self.held_out else []
        wanted += [record.samples_every] if record.sample_prompts else []
        return any(_due(self.step, every) for every in [*wanted, record.quality_every])

    def _roll_back(self, verdict: Verdict) -> None:
        """After several steps in a row that were not taken: to the weights of a checkpoint. The data goes on."""
        self.saver.finish()
        checkpoint = self._earlier_checkpoint()
        if checkpoint is None:
            raise DivergedError(
                f"{self.recipe.guard.rollback_after} steps in a row, up to step {self.step}, could not be taken ({verdict.objection}), and "
                "there is no earlier checkpoint that helps. Resume with a lower learning rate (--accept-changes), or look at the data of "
                "these steps."
            )
        self._warn(f"Back to the weights of step {checkpoint.step}; the data goes on from step {self.step}.")
        self.state.load(checkpoint)
        self.guard.roll_back(checkpoint.state["guard"])

    def _earlier_checkpoint(self) -> Checkpoint | None:
        """The newest one; if the last rollback was to that and did not help, the one before it."""
        newest = self.saver.last_saved
        if newest != self._rolled_back_since:
            self._rolled_back_since, self._rollbacks_here = newest, 0
        self._rollbacks_here += 1
        if self._rollbacks_here > MAX_ROLLBACKS:
            return None
        return newest_whole(self.run, self.world, self._warn, skip=self._rollbacks_here - 1)

    def _measure(self, last: bool, in_haste: bool) -> dict[str, Any]:
        """What is measured now and then, if it is time. All processes must call this."""
        record = self.recipe.record
        measured: dict[str, Any] = {}
        if self.held_out and (_due(self.step, record.held_out_every) or last):
            measured |= self.held_out.measure(self.state.gradients.current_loss(), self.recipe.engine.compile)
        if self.quality and (_due(self.step, record.quality_every) or last) and not in_haste:
            figures = self.quality.measure(self.state.drawing_model())
            self.console.print(self.quality.in_words(self.step, figures))
            measured |= figures
        return measured

    def _write_metrics(self, meters: Meters, measured: dict[str, Any], done: QueuedStep, grad_norm: float) -> None:
        numbers: dict[str, Any] = meters.read()
        if self.record is None:
            return
        phase, step_in_phase = done.phase, done.step_in_phase
        seconds_left = meters.seconds_left(self.work.after(done.number, done.share.tokens, done.share.caption_tokens))
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
        meters.show(in_words(*shown))

    def _status(self, state: str, reason: str | None = None) -> None:
        if self.record is None:
            return
        keys = ("phase", "loss", "images_per_second", "seconds_left")
        values = {key: self._last.get(key) for key in keys}
        counts = {"skipped": self.guard.skipped, "rollbacks": self.guard.rollbacks, "checkpoints_failed": self.saver.failed}
        self.record.status(state, reason, step=self.step, total_steps=self.recipe.total_steps, **values, **self.cost.so_far(), **counts)

    def _save(self, in_haste: bool = False) -> None:
        """Begin a checkpoint. `in_haste`, before the machine is taken away, only what resuming needs.

        Weights that are no numbers are never saved: the older checkpoints are what a rollback needs.
        """
        if not self.state.is_finite():
            self._warn(f"Some weights are not finite after step {self.step}: no checkpoint of them.")
            return
        position = {"images_seen": self.recipe.samples_before(self.step), "guard": self.guard.state(), **self.cost.so_far()}
        description = describe(self.recipe, self.config, self.data, self.mixture.sets)
        exports = [] if in_haste else ["model", *self.state.averages]
        self.saver.save(self.step, self.state.tensors(), {**description, **position}, exports)

    def _sample(self) -> None:
        """Write a grid of the recipe's prompts to samples/. All processes gather the weights, and each draws some."""
        description = describe(self.recipe, self.config, self.data, self.mixture.sets)
        grid = self.prompt_grid.draw(self.state.drawing_model(), description, self.step)
        if self.record is not None:
            self.record.picture(lambda path: save_png(grid, path), self.step)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """However training ends, the record says so."""
        self._status("running")
        try:
            yield
            self._status("finished")
        except StoppedError as error:
            self._status("stopped", str(error))
            raise
        except BaseException as error:
            self._status("failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            if self.record is not None:
                self.record.close()

    def _end(self, sums: StepSums) -> None:
        """Wait for the last checkpoint, and say how it went."""
        saved = self.saver.finish() and self.saver.last_saved == self.step  # weights that are not finite were not even begun to be saved
        replaced = sum(self.world.gather(self.mixture.replaced))
        if replaced:
            self._warn(f"{replaced} samples were damaged, and others took their places: encode the data again.")
        if self.guard.level.warning:
            self._warn(self.guard.level.warning)  # again: it may have been told days ago
        if self.step < self.recipe.total_steps:
            where = f"saved in {self.run}" if saved else "NOT saved (see above)"
            code = EXIT_BY_USER if sums.stop_by_user else EXIT_RESTART
            raise StoppedError(f"Stopped at step {self.step} of {self.recipe.total_steps}, {where}. Go on with --resume.", code)
        if not saved:
            cause = UserError if self.state.is_finite() else DivergedError
            raise cause(f"Trained to the end, but the last checkpoint is not in {self.run} (see above): put that right, then --resume.")

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.state.load(checkpoint)
        self.guard.restore(checkpoint.state["guard"])
        self.step = checkpoint.step
        self.cost.earlier_hours = max(self.cost.earlier_hours, checkpoint.state["gpu_hours"])
        self.cost.earlier_dollars = max(self.cost.earlier_dollars, checkpoint.state["dollars"] or 0.0)

    def _warn(self, sentence: str) -> None:
        self.console.print(styled(sentence, "yellow"))

    def _welcome(self) -> None:
        """Say what begins, and note it in the record."""
        world, data = self.world, fingerprints(self.recipe, self.mixture.sets)
        with world.together():
            if self.record is not None:
                machine = {"world_size": world.size, "device": device_name(world.device), "price_per_hour": self.cost.price_per_hour}
                self.record.started(data, {**machine, "from_step": self.step})
        text = greeting(self.recipe, self.run, self.mixture.sets, self.state, self.step, world)
        self.console.print(joined(text, f" Utilisation is against {self.peak / 1e12:.3g} TFLOP/s, {self.peak_source}."))


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
