"""The random numbers of a training step: noise levels, noise, masks, dropped captions.

All of them are a function of (seed, step, index of the sample in the global batch). So a sample gets the same noise however the batch is
split over processes and micro-batches, on every device, and a checkpoint needs no generator state. The generator is SplitMix64 (Steele,
Lea and Flood, 2014) in counter mode: word i of a sample is a hash of its key and i, which a GPU computes in parallel.

Shape legend: B samples of this process, C channels, H W height and width, N numbers, K kept tokens, L caption tokens, E their width or
that of features, Y X rows and columns of features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from microdit.config.schema import PhaseRecipe, Recipe
from microdit.data.dataset import Batch, StoredBatch
from microdit.diffusion.objective import Objective
from microdit.models.routing import METHODS, Pattern, choose_kept
from microdit.splitmix import as_int64, shift_right, splitmix64


@dataclass(frozen=True)
class TrainingBatch:
    """Samples with everything that is random about them in one step.

    `caption_kept_B` is 0 where the caption is replaced by zeros (for classifier-free guidance); `path_keep_mask_B` is 0 where the sparse
    path is dropped (routing sprint, for path-drop guidance). `features_BEYX` are those of a vision encoder, in steps with an alignment
    loss; `target_BCHW` what the denoised estimate is compared with instead of the latents, in distillation.
    """

    latents_BCHW: Tensor
    text_BLE: Tensor
    text_mask_BL: Tensor | None
    sigma_B: Tensor
    noise_BCHW: Tensor
    caption_kept_B: Tensor
    keep_ids_BK: Tensor | None
    path_keep_mask_B: Tensor | None = None
    features_BEYX: Tensor | None = None
    target_BCHW: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sigma_B)

    def to(self, device: torch.device) -> "TrainingBatch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, size: int) -> "list[TrainingBatch]":
        """Split into micro-batches of `size` samples."""
        return [self.map(lambda tensor, at=start: tensor[at : at + size]) for start in range(0, len(self), size)]  # type: ignore[misc]

    def map(self, change: Callable[[Tensor], Tensor]) -> "TrainingBatch":
        """Return a batch with `change` applied to each tensor."""
        values = [getattr(self, field.name) for field in fields(self)]
        return TrainingBatch(*(None if value is None else change(value) for value in values))  # type: ignore[arg-type]


@dataclass(frozen=True)
class StoredMicroBatch:
    """A micro-batch as it is stored on disk. `to` expands it on the device and calls `add_noise` there."""

    stored: StoredBatch
    add_noise: Callable[[Batch], TrainingBatch]

    def __len__(self) -> int:
        return len(self.stored)

    def to(self, device: torch.device) -> TrainingBatch:
        if device.type == "mps":  # lacks float64, in which normal numbers are computed
            return self.add_noise(self.stored.expand()).to(device)
        return self.add_noise(self.stored.to(device).expand())


MicroBatch = TrainingBatch | StoredMicroBatch


@dataclass(frozen=True)
class NoiseSettings:
    """Distributions of a step's random numbers: noise levels, and the probabilities of dropping tokens, captions and paths."""

    objective: Objective
    mask_ratio: float
    caption_dropout: float
    path_drop: float = 0.0
    mask_pattern: Pattern = "random"


def noise_settings(recipe: Recipe, objective: Objective, phase: PhaseRecipe, step_in_phase: int) -> NoiseSettings:
    """Return the settings of step number `step_in_phase` (from 0) of a phase."""
    path_drop = METHODS[recipe.model.routing].path_drop
    return NoiseSettings(objective, phase.mask_ratio_at(step_in_phase), recipe.diffusion.caption_dropout, path_drop, phase.mask_pattern)


def sample_noise(batch: Batch, settings: NoiseSettings, seed: int, step: int, numbers: range, grid: tuple[int, int]) -> TrainingBatch:
    """Sample all random numbers of one step, on the device of `batch`.

    `numbers` are the indices of these samples in the global batch; `grid` is the number of (rows, columns) of patches in an image.
    """
    latents_BCHW = batch.latents_BCHW
    size, (rows, columns) = latents_BCHW[0].numel(), grid
    key_B = _keys(seed, step, numbers, latents_BCHW.device)
    # Each use has its own range of words, so that no number depends on whether another one is needed.
    chances_B2, normal_BN = _words(key_B, 0, 2), normals(_words(key_B, 2, size // 2 + 1))
    scores_BT = _words(key_B, 3 + size // 2, rows * columns) if settings.mask_ratio else chances_B2
    caption_B, path_B = uniforms(chances_B2).unbind(1)
    return TrainingBatch(
        latents_BCHW,
        batch.text_BLE,
        batch.text_mask_BL,
        sigma_B=settings.objective.training_sigma(normal_BN[:, size]),
        noise_BCHW=normal_BN[:, :size].reshape(latents_BCHW.shape),
        caption_kept_B=(caption_B >= settings.caption_dropout).float(),
        keep_ids_BK=choose_kept(scores_BT, settings.mask_ratio, settings.mask_pattern, columns),
        path_keep_mask_B=(path_B >= settings.path_drop).float() if settings.path_drop else None,
        features_BEYX=batch.features_BEYX,
    )


def uniforms(words: Tensor) -> Tensor:
    """Return uniform numbers in [0, 1), float64, made from the upper 53 bits of each word."""
    return shift_right(words, 11).double() * 2.0**-53


def normals(words_BN: Tensor) -> Tensor:
    """Return two normal numbers for each word, (B, 2 N), float32.

    The transform is Box and Muller's (1958), in float64, so that all devices round to the same float32 numbers.
    """
    radius_BN = (((shift_right(words_BN, 32) + 1).double() * 2.0**-32).log() * -2).sqrt()
    angle_BN = (words_BN & 0xFFFFFFFF).double() * (2 * math.pi * 2.0**-32)
    return torch.cat([radius_BN * angle_BN.cos(), radius_BN * angle_BN.sin()], dim=1).float()


def _keys(seed: int, step: int, numbers: range, device: torch.device) -> Tensor:
    """Return where each sample's words start in the generator's cycle of 2**64, (B,), hashed so that ranges do not overlap."""
    first = as_int64(seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 1)
    return splitmix64(torch.arange(numbers.start, numbers.stop, numbers.step, device=device) + first)


def _words(key_B: Tensor, start: int, count: int) -> Tensor:
    """Return words `start` to `start + count` of each sample, 64 random bits each, (B, count)."""
    return splitmix64(key_B[:, None] + torch.arange(start + 1, start + count + 1, device=key_B.device) * as_int64(0x9E3779B97F4A7C15))
