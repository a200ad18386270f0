"""Validation during training: the held-out loss, image quality on fixed captions, and a grid of the recipe's prompts.

The held-out loss uses the same samples, noise levels and noise every time, so its curve is comparable across steps and runs. Quality
compares images generated from fixed captions and noise with the decoded latents of their rows, so that the autoencoder's own error does not
count against the model. Images are made in fixed groups that are divided among the processes, so the numbers do not depend on how many
there are.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from microdit.config.schema import LEAST_QUALITY_SAMPLES, Recipe
from microdit.data.dataset import Batch, EncodedDataset, check_compatible
from microdit.data.pixels import to_image
from microdit.data.shard_cache import ShardCache
from microdit.data.shards import DamagedShard
from microdit.diffusion.objective import Objective
from microdit.distributed import World
from microdit.encoders.autoencoder import load_autoencoder
from microdit.encoders.captions import clean_prompts, warn_of_unread
from microdit.errors import UserError
from microdit.evaluation.features import EfficientNetFeatures
from microdit.evaluation.metrics.kid import paired_kid
from microdit.evaluation.recognition import retrieval, spread_ids
from microdit.io.places import Place, location
from microdit.models.microdit import MicroDiT
from microdit.pipelines.components import check_unchanged
from microdit.pipelines.pipeline import Encoders, MicroDiTPipeline, load_encoders
from microdit.pipelines.sampling import draw_latents, first_noise
from microdit.pipelines.settings import SamplerSettings, suited_to
from microdit.reports.grids import draw_grid
from microdit.training.meters import LossStats, StepResult, by_noise
from microdit.training.noise import TrainingBatch
from microdit.training.setup import open_cache

MICRO_BATCH = 32


def open_held_out(recipe: Recipe, data: EncodedDataset, objective: Objective, world: World) -> "HeldOut | None":
    """Open the held-out set that the recipe names, which must have the encoders of `data`; None if it names none. Raises UserError."""
    if recipe.data.held_out is None:
        return None
    place, cache = location(recipe.data.held_out), data.cache or open_cache(recipe)
    held_out = HeldOut(place, data.resolution, recipe.record.held_out_samples, objective, world, cache)
    check_compatible([data, held_out.data])
    return held_out


class HeldOut:
    """The held-out loss on the first samples of an encoded set. Sample i of n has the noise level of quantile (i + 1/2) / n and no mask."""

    def __init__(
        self, folder: Path | Place, resolution: int, count: int, objective: Objective, world: World, cache: ShardCache | None = None
    ):
        """Open the set. Raises UserError if it is missing, lacks the resolution, or has fewer samples than there are processes."""
        self.data = EncodedDataset(folder, resolution, world, cache)
        self._bucket = self.data.largest_bucket
        rows = self.data.bucket_sizes[self._bucket]
        self._objective, self._world = objective, world
        # Every process must call the model equally often, so the remainder after even shares is dropped.
        self.count = min(count, rows) // world.size * world.size
        if not self.count:
            raise UserError(f"{folder} holds {rows} samples, too few for {world.size} processes.")

    def measure(self, loss: nn.Module, compiled: bool = False) -> dict[str, object]:
        """Return `held_out_loss`, and `held_out_by_noise` for the eight noise bins. All processes must call this.

        `compiled` says that the model is compiled: it then runs with gradients enabled, as in training, to avoid another compilation.
        """
        stats = LossStats(self._world.device)
        mine = range(self._world.rank, self.count, self._world.size)
        for start in range(0, len(mine), MICRO_BATCH):
            batch = self._batch(mine[start : start + MICRO_BATCH]).to(self._world.device)
            with torch.set_grad_enabled(compiled):
                stats.add(loss(batch).denoising_B, batch.sigma_B, self._objective)
        self._world.sum(stats.sums)
        sums = StepResult.of(stats.sums.tolist())
        return {"held_out_loss": sums.loss, "held_out_by_noise": by_noise(sums.losses, sums.counts)}

    def _batch(self, numbers: range) -> TrainingBatch:
        try:
            stored = [self.data.read(self._bucket, number) for number in numbers]
        except DamagedShard as damage:
            raise UserError(f"{damage}. The held-out loss is measured on it: encode that set again, or leave it out.") from damage
        batch = Batch(self.data.latents([latents for latents, _ in stored], self._bucket), *self.data.text([text for _, text in stored]))
        quantile_B = (torch.tensor(list(numbers), dtype=torch.float64) + 0.5) / self.count
        sigma_B = self._objective.training_sigma(torch.special.ndtri(quantile_B)).float()
        noise = [first_noise(self.data.latent_shape(self._bucket), number) for number in numbers]
        everything = torch.ones(len(numbers))
        return TrainingBatch(batch.latents_BCHW, batch.text_BLE, batch.text_mask_BL, sigma_B, torch.stack(noise), everything, None)


REFERENCES = 512  # images that a generated one is compared with in retrieval
GROUP = 16  # images that one process generates together


def open_quality(recipe: Recipe, data: EncodedDataset, objective: Objective, world: World) -> "Quality | None":
    """Return the quality measurement; None if the recipe does not ask for it. Raises UserError."""
    return Quality(data, recipe, objective, world) if recipe.record.quality_every else None


class Quality:
    """Image quality on evenly spread rows of a set's largest bucket. Some of their captions are generated; all serve as references."""

    def __init__(self, data: EncodedDataset, recipe: Recipe, objective: Objective, world: World):
        """Compute the features of the references, once. All processes must call this.

        Raises UserError if the set has too few rows or a damaged one, or if the feature network is missing.
        """
        self._data, self._record, self._objective, self._world = data, recipe.record, objective, world
        self._bucket, count = data.largest_bucket, recipe.record.quality_samples
        rows = data.bucket_sizes[self._bucket]
        if not LEAST_QUALITY_SAMPLES <= count <= rows:
            raise UserError(
                f"record.quality_samples is {count}, and {data.folder} has {rows} rows of one shape: quality is measured on at least "
                f"{LEAST_QUALITY_SAMPLES} of them. Take another number, a larger set, or no record.quality_every."
            )
        self._rows = spread_ids(rows, max(REFERENCES, count)).tolist()
        self._drawn_N = spread_ids(len(self._rows), count)
        stored = data.manifest["autoencoder"]
        self._autoencoder = check_unchanged(load_autoencoder(stored["name"]), stored["fingerprint"])
        self._network = EfficientNetFeatures()
        text_BLE, mask_BL = data.text([self._read(self._rows[n])[1] for n in self._drawn_N])
        self._text_BLE, self._mask_BL = text_BLE, mask_BL if recipe.model.mask_padding else None
        self._references_MD = self._features(len(self._rows), lambda part: self.latents(self._rows[part]))

    @property
    def rows(self) -> list[int]:
        """The rows of the set's largest bucket whose captions are generated."""
        return [self._rows[n] for n in self._drawn_N]

    def latents(self, rows: list[int]) -> Tensor:
        """Return the stored latents, (B, C, H, W)."""
        return self._data.latents([self._read(row)[0] for row in rows], self._bucket)

    def measure(self, model: MicroDiT) -> dict[str, float]:
        """Generate images for the captions, image i from the noise of seed i, and `compare` them. All processes must call this."""

        def draw(part: slice) -> Tensor:
            shape, numbers = self._data.latent_shape(self._bucket), range(len(self._drawn_N))[part]
            noise_BCHW = torch.stack([first_noise(shape, number) for number in numbers])
            mask_BL = None if self._mask_BL is None else self._mask_BL[part]
            settings = suited_to(self._objective, SamplerSettings(self._record.sample_steps, self._record.guidance_scale))
            return draw_latents(model, self._objective, noise_BCHW, self._text_BLE[part], mask_BL, settings)

        return self.compare(draw)

    def compare(self, draw: Callable[[slice], Tensor]) -> dict[str, float]:
        """Compare latents, which `draw` makes for a slice of `rows`, with the references.

        `quality_kid` is the KID between generated images and the references of the same rows; `quality_retrieval` is the share of generated
        images that have their reference among the ten nearest of all; `quality_seconds` is the time taken.
        """
        started = time.monotonic()
        drawn_ND = self._features(len(self._drawn_N), draw)
        return {
            "quality_kid": paired_kid(drawn_ND, self._references_MD[self._drawn_N]),
            "quality_retrieval": retrieval(drawn_ND, self._references_MD, self._drawn_N).top_10,
            "quality_seconds": round(time.monotonic() - started, 2),
        }

    def describe(self, step: int, figures: dict[str, float]) -> str:
        """Return the figures as a sentence, with the retrieval rate expected by chance."""
        kid, recognised, chance = figures["quality_kid"], figures["quality_retrieval"], 10 / len(self._rows)
        seconds = figures["quality_seconds"]
        return f"quality at step {step}: KID {kid:.3g}, {recognised:.0%} recognised ({chance:.0%} by chance), in {seconds:.1f} s"

    def _features(self, count: int, latents_of: Callable[[slice], Tensor]) -> Tensor:
        """Return features, (count, D), of images whose latents are made group by group, on every process."""
        starts = range(0, count, GROUP)
        mine: dict[int, Tensor] = {}
        self._autoencoder.to(self._world.device)
        for start in starts[self._world.rank :: self._world.size]:
            latents_BCHW = latents_of(slice(start, min(start + GROUP, count)))
            # One by one, because a group of large images may not fit in memory next to the training state.
            images = [to_image(self._autoencoder.decode(latents_1CHW)[0]) for latents_1CHW in latents_BCHW.split(1)]
            mine[start] = self._network(images)
        self._autoencoder.to("cpu")
        everyones = {start: group for share in self._world.gather(mine) for start, group in share.items()}
        return torch.cat([everyones[start] for start in starts])

    def _read(self, row: int) -> tuple[memoryview, memoryview]:
        try:
            return self._data.read(self._bucket, row)
        except DamagedShard as damage:
            raise UserError(f"{damage}. Quality is measured on that row: encode it again, or leave out record.quality_every.") from damage


