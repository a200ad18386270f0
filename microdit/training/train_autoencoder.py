"""Training of small autoencoders: the icon autoencoder on emoji, and others on any source, from scratch or from weights that exist.

Notable:
- it is a diffusers `AutoencoderTiny` (deterministic, convolutional), so any diffusers user can load it;
- the loss is L1 on pixels and on their differences (edges), with noise added to the latents, so the decoder tolerates the small errors of
  a diffusion model; on a source, a perceptual distance is added (`evaluation/reconstruction.py`);
- a penalty pulls the latents to mean 0 and standard deviation 1 per channel, so one scaling factor serves all channels;
- of emoji, colours are permuted and images shifted at random, so that unseen colours and positions decode as well; other pictures are
  mirrored at random;
- training on a source continues where it was interrupted, with the same result.

Shape legend: N images, B images of a batch, C channels, H W height and width.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from microdit.data.decode import TargetSizes, prepare
from microdit.data.look import some_records
from microdit.data.pixels import normalise, to_tensor
from microdit.data.sources.base import Source
from microdit.data.sources.builtin import Split, emoji_images
from microdit.encoders.autoencoder import RECORD, DiffusersAutoencoder, load_autoencoder
from microdit.encoders.model_files import loading
from microdit.errors import UserError
from microdit.evaluation.reconstruction import PerceptualDistance, reconstruct
from microdit.io.console import QUIET, Reporter
from microdit.io.files import opened_aside, sha256_of, to_checked_json, write_aside
from microdit.reports.run_folder import RECONSTRUCTIONS

SIGMA_DATA = 0.9  # standard deviation of the scaled latents, as for the paper's SDXL latents (2407.15811, table of EDM settings)
STATE = "training.pt"  # an unfinished training, in the folder of the result
STATE_EVERY = 100  # steps
MOST_IMAGES = 20_000  # of a source; 250 MB at 64 x 64 pixels
DOWNSAMPLING = 8
HELD_OUT = 20  # every 20th image is held out
PERCEPTUAL_WEIGHT = 0.1  # beside an L1 loss of about 0.1, a distance of about 0.5 counts half
RATE_FROM_WEIGHTS = 5e-4  # learning rate with weights to begin with: 2e-3 makes them worse at first
SHOWN = 32  # held-out images that are measured and drawn


@dataclass(frozen=True)
class AutoencoderSettings:
    """Settings of an autoencoder's training, kept in its record."""

    width: int = 32  # channels of every convolution
    latent_channels: int = 8
    image_size: int = 64
    steps: int = 2600
    batch_size: int = 32
    learning_rate: float = 2e-3
    latent_noise: float = 0.15  # in standard deviations of the latents
    edge_weight: float = 1.0
    moment_weight: float = 0.1
    perceptual_weight: float = 0.0
    seed: int = 0


OnStep = Callable[[int, dict[str, float]], None]


def train_icon_autoencoder(out: Path, settings: AutoencoderSettings, on_step: OnStep) -> dict[str, float]:
    """Train on the emoji training split and write config, weights (float16) and record.json with checksums to `out`. Returns the figures.

    `on_step(step, {"loss": ...})` is called after every step.
    """
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    images_NCHW = load_emoji("train", settings.image_size)
    training = _Training(_build(settings), settings, _augment_emoji, lambda batch_N: images_NCHW[batch_N], len(images_NCHW))
    training.run(on_step)
    _scale(training.model, images_NCHW.split(64))
    figures = reconstruction_figures(training.model, settings.image_size)
    _write(out, training, figures, started, {})
    return figures


