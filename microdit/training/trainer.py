"""The training loop.

Notable:
- what step n does depends on the recipe's seed and on n alone (samples, noise, masks, dropped captions), so resuming needs no
  state of random generators, and a run cut off anywhere goes on with the same losses to the last bit;
- the phases of a recipe share one optimizer and averages; each has its own mask ratio, batch and learning-rate schedule;
- Ctrl-C and SIGTERM end the step, write a checkpoint, and say how to go on;
- a step whose loss is not finite or jumps is not taken; after several in a row the weights go back to a checkpoint, the data goes on;
- all processes run the same loop; the first one alone keeps the record.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from torch.nn.parallel import DistributedDataParallel

from microdit.checkpoint import Checkpoint
from microdit.data.latents import Batch
from microdit.devices import device_name
from microdit.distributed import World
from microdit.errors import EXIT_BY_USER, EXIT_RESTART, DivergedError, StoppedError, UserError
from microdit.grids import save_png
from microdit.model.routing import METHODS
from microdit.recipe import PhaseRecipe, Recipe
from microdit.training.chips import peak_flops
from microdit.training.cost import Cost
from microdit.training.draws import TrainingBatch, add_draws
from microdit.training.guard import Guard
from microdit.training.held_out import open_held_out
from microdit.training.loading import Loader
from microdit.training.memory import keep_freed_memory
from microdit.training.meters import Meters, in_words
from microdit.training.mixture import open_mixture
from microdit.training.optim import learning_rate
from microdit.training.parallel import compute_dtype
from microdit.training.quality import open_quality
from microdit.training.record import RunRecord, last_cost
from microdit.training.samples import draw_samples
from microdit.training.saving import Saver, newest_whole
from microdit.training.start import describe, find_checkpoint, fingerprints, first_weights, greeting, model_config, refuse_misfits
from microdit.training.state import TrainingState
from microdit.training.stopping import StopRequests, stop_requests
from microdit.training.tally import StepSums, Tally
from microdit.training.work import Work

AHEAD = 2  # batches read before they are needed
MAX_ROLLBACKS = 3  # without a checkpoint between them


class Trainer:
    """A recipe, its run folder, and the state that training changes."""

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        console: Console,
        world: World,
        resume: bool = False,
        accept_changes: bool = False,
        price_per_hour: float | None = None,
    ):
        """Raises UserError if the run exists and `resume` is not set, or if recipe, data, checkpoint and processes do not fit together."""
        self.recipe, self.run, self.console, self.world = recipe, run, console, world
        self.mixture = open_mixture(recipe, self._warn)
        self.data = self.mixture.sets[0]  # the others are of the same shapes and encoders
        refuse_misfits(recipe, self.mixture.sets, world)
        checkpoint = find_checkpoint(run, recipe, self.mixture.sets, world, self._warn, resume, accept_changes)
        hours, dollars = last_cost(run) if world.is_main else (0.0, 0.0)
        self.cost = Cost(world.size, price_per_hour, hours, dollars)
        self.config = model_config(recipe, self.data)
        weights = None if checkpoint else first_weights(recipe, run, self.config, self.data)
        self.state = TrainingState(recipe, self.config, world, weights, fresh=checkpoint is None)
        self.guard = Guard(recipe.guard)
        self.step = 0
        self._rollbacks_here = 0  # since the last checkpoint, which was of this step
        self._rolled_back_since: int | None = None
        self._last: dict[str, Any] = {}  # metrics
        if checkpoint:
            self._restore(checkpoint)
        self.held_out = open_held_out(recipe, self.data, self.state.edm, world)
        self.quality = open_quality(recipe, self.held_out.data if self.held_out else self.data, self.state.edm, world)
        self.saver = Saver(run, world, recipe.record.keep_checkpoints, recipe.record.keep_every, self._warn)
        if checkpoint:
            self.saver.last_saved = checkpoint.step
        self.record = RunRecord(run, recipe, self._warn, self.step) if world.is_main else None
        self.work = Work(recipe, self.config)
        self.peak, self.peak_source = peak_flops(world.device, compute_dtype(recipe.engine, world.device))

    def train(self) -> None:
        """From where it stands to the end of the last phase. Raises StoppedError if it was asked to stop, UserError if it cannot go on."""
        recipe, total = self.recipe, self.recipe.total_steps
        keep_freed_memory()
        self._welcome()
        batches = Loader(self._batch, range(self.step, total), AHEAD, recipe.data.read_timeout, self.mixture.where)
        meters = Meters(self.step, total, self.peak, self.world.size, self.world.device, self.console)
        sums = StepSums([], [])
        with self._reported(), meters, stop_requests() as stop, batches as reader:
            while self.step < total:
                phase, step_in_phase = recipe.phase_at(self.step)
                self.state.optimizers.set_rate(learning_rate(phase, step_in_phase))

                started = time.monotonic()
                batch = reader.next()
                waited = time.monotonic() - started
                sums = self._forward_backward(batch, stop)
                grad_norm = self.state.clip(phase.grad_clip)
                objection = self.guard.objection(sums.loss, grad_norm)
                if objection is None:
                    rise = self.guard.accept(sums.loss, phase.name, self.step)
                    self.state.take_step(self.step)
                self.state.optimizers.zero_grad()
                self.step += 1
                if objection is not None:
                    self._skip(objection)
                elif rise is not None:
                    self._warn(rise)

                last, stopping = self.step == total, sums.stop_by_machine or sums.stop_by_user
                tokens, caption_tokens = math.prod(self._grid(batch)), batch.text_BLE.shape[1]
                flops = self.work.of_step(phase, step_in_phase, tokens, caption_tokens)
                meters.step(phase.name, self.step, sums, flops, waited, objection is None)
                in_haste = sums.stop_by_machine and not last  # before the machine is taken away
                measured = self._measure(last, in_haste)
                if self._due(recipe.record.metrics_every) or measured or last or stopping:
                    left = self.work.after(self.step, tokens, caption_tokens)
                    self._write_metrics(meters, measured, phase, step_in_phase, grad_norm, left)
                if (self._due(recipe.record.checkpoint_every) and not self.guard.in_a_row) or last or stopping:
                    self._save(in_haste)
                if recipe.record.sample_prompts and (self._due(recipe.record.samples_every) or last):
                    self._sample()
                self.saver.check()
                if stopping:
                    break
            self._end(sums)

    def _batch(self, step: int) -> TrainingBatch:
        """This process's share of the samples of a step, and their draws."""
        recipe, world = self.recipe, self.world
        phase, step_in_phase = recipe.phase_at(step)
        batch = self.mixture.batch(step, world.rank, world.size)
        numbers = range(world.rank, phase.batch_size, world.size)
        shares = (phase.mask_ratio_at(step_in_phase), recipe.diffusion.caption_dropout, METHODS[self.config.routing].path_drop)
        return add_draws(batch, self.state.edm, recipe.seed, step, numbers, self._grid(batch), *shares, phase.mask_pattern)

    def _forward_backward(self, batch: TrainingBatch, stop: StopRequests) -> StepSums:
        """Gradients of the mean loss over the global batch, micro-batch by micro-batch."""
        tally = Tally(self.world.device)
        parts = batch.split(self.recipe.engine.micro_batch or len(batch))
        for index, part in enumerate(parts):
            part = part.to(self.world.device)
            with self._no_sync_before_the_last(index, len(parts)):
                loss_B = self.state.loss(part)
                (loss_B.sum() / len(batch)).backward()
            tally.add(loss_B, part.sigma_B, self.state.edm)
        tally.add_stops(stop.by_machine, stop.by_user)
        self.world.sum(tally.sums)
        return tally.result()

    def _no_sync_before_the_last(self, index: int, parts: int) -> Any:
        """DDP sums gradients over processes once a step. FSDP does so each time, since whole gradients are what it has no room for."""
        loss = self.state.loss
        return loss.no_sync() if isinstance(loss, DistributedDataParallel) and index < parts - 1 else nullcontext()

    def _skip(self, objection: str) -> None:
        """Count a step that was not taken; after several in a row, go back to a checkpoint."""
        time_to_go_back = self.guard.skip()
        self._warn(f"Step {self.step} was not taken: {objection}. That makes {self.guard.skipped} of {self.step} steps.")
        if not time_to_go_back:
            return
        in_a_row = self.guard.in_a_row
        self.saver.finish()
        checkpoint = self._earlier_checkpoint()
        if checkpoint is None:
            raise DivergedError(
                f"{in_a_row} steps in a row, up to step {self.step}, could not be taken ({objection}), and there is no earlier checkpoint "
                "that helps. Resume with a lower learning rate (--accept-changes), or look at the data of these steps."
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
        if self.held_out and (self._due(record.held_out_every) or last):
            measured |= self.held_out.measure(self.state.loss)
        if self.quality and (self._due(record.quality_every) or last) and not in_haste:
            figures = self.quality.measure(self.state.drawing_model())
            self.console.print(self.quality.in_words(self.step, figures), highlight=False)
            measured |= figures
        return measured

    def _write_metrics(
        self, meters: Meters, measured: dict[str, Any], phase: PhaseRecipe, step_in_phase: int, grad_norm: float, flops_left: float
    ) -> None:
        numbers: dict[str, Any] = meters.read()
        if self.record is None:
            return
        dollars, seconds_left = self.cost.dollars(), meters.seconds_left(flops_left)
        values = {
            "step": self.step,
            "phase": phase.name,
            **numbers,
            **measured,
            "learning_rate": learning_rate(phase, step_in_phase),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "mask_ratio": phase.mask_ratio_at(step_in_phase),
            "images_seen": self.recipe.samples_before(self.step),
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
        """Write a grid of the recipe's prompts to samples/. All processes gather the weights, the first one draws."""
        model = self.state.drawing_model()
        if self.record is not None:
            grid = draw_samples(model, self.recipe, describe(self.recipe, self.config, self.data, self.mixture.sets), self.step)
            self.record.picture(lambda path: save_png(grid, path), self.step)
        self.world.wait_for_all()

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

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _grid(self, batch: Batch | TrainingBatch) -> tuple[int, int]:
        """Rows and columns of a picture's patches."""
        height, width = batch.latents_BCHW.shape[-2:]
        return height // self.config.patch_size, width // self.config.patch_size

    def _warn(self, sentence: str) -> None:
        self.console.print(f"[yellow]{escape(sentence)}[/]")

    def _welcome(self) -> None:
        """Say what begins, and note it in the record."""
        world, data = self.world, fingerprints(self.recipe, self.mixture.sets)
        if self.record is not None:
            machine = {"world_size": world.size, "device": device_name(world.device), "price_per_hour": self.cost.price_per_hour}
            self.record.started(data, {**machine, "from_step": self.step})
        text = greeting(self.recipe, self.run, self.mixture.sets, self.state, self.step, world)
        self.console.print(f"{text} Utilisation is against {self.peak / 1e12:.3g} TFLOP/s, {self.peak_source}.")
