"""The loss on pictures that are never learnt from, with noise that is always the same: the one curve that can be compared."""

from pathlib import Path

import torch
from torch import nn

from microdit.data.latents import Batch, EncodedSet, refuse_strangers
from microdit.data.shards import DamagedShard
from microdit.diffusion.edm import EDM
from microdit.distributed import World
from microdit.errors import UserError
from microdit.pipeline import first_noise
from microdit.recipe import Recipe
from microdit.training.draws import TrainingBatch
from microdit.training.tally import StepSums, Tally, by_noise

MICRO_BATCH = 32


def open_held_out(recipe: Recipe, data: EncodedSet, edm: EDM, world: World) -> "HeldOut | None":
    """Of the set that the recipe names, which must be like `data`; None if it names none. Raises UserError."""
    if recipe.data.held_out is None:
        return None
    held_out = HeldOut(Path(recipe.data.held_out), data.resolution, recipe.record.held_out_samples, edm, world)
    refuse_strangers([data, held_out.data])
    return held_out


class HeldOut:
    """The first samples of an encoded set; number i of n has the noise level of quantile (i + 1/2) / n, no mask, its caption."""

    def __init__(self, folder: Path, resolution: int, count: int, edm: EDM, world: World):
        """Raises UserError if the set is missing, of another shape, or smaller than the number of processes."""
        self.data = EncodedSet(folder, resolution, world)
        self._bucket = self.data.largest_bucket
        rows = self.data.bucket_sizes[self._bucket]
        self._edm, self._world = edm, world
        # Every process must call the model equally often, so what is left over by even shares is left out.
        self.count = min(count, rows) // world.size * world.size
        if not self.count:
            raise UserError(f"{folder} holds {rows} samples, too few for {world.size} processes.")

    def measure(self, loss: nn.Module, compiled: bool = False) -> dict[str, object]:
        """`held_out_loss`, and `held_out_by_noise` for the eight noise bins. All processes must call this.

        `compiled` functions are called as in training, as if gradients were wanted: without, they would be compiled once more.
        """
        tally = Tally(self._world.device)
        mine = range(self._world.rank, self.count, self._world.size)
        for start in range(0, len(mine), MICRO_BATCH):
            batch = self._batch(mine[start : start + MICRO_BATCH]).to(self._world.device)
            with torch.set_grad_enabled(compiled):
                tally.add(loss(batch), batch.sigma_B, self._edm)
        self._world.sum(tally.sums)
        sums = StepSums.of(tally.sums.tolist())
        return {"held_out_loss": sums.loss, "held_out_by_noise": by_noise(sums.losses, sums.counts)}

    def _batch(self, numbers: range) -> TrainingBatch:
        try:
            stored = [self.data.read(self._bucket, number) for number in numbers]
        except DamagedShard as damage:
            raise UserError(f"{damage}. The held-out loss is measured on it: encode that set again, or leave it out.") from damage
        batch = Batch(self.data.latents([latents for latents, _ in stored], self._bucket), *self.data.text([text for _, text in stored]))
        quantile_B = (torch.tensor(list(numbers), dtype=torch.float64) + 0.5) / self.count
        sigma_B = (torch.special.ndtri(quantile_B) * self._edm.P_std + self._edm.P_mean).exp().float()
        noise = [first_noise(self.data.latent_shape(self._bucket), number) for number in numbers]
        everything = torch.ones(len(numbers))
        return TrainingBatch(batch.latents_BCHW, batch.text_BLE, batch.text_mask_BL, sigma_B, torch.stack(noise), everything, None)
