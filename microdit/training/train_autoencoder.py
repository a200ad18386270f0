"""Training of the small icon autoencoder, from 64 x 64 images to 8 x 8 latents.

Notable:
- it is a diffusers `AutoencoderTiny` (deterministic, convolutional), so any diffusers user can load it;
- the loss is L1 on pixels and on their differences (edges), with noise added to the latents, so the decoder tolerates the small errors of
  a diffusion model;
- a penalty pulls the latents to mean 0 and standard deviation 1 per channel, so one scaling factor serves all channels;
- colours are permuted and images shifted at random, so that unseen colours and positions decode as well.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from microdit.data.pixels import to_tensor
from microdit.data.sources.builtin import Split, emoji_images
from microdit.encoders.autoencoder import RECORD
from microdit.io.files import sha256_of, to_checked_json, write_aside
from microdit.io.locks import LOCK

SIGMA_DATA = 0.9  # standard deviation of the scaled latents, as for the paper's SDXL latents (2407.15811, table of EDM settings)


@dataclass(frozen=True)
class AutoencoderSettings:
    """Settings of an icon autoencoder's training, kept in its record."""

    width: int = 32  # channels of every convolution
    latent_channels: int = 8
    image_size: int = 64
    steps: int = 2600
    batch_size: int = 32
    learning_rate: float = 2e-3
    latent_noise: float = 0.15  # in standard deviations of the latents
    edge_weight: float = 1.0
    moment_weight: float = 0.1
    seed: int = 0


def train_icon_autoencoder(out: Path, settings: AutoencoderSettings, on_step: Callable[[int, dict[str, float]], None]) -> dict[str, float]:
    """Train on the emoji training split and write config, weights (float16) and record.json with checksums to `out`. Returns the figures.

    `on_step(step, {"loss": ...})` is called after every step.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed)
    images_NCHW = load_emoji("train", settings.image_size)
    model = _build(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=settings.learning_rate, total_steps=settings.steps, pct_start=0.05)
    started = time.monotonic()
    log = []
    for step in range(1, settings.steps + 1):
        picked = torch.randint(len(images_NCHW), (settings.batch_size,), generator=generator)
        loss = _loss(model, _augment(images_NCHW[picked], generator), settings, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step(step, {"loss": loss.item()})
        if step % 100 == 0 or step == settings.steps:
            log.append({"step": step, "loss": round(loss.item(), 5)})
    latent_std = _latent_std(model, images_NCHW)
    model.register_to_config(scaling_factor=round(SIGMA_DATA / latent_std, 4))
    figures = reconstruction_figures(model, settings.image_size)
    model.half().save_pretrained(out)
    record = {
        "settings": asdict(settings),
        "figures": figures,
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
        "log": log,
        "files": {path.name: sha256_of(path) for path in sorted(out.iterdir()) if path.name not in (RECORD, LOCK)},
    }
    write_aside(out / RECORD, to_checked_json(record))
    return figures


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


def _loss(model: AutoencoderTiny, images_NCHW: Tensor, settings: AutoencoderSettings, generator: torch.Generator) -> Tensor:
    latents_NCHW = model.encode(images_NCHW).latents
    noise = torch.randn(latents_NCHW.shape, generator=generator)
    decoded_NCHW = model.decode(latents_NCHW + settings.latent_noise * noise).sample
    mean_C = latents_NCHW.mean(dim=(0, 2, 3))
    std_C = latents_NCHW.std(dim=(0, 2, 3))
    moments = mean_C.square().mean() + (std_C - 1).square().mean()
    edges = F.l1_loss(decoded_NCHW.diff(dim=-1), images_NCHW.diff(dim=-1)) + F.l1_loss(decoded_NCHW.diff(dim=-2), images_NCHW.diff(dim=-2))
    return F.l1_loss(decoded_NCHW, images_NCHW) + settings.edge_weight * edges + settings.moment_weight * moments


def _augment(images_NCHW: Tensor, generator: torch.Generator) -> Tensor:
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


@torch.no_grad()
def _latent_std(model: AutoencoderTiny, images_NCHW: Tensor) -> float:
    latents = torch.cat([model.encode(batch).latents for batch in images_NCHW.split(64)])
    return latents.std().item()
