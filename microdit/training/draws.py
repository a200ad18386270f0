"""All that is random in a training step, from (seed, step, number in the batch) alone.

A sample's noise is the same however the batch is cut into ranks and micro-batches, and nothing about chance needs to be saved.

Shape legend: B samples of this rank, C channels, H W height and width, K kept tokens, L caption tokens, E their width.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from microdit.data.latents import Batch
from microdit.diffusion.edm import EDM
from microdit.model.routing import Pattern, choose_kept


@dataclass(frozen=True)
class TrainingBatch:
    """Samples with their draws. `caption_kept_B` is 0 where the caption is replaced by zeros, for guidance; `path_kept_B`, for the same
    end, where the sparse blocks count for nothing (routing sprint)."""

    latents_BCHW: Tensor
    text_BLE: Tensor
    text_mask_BL: Tensor | None
    sigma_B: Tensor
    noise_BCHW: Tensor
    caption_kept_B: Tensor
    keep_ids_BK: Tensor | None
    path_kept_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sigma_B)

    def to(self, device: torch.device) -> "TrainingBatch":
        if device.type == "cpu":
            return self
        return self._each(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))

    def split(self, size: int) -> "list[TrainingBatch]":
        """Into micro-batches of `size`."""
        return [self._each(lambda tensor, at=start: tensor[at : at + size]) for start in range(0, len(self), size)]  # type: ignore[misc]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TrainingBatch":
        values = [getattr(self, field.name) for field in fields(self)]
        return TrainingBatch(*(None if value is None else change(value) for value in values))  # type: ignore[arg-type]


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
    """`numbers`: the places of these samples in the global batch. `grid`: rows and columns of patches of a picture."""
    latents_BCHW = batch.latents_BCHW
    B, size = len(latents_BCHW), latents_BCHW[0].numel()
    rows, columns = grid
    normal, uniform = torch.empty(B, size + 1), torch.empty(B, 1 + (rows * columns if mask_ratio else 0))
    path_B = torch.empty(B)
    generator = torch.Generator()
    for number, normal_row, uniform_row, path in zip(numbers, normal, uniform, path_B, strict=True):
        generator.manual_seed(_mix(seed, step, number))
        normal_row.normal_(generator=generator)
        uniform_row.uniform_(generator=generator)
        path.uniform_(generator=generator)  # last, so that with any path_drop the other draws are the same
    return TrainingBatch(
        latents_BCHW,
        batch.text_BLE,
        batch.text_mask_BL,
        sigma_B=(normal[:, size] * edm.P_std + edm.P_mean).exp(),
        noise_BCHW=normal[:, :size].reshape(latents_BCHW.shape),
        caption_kept_B=(uniform[:, 0] >= caption_dropout).float(),
        keep_ids_BK=choose_kept(uniform[:, 1:], mask_ratio, mask_pattern, columns),
        path_kept_B=(path_B >= path_drop).float() if path_drop else None,
    )


def _mix(seed: int, step: int, number: int) -> int:
    """A seed of 63 bits for each (seed, step, number), by the finaliser of splitmix64 (Steele et al. 2014)."""
    value = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + number + 1) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return (value ^ (value >> 31)) >> 1


_MASK = (1 << 64) - 1
