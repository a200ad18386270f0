"""All that is random in a training step, from (seed, step, number in the batch) alone.

A sample's noise is the same however the batch is cut into ranks and micro-batches, and on every device, and nothing about chance needs to
be saved. The generator is SplitMix64 (Steele et al. 2014): number i of a sample is a hash of both, so that a GPU computes all at once.

Shape legend: B samples of this rank, C channels, H W height and width, N numbers, K kept tokens, L caption tokens, E their width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from microdit.data.dataset import Batch, StoredBatch
from microdit.diffusion.edm import EDM
from microdit.models.routing import Pattern, choose_kept


@dataclass(frozen=True)
class TrainingBatch:
    """Samples with their draws. `caption_kept_B` is 0 where the caption is replaced by zeros, for guidance; `path_keep_mask_B`, for the
    same end, where the sparse blocks count for nothing (routing sprint)."""

    latents_BCHW: Tensor
    text_BLE: Tensor
    text_mask_BL: Tensor | None
    sigma_B: Tensor
    noise_BCHW: Tensor
    caption_kept_B: Tensor
    keep_ids_BK: Tensor | None
    path_keep_mask_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sigma_B)

    def to(self, device: torch.device) -> "TrainingBatch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, size: int) -> "list[TrainingBatch]":
        """Into micro-batches of `size`."""
        return [self.map(lambda tensor, at=start: tensor[at : at + size]) for start in range(0, len(self), size)]  # type: ignore[misc]

    def map(self, change: Callable[[Tensor], Tensor]) -> "TrainingBatch":
        values = [getattr(self, field.name) for field in fields(self)]
        return TrainingBatch(*(None if value is None else change(value) for value in values))  # type: ignore[arg-type]


@dataclass(frozen=True)
class UndrawnBatch:
    """A micro-batch as it is stored. `draw` makes a `TrainingBatch` of it, on the device that it is brought to."""

    stored: StoredBatch
    draw: Callable[[Batch], TrainingBatch]

    def __len__(self) -> int:
        return len(self.stored)

    def to(self, device: torch.device) -> TrainingBatch:
        if device.type == "mps":  # it has no float64, which the draws need
            return self.draw(self.stored.expand()).to(device)
        return self.draw(self.stored.to(device).expand())


MicroBatch = TrainingBatch | UndrawnBatch


def add_draws(
    batch: Batch,
    edm: EDM,
    seed: int,
    step: int,
    numbers: range,
    grid: tuple[int, int],
    mask_ratio: float,
    caption_dropout: float,
    path_drop: float = 0.0,
    mask_pattern: Pattern = "random",
) -> TrainingBatch:
    """Draw on the device where the samples are.

    `numbers`: the places of these samples in the global batch. `grid`: rows and columns of patches of a picture.
    """
    latents_BCHW = batch.latents_BCHW
    size, (rows, columns) = latents_BCHW[0].numel(), grid
    key_B = _keys(seed, step, numbers, latents_BCHW.device)
    # Each use has words of its own, so that no draw depends on whether another is made.
    chances_B2, normal_BN = _words(key_B, 0, 2), normals(_words(key_B, 2, size // 2 + 1))
    scores_BT = _words(key_B, 3 + size // 2, rows * columns) if mask_ratio else chances_B2
    caption_B, path_B = uniforms(chances_B2).unbind(1)
    return TrainingBatch(
        latents_BCHW,
        batch.text_BLE,
        batch.text_mask_BL,
        sigma_B=(normal_BN[:, size] * edm.P_std + edm.P_mean).exp(),
        noise_BCHW=normal_BN[:, :size].reshape(latents_BCHW.shape),
        caption_kept_B=(caption_B >= caption_dropout).float(),
        keep_ids_BK=choose_kept(scores_BT, mask_ratio, mask_pattern, columns),
        path_keep_mask_B=(path_B >= path_drop).float() if path_drop else None,
    )


def uniforms(words: Tensor) -> Tensor:
    """In [0, 1), float64, of the upper 53 bits of each word."""
    return _shifted(words, 11).double() * 2.0**-53


def normals(words_BN: Tensor) -> Tensor:
    """Two of each word, (B, 2 N), float32, by Box and Muller (1958), in float64 so that all devices round to the same numbers."""
    radius_BN = (((_shifted(words_BN, 32) + 1).double() * 2.0**-32).log() * -2).sqrt()
    angle_BN = (words_BN & 0xFFFFFFFF).double() * (2 * math.pi * 2.0**-32)
    return torch.cat([radius_BN * angle_BN.cos(), radius_BN * angle_BN.sin()], dim=1).float()


def _keys(seed: int, step: int, numbers: range, device: torch.device) -> Tensor:
    """Where each sample's words begin in the generator's cycle of 2**64, (B,): hashes, so that they do not meet."""
    first = _signed(seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 1)
    return _mix(torch.arange(numbers.start, numbers.stop, numbers.step, device=device) + first)


def _words(key_B: Tensor, start: int, count: int) -> Tensor:
    """Words `start` to `start + count` of each sample, 64 random bits each, (B, count)."""
    return _mix(key_B[:, None] + torch.arange(start + 1, start + count + 1, device=key_B.device) * _signed(0x9E3779B97F4A7C15))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64. Products of int64 wrap around, as those of unsigned numbers do."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros coming in: `>>` alone copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 that has the same lower 64 bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
