"""The training loop.

Notable:
- what step n does depends on the recipe's seed and on n alone (samples, noise, masks, dropped captions), so resuming needs no
  state of random generators, and a run cut off anywhere goes on with the same losses to the last bit;
- phases share one optimizer and one average; each has its own mask ratio, batch and learning-rate schedule;
- Ctrl-C and SIGTERM end the step, write a checkpoint, and say how to go on.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from microdit.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    optimizer_tensors,
    refuse_other_architecture,
    restore_optimizer,
    save_checkpoint,
)
from microdit.data.latents import EncodedSet
from microdit.diffusion.edm import EDM, draw_sigma, edm_loss
from microdit.errors import UserError
from microdit.files import write_aside
from microdit.grids import draw_grid, save_png
from microdit.model.microdit import MicroDiT, ModelConfig
from microdit.model.routing import random_keep_ids
from microdit.model.sizes import resolve
from microdit.pipeline import Pipeline
from microdit.recipe import PhaseRecipe, Recipe
from microdit.training.ema import EMA
from microdit.training.memory import keep_freed_memory
from microdit.training.meters import Meters
from microdit.training.mixture import open_mixture
from microdit.training.optim import learning_rate, make_adamw, set_learning_rate


class Trainer:
    """A recipe, its run folder, and the state that training changes: model, optimizer, average, step."""

    def __init__(self, recipe: Recipe, run: Path, console: Console, resume: bool = False):
        """Raises UserError if the run exists and `resume` is not set, or if its checkpoint does not fit the recipe."""
        self.recipe, self.run, self.console = recipe, run, console
        self.mixture = open_mixture(recipe, self._warn)
        self.data = self.mixture.sets[0]  # the others are of the same shapes and encoders
        self.edm = EDM(recipe.diffusion.sigma_data, recipe.diffusion.P_mean, recipe.diffusion.P_std)
        checkpoint = self._find_checkpoint(resume)
        config = model_config(recipe, self.data)
        if checkpoint:
            refuse_other_architecture(checkpoint, config)
            _refuse_other_encoders(checkpoint, self.data)
        torch.manual_seed(recipe.seed)  # of the initial weights; every later draw has its own generator
        self.model = MicroDiT(config).train()
        self.optimizer = make_adamw(self.model, recipe.optimizer)
        self.ema = EMA(self.model, recipe.ema_decay)
        self.step = 0
        if checkpoint:
            self._restore(checkpoint)
        write_aside(run / "recipe.yaml", recipe.to_yaml().encode())

    def train(self) -> None:
        """From where it stands to the end of the last phase."""
        recipe, record = self.recipe, self.recipe.record
        keep_freed_memory()
        self._welcome()
        with Meters(self.run, self.step, recipe.total_steps, self.console) as meters, _stop_requests() as stop:
            while self.step < recipe.total_steps and not stop:
                phase, step_in_phase = recipe.phase_at(self.step)
                rate = learning_rate(phase, step_in_phase)
                set_learning_rate(self.optimizer, rate)

                loss = self.loss(phase)
                loss.backward()
                grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), phase.grad_clip, foreach=True)
                if not torch.isfinite(grad_norm):
                    raise UserError(
                        f"The loss or its gradient is not finite at step {self.step} (loss {loss.item()}). "
                        "Nothing was changed by it: resume from the last checkpoint with a lower learning rate."
                    )
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.ema.update(self.step)

                self.step += 1
                last = self.step == recipe.total_steps
                meters.step(phase.name, self.step, loss.item(), phase.batch_size)
                if self.step % record.metrics_every == 0 or last:
                    meters.record(self.step, phase.name, rate, grad_norm.item())
                if self.step % record.checkpoint_every == 0 or last or stop:
                    self.save()
                if record.sample_prompts and (self.step % record.samples_every == 0 or last):
                    self.sample()
        if self.mixture.replaced:
            self._warn(f"{self.mixture.replaced} samples were damaged, and others took their places: encode the data again.")
        if stop and self.step < recipe.total_steps:
            raise UserError(f"Stopped at step {self.step} of {recipe.total_steps}, saved in {self.run}. Go on with --resume.")

    def loss(self, phase: PhaseRecipe) -> Tensor:
        """The loss of the next step. All that is random in it comes from (seed, step)."""
        diffusion = self.recipe.diffusion
        batch = self.mixture.batch(self.step)
        B, _, height, width = batch.latents_BCHW.shape
        generator = torch.Generator().manual_seed(_mix(self.recipe.seed, self.step))
        sigma_B = draw_sigma(self.edm, B, generator)
        noise_BCHW = torch.randn(batch.latents_BCHW.shape, generator=generator)
        kept_B11 = (torch.rand(B, 1, 1, generator=generator) >= diffusion.caption_dropout).float()
        tokens = (height // self.model.config.patch_size) * (width // self.model.config.patch_size)
        keep_ids_BK = random_keep_ids(B, tokens, phase.mask_ratio, generator)

        mask_BL = batch.text_mask_BL if self.recipe.model.mask_padding else None
        caption = self.model.embed_caption(batch.text_BLE * kept_B11, mask_BL)
        return edm_loss(self.model, self.edm, batch.latents_BCHW, caption, sigma_B, noise_BCHW, keep_ids_BK, phase.routing).mean()

    def save(self) -> None:
        """Write a checkpoint. Raises UserError if the disk refuses."""
        tensors = {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.model),
        }
        save_checkpoint(self.run, self.step, tensors, self._state(), self.recipe.record.keep_checkpoints)

    def sample(self) -> None:
        """Write a grid of the recipe's prompts to samples/, with the averaged weights."""
        record = self.recipe.record
        prompts = list(record.sample_prompts)
        pipeline = Pipeline.around(self.ema.model, self._state())
        images = pipeline(prompts, record.sample_steps, record.guidance_scale, self.recipe.seed)
        title = f"{self.recipe.name}, step {self.step}, {self._samples_seen():,} images seen"
        save_png(draw_grid(images, prompts, title=title), self.run / "samples" / f"step-{self.step:08d}.png")

    def _find_checkpoint(self, resume: bool) -> Checkpoint | None:
        if not resume and self.run.exists() and any(self.run.iterdir()):
            raise UserError(f"{self.run} holds a run already: go on with --resume, or choose another --out.")
        return latest_checkpoint(self.run, self._warn) if resume else None

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.model.load_state_dict(checkpoint.tensors("model"))
        self.ema.model.load_state_dict(checkpoint.tensors("ema"))
        restore_optimizer(self.optimizer, self.model, checkpoint.tensors("optimizer"))
        self.step = checkpoint.step

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors."""
        return {
            "model": asdict(self.model.config),
            "edm": asdict(self.edm),
            "mask_padding": self.recipe.model.mask_padding,
            "data": self.data.summary(),
            "images_seen": self._samples_seen(),
        }

    def _samples_seen(self) -> int:
        """The position in the data: all batches before this step."""
        seen, left = 0, self.step
        for phase in self.recipe.phases:
            seen += min(left, phase.steps) * phase.batch_size
            left -= min(left, phase.steps)
        return seen

    def _warn(self, sentence: str) -> None:
        self.console.print(f"[yellow]{sentence}[/]")

    def _welcome(self) -> None:
        parameters = sum(w.numel() for w in self.model.parameters())
        start = f"from step {self.step}" if self.step else "from scratch"
        samples = " + ".join(f"{len(encoded):,}" for encoded in self.mixture.sets)
        self.console.print(
            f"[bold]{self.recipe.name}[/]: {parameters / 1e6:.1f} M parameters on {samples} samples, "
            f"{self.recipe.total_steps:,} steps {start}, into {self.run}"
        )


def model_config(recipe: Recipe, data: EncodedSet) -> ModelConfig:
    """The recipe's model for this data's latents and captions. Raises UserError if the patches do not fit."""
    channels = data.latent_shape()[0]
    p = recipe.model.patch_size
    for bucket in range(len(data.bucket_sizes)):
        _, height, width = data.latent_shape(bucket)
        if height % p or width % p:
            raise UserError(f"model.patch_size {p} does not divide the {height} x {width} latents of {data.folder}.")
    return resolve(
        recipe.model,
        patch_size=p,
        in_channels=channels,
        caption_channels=data.card["text_channels"],
        expert_capacity=recipe.model.expert_capacity,
        bias=recipe.model.bias,
        position_scale=recipe.model.position_scale,
    )


def _refuse_other_encoders(checkpoint: Checkpoint, data: EncodedSet) -> None:
    for key in ("autoencoder", "text_encoder"):
        then, now = checkpoint.state["data"][key], data.card[key]
        if then["fingerprint"] != now["fingerprint"]:
            raise UserError(
                f"The run was trained on data of the {key} {then['name']} ({then['fingerprint']}), and {data.folder} is of {now['name']} "
                f"({now['fingerprint']}): train anew with another --out, or encode with the old one."
            )


def _mix(seed: int, step: int) -> int:
    """One generator seed for each (seed, step), in 63 bits."""
    return (seed * 0x9E3779B97F4A7C15 + step) % (1 << 63)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C or SIGTERM. A second Ctrl-C ends the program at once."""
    requests: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        requests.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
