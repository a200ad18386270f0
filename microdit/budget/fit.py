"""Does a phase fit a card, and with which micro-batch, sharding and recomputing? By the arithmetic of `training/footprint.py`."""

from dataclasses import dataclass
from itertools import product

import torch

from microdit.budget.bill import config_of
from microdit.budget.shapes import Shapes
from microdit.errors import UserError
from microdit.model.microdit import MicroDiT
from microdit.model.routing import kept_tokens
from microdit.recipe import EngineRecipe, PhaseRecipe, Recipe
from microdit.training.footprint import Footprint, footprint
from microdit.training.parallel import LARGE

HEADROOM = 0.1  # of the card that is left free, for what kernels need for a moment and for fragments
ENOUGH = 4096  # patches that the backbone computes at a time, for a GPU to have enough to do (a judgement, not measured)


@dataclass(frozen=True)
class Way:
    """How a GPU may hold its share of the training. `gigabytes`: in use, of 10^9 bytes."""

    micro_batch: int
    sharding: str  # ddp: whole weights on every GPU; fsdp: dealt out (on one GPU: kept in float32, computed with block by block)
    checkpointing: bool
    gigabytes: float


class Load:
    """What a GPU has to hold of a phase: the model, and samples of its largest shape at its least masked step."""

    def __init__(self, recipe: Recipe, phase: PhaseRecipe, shapes: Shapes, ranks: int):
        """Raises UserError if the batch cannot be dealt out."""
        if phase.batch_size % ranks:
            raise UserError(
                f"{recipe.name}: the batch of {phase.batch_size} cannot be dealt out to {ranks} GPUs: take a multiple of {ranks}."
            )
        self.name, self.ranks, self.share = f"{recipe.name}, {phase.name}", ranks, phase.batch_size // ranks
        p = recipe.model.patch_size
        self._tokens = max((height // p) * (width // p) for _, height, width in shapes.sides)
        ratio = min([ratio for _, ratio in phase.mask_schedule] if phase.mask_schedule else [phase.mask_ratio])
        self._kept = kept_tokens(self._tokens, ratio)
        self._caption_tokens, self._emas = shapes.caption_tokens, len(recipe.ema)
        self._element = 4 if recipe.engine.precision == "float32" else 2
        with torch.device("meta"):
            self._model = MicroDiT(config_of(recipe, shapes))
        self.parameters = sum(weight.numel() for weight in self._model.parameters())

    def footprint(self, micro_batch: int, sharding: str, checkpointing: bool) -> Footprint:
        return footprint(
            self._model,
            micro_batch,
            self._tokens,
            self._kept,
            self._caption_tokens,
            self.ranks,
            self._emas,
            self._element,
            checkpointing,
            sharding == "fsdp",
        )

    def as_asked(self, engine: EngineRecipe) -> tuple[Way, Footprint]:
        """As the recipe says."""
        micro_batch = min(engine.micro_batch or self.share, self.share)
        shards = engine.sharding == "fsdp" or (engine.sharding == "auto" and self.ranks > 1 and self.parameters >= LARGE)
        sharding = "fsdp" if shards else "ddp"
        parts = self.footprint(micro_batch, sharding, engine.activation_checkpointing)
        return Way(micro_batch, sharding, engine.activation_checkpointing, parts.total / 1e9), parts

    def best_way(self, card_gb: float) -> Way | None:
        """Nothing recomputed, if it can be, and whole weights rather than shards; but samples of at least `ENOUGH` patches, if
        that can be.

        Else the most samples that any way allows. None: not even one sample fits.
        """
        ways = [self._largest(card_gb, sharding, again) for again, sharding in product((False, True), ("ddp", "fsdp"))]
        possible = [way for way in ways if way is not None]
        enough = [way for way in possible if way.micro_batch == self.share or way.micro_batch * self._kept >= ENOUGH]
        return next(iter(enough), None) or max(possible, key=lambda way: way.micro_batch, default=None)

    def refuse(self, card_gb: float, card: str) -> UserError:
        """The sentence for a card that has no way."""
        least = min(self.footprint(1, sharding, True).total for sharding in ("ddp", "fsdp")) / 1e9
        return UserError(
            f"{self.name} does not fit: one sample at a time, blocks recomputed, needs {least:.1f} GB of each of {self.ranks} {card}, "
            f"and {usable(card_gb) / 1e9:.1f} of its {card_gb:g} GB can be used: take more GPUs, a larger card or a smaller model."
        )

    def _largest(self, card_gb: float, sharding: str, checkpointing: bool) -> Way | None:
        """The largest micro-batch that fits and divides the share."""
        one = self.footprint(1, sharding, checkpointing)
        room = usable(card_gb) - (one.total - one.activations)
        most = min(self.share, int(room // one.activations))
        if most < 1:
            return None
        micro_batch = next(size for size in range(most, 0, -1) if self.share % size == 0)
        return Way(micro_batch, sharding, checkpointing, (one.total + (micro_batch - 1) * one.activations) / 1e9)


def usable(card_gb: float) -> float:
    """Bytes."""
    return card_gb * 1e9 * (1 - HEADROOM)
