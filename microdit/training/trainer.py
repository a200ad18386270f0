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
from microdit.data.latents import Batch, refuse_strangers
from microdit.distributed import World
from microdit.errors import EXIT_BY_USER, EXIT_RESTART, StoppedError, UserError
from microdit.grids import draw_grid, save_png
from microdit.pipeline import Pipeline, model_of
from microdit.recipe import PhaseRecipe, Recipe
from microdit.training.chips import peak_flops
from microdit.training.cost import Cost
from microdit.training.draws import TrainingBatch, add_draws
from microdit.training.guard import Guard
from microdit.training.held_out import HeldOut
from microdit.training.loading import Loader
from microdit.training.memory import keep_freed_memory
from microdit.training.meters import Meters, in_words
from microdit.training.mixture import open_mixture
from microdit.training.optim import learning_rate
from microdit.training.parallel import compute_dtype
from microdit.training.record import RunRecord, device_name, last_cost
from microdit.training.saving import Saver, newest_whole, whole
from microdit.training.start import describe, find_checkpoint, fingerprints, first_weights, model_config, refuse_misfits
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
        self.held_out = self._open_held_out()
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
                rate = learning_rate(phase, step_in_phase)
                self.state.optimizers.set_rate(rate)

                started = time.monotonic()
                batch = reader.next()
                waited = time.monotonic() - started
                sums = self._forward_backward(batch, phase, stop)
                grad_norm = self.state.clip(phase.grad_clip)
                objection = self.guard.objection(sums.loss, grad_norm)
                if objection is None:
                    self.guard.accept(sums.loss)
                    self.state.take_step(self.step)
                self.state.optimizers.zero_grad()
                self.step += 1
                if objection is not None:
                    self._skip(objection)

                last, stopping = self.step == total, sums.stop_by_machine or sums.stop_by_user
                tokens, caption_tokens = self._tokens(batch), batch.text_BLE.shape[1]
                flops = self.work.of_step(phase, step_in_phase, tokens, caption_tokens)
                meters.step(phase.name, self.step, sums, flops, waited, objection is None)
                if self._due(recipe.record.metrics_every) or self._due_held_out() or last or stopping:
                    left = self.work.after(self.step, tokens, caption_tokens)
                    self._write_metrics(meters, phase, step_in_phase, rate, grad_norm, left)
                if (self._due(recipe.record.checkpoint_every) and not self.guard.in_a_row) or last or stopping:
                    self._save(in_haste=sums.stop_by_machine and not last)
                if recipe.record.sample_prompts and (self._due(recipe.record.samples_every) or last):
                    self._sample()
                self.saver.check()
                if stopping:
                    break
            self._end(sums)

    def _batch(self, step: int) -> TrainingBatch:
        """This process's share of the samples of a step, and their draws."""
        diffusion, world = self.recipe.diffusion, self.world
        phase, step_in_phase = self.recipe.phase_at(step)
        batch = self.mixture.batch(step, world.rank, world.size)
        numbers = range(world.rank, phase.batch_size, world.size)
        ratio = phase.mask_ratio_at(step_in_phase)
        return add_draws(batch, self.state.edm, self.recipe.seed, step, numbers, self._tokens(batch), ratio, diffusion.caption_dropout)

    def _forward_backward(self, batch: TrainingBatch, phase: PhaseRecipe, stop: StopRequests) -> StepSums:
        """Gradients of the mean loss over the global batch, micro-batch by micro-batch."""
        tally = Tally(self.world.device)
        parts = batch.split(self.recipe.engine.micro_batch or len(batch))
        for index, part in enumerate(parts):
            part = part.to(self.world.device)
            with self._no_sync_before_the_last(index, len(parts)):
                loss_B = self.state.loss(part, phase.routing)
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
            raise UserError(
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

    def _write_metrics(
        self, meters: Meters, phase: PhaseRecipe, step_in_phase: int, rate: float, grad_norm: float, flops_left: float
    ) -> None:
        measured = self.held_out.measure(self.state.loss) if self.held_out and self._due_held_out() else {}
        numbers: dict[str, Any] = meters.read()
        if self.record is None:
            return
        dollars, seconds_left = self.cost.dollars(), meters.seconds_left(flops_left)
        values = {
            "step": self.step,
            "phase": phase.name,
            **numbers,
            **measured,
            "learning_rate": rate,
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
        cost = {"gpu_hours": self.cost.gpu_hours(), "dollars": self.cost.dollars()}
        self.record.status(state, reason, step=self.step, total_steps=self.recipe.total_steps, **values, **cost, **counts)

    def _save(self, in_haste: bool = False) -> None:
        """Begin a checkpoint. `in_haste`, before the machine is taken away, only what resuming needs.

        Weights that are no numbers are never saved: the older checkpoints are what a rollback needs.
        """
        if not self.state.is_finite():
            self._warn(f"Some weights are not finite after step {self.step}: no checkpoint of them.")
            return
        costs = {"gpu_hours": self.cost.gpu_hours(), "dollars": self.cost.dollars()}
        position = {"images_seen": self.recipe.samples_before(self.step), "guard": self.guard.state(), **costs}
        description = describe(self.recipe, self.config, self.data, self.mixture.sets)
        exports = [] if in_haste else ["model", *self.state.averages]
        self.saver.save(self.step, self.state.tensors(), {**description, **position}, exports)

    def _sample(self) -> None:
        """Write a grid of the recipe's prompts to samples/, with the averaged weights. All processes gather, the first one draws."""
        averages = next(iter(self.state.averages.values()), None)
        source = averages.averages if averages else {name: weight.detach() for name, weight in self.state.model.named_parameters()}
        weights = {name: whole(tensor) for name, tensor in source.items()}
        if self.record is not None:
            record, prompts = self.recipe.record, list(self.recipe.record.sample_prompts)
            description = describe(self.recipe, self.config, self.data, self.mixture.sets)
            pipeline = Pipeline.around(model_of(self.config, weights), description)
            images = pipeline(prompts, record.sample_steps, record.guidance_scale, self.recipe.seed)
            title = f"{self.recipe.name}, step {self.step}, {self.recipe.samples_before(self.step):,} images seen"
            self.record.picture(lambda path: save_png(draw_grid(images, prompts, title=title), path), self.step)
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
        if self.step < self.recipe.total_steps:
            where = f"saved in {self.run}" if saved else "NOT saved (see above)"
            code = EXIT_BY_USER if sums.stop_by_user else EXIT_RESTART
            raise StoppedError(f"Stopped at step {self.step} of {self.recipe.total_steps}, {where}. Go on with --resume.", code)
        if not saved:
            raise UserError(f"Trained to the end, but the last checkpoint is not in {self.run} (see above): put that right, then --resume.")

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.state.load(checkpoint)
        self.guard.restore(checkpoint.state["guard"])
        self.step = checkpoint.step
        self.cost.earlier_hours = max(self.cost.earlier_hours, checkpoint.state["gpu_hours"])
        self.cost.earlier_dollars = max(self.cost.earlier_dollars, checkpoint.state["dollars"] or 0.0)

    def _open_held_out(self) -> HeldOut | None:
        if self.recipe.data.held_out is None:
            return None
        held_out = HeldOut(
            Path(self.recipe.data.held_out), self.data.resolution, self.recipe.record.held_out_samples, self.state.edm, self.world
        )
        refuse_strangers([self.data, held_out.data])
        return held_out

    def _due(self, every: int) -> bool:
        return self.step % every == 0

    def _due_held_out(self) -> bool:
        return self.held_out is not None and (self._due(self.recipe.record.held_out_every) or self.step == self.recipe.total_steps)

    def _tokens(self, batch: Batch | TrainingBatch) -> int:
        """Patches of a picture."""
        height, width = batch.latents_BCHW.shape[-2:]
        return (height // self.config.patch_size) * (width // self.config.patch_size)

    def _warn(self, sentence: str) -> None:
        self.console.print(f"[yellow]{escape(sentence)}[/]")

    def _welcome(self) -> None:
        """Say what begins, and note it in the record."""
        world, data = self.world, fingerprints(self.recipe, self.mixture.sets)
        if self.record is not None:
            machine = {"world_size": world.size, "device": device_name(world.device), "price_per_hour": self.cost.price_per_hour}
            self.record.started(data, {**machine, "from_step": self.step})
        start = (
            f"from step {self.step}" if self.step else "from scratch" if self.recipe.init_from is None else f"from {self.recipe.init_from}"
        )
        samples = " + ".join(f"{len(encoded):,}" for encoded in self.mixture.sets)
        ways = {"none": "", "ddp": f", copied to {world.size} processes", "fsdp": f", sharded over {world.size} processes"}
        self.console.print(
            f"[bold]{self.recipe.name}[/]: {self.state.parameters / 1e6:.1f} M parameters on {samples} samples, "
            f"{self.recipe.total_steps:,} steps {start}, into {self.run}{ways[self.state.sharding]}. "
            f"Utilisation is against {self.peak / 1e12:.3g} TFLOP/s, {self.peak_source}."
        )