class PromptGrid:
    """Generates the grid of the recipe's prompts, divided among the processes. Encoders are loaded on first use and kept."""

    def __init__(self, recipe: Recipe, world: World, dtype: torch.dtype, warn: Callable[[str], None]):
        """Prepare the grid. `dtype` is that of matrix products. `warn` is called once with the prompts that the text encoder truncates."""
        self._recipe, self._world, self._dtype, self._warn = recipe, world, dtype, warn
        self._encoders: Encoders | None = None
        self._warned = False

    def encoders(self, description: dict[str, Any]) -> Encoders:
        """Return the autoencoder and the text encoder that the description of a checkpoint names, loaded once."""
        if self._encoders is None:
            self._encoders = load_encoders(description["data"])
        return self._encoders

    def draw(self, model: MicroDiT, description: dict[str, Any], step: int) -> Image.Image:
        """Return the grid of images. `description` is that of a checkpoint, which names the encoders. All processes must call this.

        Raises UserError if the encoders have changed.
        """
        recipe, world = self._recipe, self._world
        prompts, record = list(recipe.record.sample_prompts), recipe.record
        encoders = self.encoders(description)
        if world.is_main and not self._warned:
            warn_of_unread(clean_prompts(prompts), encoders[1], self._warn)
            self._warned = True
        pipeline = MicroDiTPipeline.around(model, description, encoders).to(world.device, self._dtype)
        share = -(-len(prompts) // world.size)
        start = share * world.rank
        settings = suited_to(recipe.objective, SamplerSettings(record.sample_steps, record.guidance_scale))
        mine = prompts[start : start + share]
        images = pipeline.generate(mine, settings, recipe.seed + start, warn=lambda sentence: None) if mine else []
        for encoder in encoders:
            encoder.to("cpu")  # free the GPU's memory for training
        everyones = [image for images in world.gather(images) for image in images]
        return draw_grid(everyones, prompts, title=f"{recipe.name}, step {step}, {recipe.samples_before(step):,} images seen")