def train_on_source(
    source: Source,
    out: Path,
    settings: AutoencoderSettings,
    start: str | None = None,
    device: torch.device | str = "cpu",
    reporter: Reporter = QUIET,
) -> dict[str, Any]:
    """Train an autoencoder on the pictures of a source and write it to `out`, as `train_icon_autoencoder` does. Returns the figures.

    `start` names an AutoencoderTiny whose weights training begins with; its architecture replaces that of the settings. Up to MOST_IMAGES
    pictures are used, and every 20th is held out to measure PSNR and perceptual distance. An interrupted training continues behind its
    last saved step. `reconstructions.png` in `out` shows held-out pictures.

    Raises UserError if `out` holds an autoencoder already or another unfinished training, if the source has too few usable pictures, or if
    `start` is no AutoencoderTiny or does not fit the image size.
    """
    if (out / "config.json").exists():
        raise UserError(f"{out} holds an autoencoder already: choose another --out, or delete it.")
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    origin: dict[str, Any] = {"source": source.name, "from": None}
    model = _build(settings)
    if start is not None:
        model, origin["from"] = _start_from(start)
        settings = replace(settings, width=model.config.encoder_block_out_channels[0], latent_channels=model.config.latent_channels)
    if settings.image_size % DOWNSAMPLING:
        raise UserError(f"Images of {settings.image_size} pixels do not divide into latents of {DOWNSAMPLING}: take a multiple of it.")
    pixels_NHWC = load_pictures(source, settings.image_size, reporter)
    held_out = np.arange(min(HELD_OUT // 2, len(pixels_NHWC) - 1), len(pixels_NHWC), HELD_OUT)
    kept_NHWC = np.delete(pixels_NHWC, held_out, axis=0)
    perceptual = _perceptual(device, reporter) if settings.perceptual_weight else None
    if perceptual is None:
        settings = replace(settings, perceptual_weight=0.0)

    def batch_of(numbers_B: Tensor) -> Tensor:
        return normalise(kept_NHWC[numbers_B.numpy()])

    training = _Training(model.to(device), settings, _mirror, batch_of, len(kept_NHWC), perceptual)
    out.mkdir(parents=True, exist_ok=True)
    training.resume(out / STATE, {**asdict(settings), **origin, "pictures": len(pixels_NHWC)})
    with reporter.progress("autoencoder", settings.steps) as advance:
        advance(training.step)
        training.run(lambda step, losses: advance(1, f"loss {losses['loss']:.4f}"), out / STATE)
    model = training.model.cpu()
    _scale(model, (batch_of(numbers_B) for numbers_B in torch.arange(len(kept_NHWC)).split(64)))
    rounded = DiffusersAutoencoder(str(out), model.half().float(), "")  # as it is written
    made = reconstruct(rounded, [Image.fromarray(pixels_HWC) for pixels_HWC in pixels_NHWC[held_out[:SHOWN]]], settings.image_size)
    made.save(out / RECONSTRUCTIONS)
    figures = {"trained_pictures": len(kept_NHWC), "held_out": made.figures()}
    _write(out, training, figures, started, origin)
    (out / STATE).unlink(missing_ok=True)
    reporter.say(made.describe())
    if sentence := made.warning():
        reporter.warn(sentence)
    return figures


def load_pictures(source: Source, image_size: int, reporter: Reporter = QUIET) -> NDArray[np.uint8]:
    """Return up to MOST_IMAGES of the pictures that `data encode` would keep, (N, image_size, image_size, 3).

    They are the first ones of up to 20 parts of the source. Raises UserError if there are not even two.
    """
    sizes, kept, rejected = TargetSizes.of((image_size,), image_size, False, DOWNSAMPLING), [], Counter[str]()
    with reporter.progress(f"read {source.name}", None) as advance:
        for record in some_records(source, list(source.caption_weights), MOST_IMAGES):
            [outcome] = [record.problem] if record.problem else prepare(sizes, [record.image])
            if isinstance(outcome, str):
                rejected[outcome] += 1
            else:
                kept.append(outcome[1][0])
            advance(1)
    reasons = "; ".join(f"{count:,} rejected: {reason}" for reason, count in rejected.most_common())
    if len(kept) < 2:
        raise UserError(f"{source.name} has {len(kept)} usable pictures, and training needs two or more. {reasons or 'It has no others'}.")
    reporter.say(f"{len(kept):,} pictures of {source.name}{f' ({reasons})' if reasons else ''}.")
    return np.stack(kept)


def load_emoji(split: Split, image_size: int) -> Tensor:
    """Return all images of a split, (N, 3, image_size, image_size) in [-1, 1]."""
    return torch.stack([to_tensor(row.image, image_size) for row in emoji_images(split)])


@torch.no_grad()
def reconstruction_figures(model: AutoencoderTiny, image_size: int, splits: Iterable[Split] = ("train", "held_out")) -> dict[str, float]:
    """Return the mean absolute error (of 255 grey levels) and the PSNR in dB, for the images of each split."""
    figures = {}
    for split in splits:
        images_NCHW = load_emoji(split, image_size)
        decoded = [model.decode(model.encode(batch).latents).sample for batch in images_NCHW.split(64)]
        error_NCHW = (torch.cat(decoded).clamp(-1, 1) - images_NCHW) / 2
        mse_N = error_NCHW.square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        figures[f"{split}_mae_255"] = round(error_NCHW.abs().mean().item() * 255, 3)
        figures[f"{split}_psnr_db"] = round((-10 * mse_N.log10()).mean().item(), 3)
    return figures


class _Training:
    """A training in progress: the model, its optimizer and schedule, the random generator, and the steps and losses so far."""

    def __init__(
        self,
        model: AutoencoderTiny,
        settings: AutoencoderSettings,
        augment: Callable[[Tensor, torch.Generator], Tensor],
        batch_of: Callable[[Tensor], Tensor],
        count: int,
        perceptual: PerceptualDistance | None = None,
    ):
        """Prepare a training on `count` images, of which `batch_of` returns those with the given numbers (B,)."""
        self.model, self.settings, self.augment, self.batch_of, self.count = model, settings, augment, batch_of, count
        self.perceptual = perceptual
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), fused=True)
        rise = 0.05 if 0.05 * settings.steps != 1 else 0.1  # share of the steps; OneCycleLR divides by their number less one
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=settings.learning_rate, total_steps=settings.steps, pct_start=rise
        )
        self.step = 0
        self.log: list[dict[str, float]] = []
        self._plan: dict[str, Any] = {}

    def run(self, on_step: OnStep, save_to: Path | None = None) -> None:
        """Train to the last step, and save the state on the way if `save_to` names a file for it."""
        settings = self.settings
        while self.step < settings.steps:
            picked_B = torch.randint(self.count, (settings.batch_size,), generator=self.generator)
            loss = self._loss(self.augment(self.batch_of(picked_B), self.generator))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
            on_step(self.step, {"loss": loss.item()})
            if self.step % 100 == 0 or self.step == settings.steps:
                self.log.append({"step": self.step, "loss": round(loss.item(), 5)})
            if save_to is not None and self.step % STATE_EVERY == 0:
                self._save(save_to)

    def resume(self, path: Path, plan: dict[str, Any]) -> None:
        """Continue from a saved state, if there is one. Raises UserError if it belongs to a training with another plan."""
        self._plan = plan
        if not path.is_file():
            return
        with loading(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if different := [key for key in plan if state["plan"].get(key) != plan[key]]:
            raise UserError(
                f"{path.parent} holds an unfinished training that was started otherwise ({', '.join(different)} differ): "
                "repeat its command, delete it, or choose another --out."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        self.step, self.log = state["step"], state["log"]

    def _save(self, path: Path) -> None:
        state = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        state |= {"generator": self.generator.get_state(), "step": self.step, "log": self.log, "plan": self._plan}
        with opened_aside(path) as file:
            torch.save(state, file)

    def _loss(self, images_BCHW: Tensor) -> Tensor:
        settings, images_BCHW = self.settings, images_BCHW.to(self.model.device)
        latents_BCHW = self.model.encode(images_BCHW).latents
        noise_BCHW = torch.randn(latents_BCHW.shape, generator=self.generator).to(self.model.device)
        decoded_BCHW = self.model.decode(latents_BCHW + settings.latent_noise * noise_BCHW).sample
        mean_C = latents_BCHW.mean(dim=(0, 2, 3))
        std_C = latents_BCHW.std(dim=(0, 2, 3))
        moments = mean_C.square().mean() + (std_C - 1).square().mean()
        edges = sum(F.l1_loss(decoded_BCHW.diff(dim=axis), images_BCHW.diff(dim=axis)) for axis in (-1, -2))
        loss = F.l1_loss(decoded_BCHW, images_BCHW) + settings.edge_weight * edges + settings.moment_weight * moments
        if self.perceptual is None:
            return loss
        return loss + settings.perceptual_weight * self.perceptual(decoded_BCHW, images_BCHW).mean()


def _build(settings: AutoencoderSettings) -> AutoencoderTiny:
    widths = (settings.width,) * 4
    model = AutoencoderTiny(
        latent_channels=settings.latent_channels,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 3, 4),
        num_decoder_blocks=(4, 3, 1, 1),
    )
    return model.to(memory_format=torch.channels_last)  # 1.7x faster convolutions on the CPU than the default layout


def _augment_emoji(images_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Permute colours, flip, and shift by up to 6 pixels (padding with white) half of the images at random."""
    batch = []
    for image_CHW in images_NCHW:
        if torch.rand((), generator=generator) < 0.5:
            image_CHW = image_CHW[torch.randperm(3, generator=generator)]
            shift_y, shift_x = torch.randint(-6, 7, (2,), generator=generator).tolist()
            padded = F.pad(image_CHW, (6, 6, 6, 6), value=1.0)
            size = image_CHW.shape[-1]
            image_CHW = padded[:, 6 + shift_y : 6 + shift_y + size, 6 + shift_x : 6 + shift_x + size]
            if torch.rand((), generator=generator) < 0.5:
                image_CHW = image_CHW.flip(-1)
        batch.append(image_CHW)
    return torch.stack(batch).contiguous(memory_format=torch.channels_last)


def _perceptual(device: torch.device | str, reporter: Reporter) -> PerceptualDistance | None:
    """Load the perceptual distance; warn and return None if the package of its features is not installed."""
    try:
        return PerceptualDistance(device)
    except UserError as missing:
        reporter.warn(f"The loss has no perceptual term. {missing}")
        return None


def _mirror(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images at random."""
    mirrored_B = torch.rand(len(images_BCHW), generator=generator) < 0.5
    return torch.where(mirrored_B.view(-1, 1, 1, 1), images_BCHW.flip(-1), images_BCHW).contiguous(memory_format=torch.channels_last)


def _start_from(name: str) -> tuple[AutoencoderTiny, dict[str, str]]:
    """Load an autoencoder to be trained on, with its name and fingerprint. Raises UserError if it is none of ours."""
    loaded = load_autoencoder(name)
    if not isinstance(loaded, DiffusersAutoencoder) or not isinstance(loaded.model, AutoencoderTiny) or loaded.downsampling != DOWNSAMPLING:
        raise UserError(
            f"--from {name}: only icon and what train-autoencoder wrote can be trained on (an AutoencoderTiny with latents of "
            f"{DOWNSAMPLING} x {DOWNSAMPLING} pixels). Leave out --from to train one from scratch."
        )
    return loaded.model.requires_grad_(True).train(), {"name": loaded.name, "fingerprint": loaded.fingerprint}


@torch.no_grad()
def _scale(model: AutoencoderTiny, batches: Iterable[Tensor]) -> None:
    """Set the scaling factor that gives the latents of these images the standard deviation SIGMA_DATA."""
    latents = torch.cat([model.encode(batch).latents for batch in batches])
    model.register_to_config(scaling_factor=round(SIGMA_DATA / latents.std().item(), 4))


def _write(out: Path, training: _Training, figures: dict[str, Any], started: float, origin: dict[str, Any]) -> None:
    """Write the weights in float16, record.json with checksums, and last the config, without which there is no autoencoder."""
    aside = out / ".saving"
    training.model.half().save_pretrained(aside)
    config = aside / "config.json"
    record = {
        "settings": asdict(training.settings),
        **origin,
        "figures": figures,
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
        "log": training.log,
        "files": {path.name: sha256_of(path) for path in sorted(aside.iterdir())},
    }
    for path in aside.iterdir():
        if path != config:
            path.replace(out / path.name)
    write_aside(out / RECORD, to_checked_json(record))
    config.replace(out / config.name)
    aside.rmdir()
