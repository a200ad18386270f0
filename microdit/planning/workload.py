"""The workload of a recipe: shapes of its latents and captions, FLOPs of its steps, and the hours and dollars of its phases.

Shapes are read from encoded sets where they exist, and otherwise assumed; the assumptions are printed with the estimate.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from microdit.config.schema import PhaseRecipe, Recipe, architecture, projector_of
from microdit.data.dataset import EncodedDataset
from microdit.data.manifest import has_manifest
from microdit.data.packing import bytes_of_row
from microdit.data.shards import DamagedShard
from microdit.errors import UserError
from microdit.io.places import location
from microdit.models.flops import alignment_flops, caption_flops, forward_flops, recomputed_flops, training_flops
from microdit.models.microdit import ModelConfig
from microdit.models.routing import kept_tokens
from microdit.planning.hardware import Machine

SAMPLES = 32  # points at which a mask schedule is looked at, to sum a phase up


class FlopCounter:
    """FLOPs of a recipe's steps on one shape of latents, by the formula of models/flops.py.

    `feature_channels` are those of the features that a recipe with an alignment needs.
    """

    def __init__(self, recipe: Recipe, config: ModelConfig, feature_channels: int | None = None):
        self._recipe, self._config = recipe, config
        self._flops = lru_cache(maxsize=4096)(training_flops)
        self._feature_channels = feature_channels

    def of_step(self, phase: PhaseRecipe, step_in_phase: int, tokens: int, caption_tokens: int, aligned: bool = False) -> float:
        """Return the FLOPs of one step on the whole batch, forward and backward. `aligned` says that it has an alignment loss."""
        kept = kept_tokens(tokens, phase.mask_ratio_at(step_in_phase))
        flops = phase.batch_size * (self._flops(self._config, tokens, kept, caption_tokens) + self._of_teacher(tokens, caption_tokens))
        return flops + self._of_alignment(phase, step_in_phase, tokens) if aligned else flops

    def remaining(self, step: int, tokens: int, caption_tokens: int) -> float:
        """Return the FLOPs of all steps from number `step` to the end."""
        total, to_align = 0.0, self._recipe.aligned_steps
        for phase in self._recipe.phases:
            first = min(step, phase.steps)
            step -= first
            left, aligned = phase.steps - first, min(phase.steps, to_align) - first
            to_align = max(0, to_align - phase.steps)
            if left:
                points = {first + (left - 1) * i // (SAMPLES - 1) for i in range(SAMPLES)} if phase.mask_schedule else {first}
                total += left * sum(self.of_step(phase, point, tokens, caption_tokens) for point in points) / len(points)
            if aligned > 0:
                points = {point for point in points if point < first + aligned}
                total += aligned * sum(self._of_alignment(phase, point, tokens) for point in points) / len(points)
        return total

    def _of_teacher(self, tokens: int, caption_tokens: int) -> float:
        """Return the FLOPs of a distillation's target of one sample."""
        distillation = self._recipe.distillation
        if distillation is None:
            return 0.0
        calls = 2 * (distillation.teacher_steps // distillation.steps) * (1 if distillation.guidance_scale == 1 else 2)  # Heun's method
        once = caption_flops(self._config, caption_tokens)  # that of the empty caption is shared by the batch
        return once + calls * (forward_flops(self._config, tokens, tokens, caption_tokens) - once)

    def _of_alignment(self, phase: PhaseRecipe, step_in_phase: int, tokens: int) -> float:
        """Return the FLOPs that an alignment loss adds to a step."""
        alignment = self._recipe.alignment
        assert alignment is not None
        assert self._feature_channels is not None, "a recipe with an alignment has features"
        kept = kept_tokens(tokens, phase.mask_ratio_at(step_in_phase))
        seen = kept if self._config.is_sparse(alignment.block - 1) else tokens
        return phase.batch_size * alignment_flops(projector_of(alignment, self._config.dim, self._feature_channels), tokens, seen)


RESOLUTION = 256  # pixels, where a recipe says none
LOOKED_AT = 512  # captions of a set, to know how long a batch of them is
AUTOENCODERS = {"sdxl": (4, 8), "16ch": (16, 8), "icon": (8, 8), "pixels": (3, 1)}  # channels, downsampling
# Tokens and channels; only CLIP's captions have a fixed length.
TEXT_ENCODERS = {"dfn-clip-h": (77, 1024), "minilm": (16, 384), "google/flan-t5-large": (256, 1024)}
FEATURE_CHANNELS = {"efficientnet": 1280, "facebook/dinov2-small": 384, "facebook/dinov2-large": 1024}
DINO_CHANNELS = 768  # of DINOv2-B, DINOv3-B and SigLIP-B, where an encoder's features are not known


@dataclass(frozen=True)
class KnownShapes:
    """Shapes that the user states, in place of assumptions about data that is not encoded yet."""

    latent_channels: int | None = None
    downsampling: int | None = None
    caption_tokens: int | None = None
    caption_channels: int | None = None


@dataclass(frozen=True)
class Shapes:
    """Shapes of the data that a recipe is trained on.

    `sides` holds (share of the samples, height, width) of the latents for each aspect ratio. `samples` and `bytes` on disk are None where a
    set is missing. `autoencoder` and `text_encoder` are names. `assumed` lists, as sentences, what was not read from data.
    `feature_channels` is the width of a vision encoder's features, for recipes with an alignment.
    """

    resolution: int
    latent_channels: int
    sides: tuple[tuple[float, int, int], ...]
    caption_tokens: int
    caption_channels: int
    autoencoder: str
    text_encoder: str
    samples: int | None
    bytes: int | None
    assumed: tuple[str, ...]
    feature_channels: int | None = None


def shapes_of(recipe: Recipe, given: KnownShapes = KnownShapes(), opened: list[EncodedDataset] | None = None) -> Shapes:
    """Return the shapes of a recipe's data. `opened` are all of its sets, if they are open already.

    Raises UserError if a set is damaged, or if the patch size does not divide the latents.
    """
    folders = [location(item.path) if item.path else None for item in recipe.data.named_sets.values()]  # None: a source, not encoded yet
    found = opened or [EncodedDataset(folder, recipe.data.resolution) for folder in folders if folder and has_manifest(folder)]
    shapes = _read(found, len(found) == len(folders)) if found else assumed_shapes(recipe, given)
    p = recipe.model.patch_size
    for _, height, width in shapes.sides:
        if height % p or width % p or not height or not width:
            raise UserError(f"{recipe.name}: model.patch_size {p} does not divide the {height} x {width} latents.")
    return shapes if recipe.alignment is None else _with_features(shapes, recipe.alignment.encoder, found)


def assumed_shapes(recipe: Recipe, given: KnownShapes = KnownShapes()) -> Shapes:
    """Return the shapes that follow from the recipe alone, without looking at the disk."""
    data = recipe.data
    autoencoder, text_encoder = data.autoencoder or "sdxl", data.text_encoder or "dfn-clip-h"
    channels, downsampling = AUTOENCODERS.get(autoencoder, AUTOENCODERS["sdxl"])
    tokens, width = TEXT_ENCODERS.get(text_encoder, TEXT_ENCODERS["dfn-clip-h"])
    resolution = data.resolution or RESOLUTION
    down = given.downsampling or downsampling
    side, channels = resolution // down, given.latent_channels or channels
    tokens, width = given.caption_tokens or tokens, given.caption_channels or width
    assumed = [
        f"latents of {channels} x {side} x {side} ({autoencoder}, {down} pixels a side)",
        f"captions of {tokens} x {width} ({text_encoder})",
    ]
    if data.resolution is None:
        assumed.insert(0, f"{RESOLUTION} px")
    return Shapes(resolution, channels, ((1.0, side, side),), tokens, width, autoencoder, text_encoder, None, None, tuple(assumed))


def _with_features(shapes: Shapes, encoder: str, sets: list[EncodedDataset]) -> Shapes:
    """Add the width of the features, those of the encoder's name where no set has any."""
    stored = [encoded.manifest["features"]["channels"] for encoded in sets if "features" in encoded.manifest]
    channels = stored[0] if stored else FEATURE_CHANNELS.get(encoder, DINO_CHANNELS)
    assumed = () if stored else (f"features of {channels} channels ({encoder})",)
    return replace(shapes, feature_channels=channels, assumed=shapes.assumed + assumed)


def _read(sets: list[EncodedDataset], complete: bool) -> Shapes:
    first, rows = sets[0], sum(len(item) for item in sets)
    sides = [(size / rows, *item.latent_shape(bucket)[1:]) for item in sets for bucket, size in enumerate(item.bucket_sizes)]
    return Shapes(
        first.resolution,
        first.latent_shape()[0],
        tuple(sides),
        max(_longest_caption(item) for item in sets),
        first.manifest["text_channels"],
        first.manifest["autoencoder"]["name"],
        first.manifest["text_encoder"]["name"],
        rows if complete else None,
        sum(shard["bytes"] for item in sets for shard in item.manifest["shards"]) if complete else None,
        () if complete else ("sets that are not encoded yet are taken to be like those that are",),
    )


def _longest_caption(encoded: EncodedDataset) -> int:
    """Return the longest of the first captions in tokens: a batch is as long as its longest caption."""
    bucket = max(range(len(encoded.bucket_sizes)), key=encoded.bucket_sizes.__getitem__)
    row = bytes_of_row(encoded.manifest["text_channels"], encoded.manifest["settings"]["captions"])
    try:
        return max(len(encoded.read_undecoded(bucket, number)[1]) // row for number in range(min(LOOKED_AT, encoded.bucket_sizes[bucket])))
    except DamagedShard as damage:
        raise UserError(f"{damage}: encode {encoded.folder} again.") from damage


@dataclass(frozen=True)
class PhaseCost:
    """Cost of one phase. `flops_per_sample` is the mean over the phase, forward and backward.

    `flops` follow from it; recomputed blocks add to the hours only.
    """

    name: str
    resolution: int
    mask_ratios: tuple[float, float]  # first and last step's
    steps: int
    batch_size: int
    images: int
    flops_per_sample: float
    flops: float
    hours: float
    dollars: float


def phase_costs(recipe: Recipe, shapes: Shapes, machine: Machine) -> list[PhaseCost]:
    """Return the cost of each phase of the recipe."""
    return [_phase_bill(recipe, phase, shapes, machine) for phase in recipe.phases]


def phase_flops(recipe: Recipe, phase: PhaseRecipe, shapes: Shapes) -> float:
    """Return the FLOPs of all steps of the phase."""
    work = FlopCounter(recipe.alone(phase), config_of(recipe, shapes), shapes.feature_channels)
    p = recipe.model.patch_size
    return sum(share * work.remaining(0, (height // p) * (width // p), shapes.caption_tokens) for share, height, width in shapes.sides)


def config_of(recipe: Recipe, shapes: Shapes) -> ModelConfig:
    return architecture(recipe.model, shapes.latent_channels, shapes.caption_channels)


def time_factor(recipe: Recipe, phase: PhaseRecipe, shapes: Shapes) -> float:
    """Return the time of a step relative to its FLOPs: recomputed blocks run their forward pass twice."""
    config, p, kinds = config_of(recipe, shapes), recipe.model.patch_size, []
    for share, height, width in shapes.sides:
        tokens = (height // p) * (width // p)
        kinds.append((share, (config, tokens, kept_tokens(tokens, phase.mask_ratio_at(0)), shapes.caption_tokens)))
    again = sum(share * recomputed_flops(*kind, float(recipe.engine.activation_checkpointing)) for share, kind in kinds)
    return 1 + again / sum(share * training_flops(*kind) for share, kind in kinds)


def _phase_bill(recipe: Recipe, phase: PhaseRecipe, shapes: Shapes, machine: Machine) -> PhaseCost:
    flops = phase_flops(recipe, phase, shapes)
    images = phase.steps * phase.batch_size
    hours = machine.hours(flops * time_factor(recipe, phase, shapes))
    ratios = phase.mask_ratio_at(0), phase.mask_ratio_at(phase.steps - 1)
    return PhaseCost(
        phase.name,
        shapes.resolution,
        ratios,
        phase.steps,
        phase.batch_size,
        images,
        flops / images,
        flops,
        hours,
        machine.dollars(hours),
    )
