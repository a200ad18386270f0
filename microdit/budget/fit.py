"""Does a phase fit a card, and with which micro-batch, sharding and savings? By the arithmetic of `training/footprint.py`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch

from microdit.budget.bill import config_of
from microdit.budget.shapes import Shapes
from microdit.errors import UserError
from microdit.model.flops import recomputed_flops, training_flops
from microdit.model.microdit import MicroDiT
from microdit.model.routing import kept_tokens
from microdit.recipe import EngineRecipe, OptimizerRecipe, PhaseRecipe, Recipe
from microdit.training.footprint import Footprint, Layout, activations, footprint
from microdit.training.parallel import LARGE, SPARE, STATE_BYTES, WHOLE, Sharding

HEADROOM = 0.1  # of the card that is left free, for what kernels need for a moment and for fragments
ENOUGH = 4096  # patches that the backbone computes at a time, for a GPU to have enough to do (a judgement, not measured)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the blocks that may be recomputed
MACHINE = 8  # GPUs of one, where there are several machines


@dataclass(frozen=True)
class Way:
    """How a GPU may hold its share of the training. `gigabytes`: in use, of 10^9 bytes. `time`: of a step, 1 if nothing is recomputed."""

    micro_batch: int
    layout: Layout
    gigabytes: float
    time: float

    def engine(self, engine: EngineRecipe) -> EngineRecipe:
        """Those settings, changed to this way."""
        layout = self.layout
        share: bool | float = layout.recomputed == 1 or layout.recomputed
        return replace(
            engine,
            sharding="auto" if layout.sharding == "none" else layout.sharding,
            micro_batch=self.micro_batch,
            activation_checkpointing=share or False,
            averages_on_cpu=layout.averages_on_cpu,
            release_gradients=layout.release_gradients,
        )

    def optimizer(self, optimizer: OptimizerRecipe) -> OptimizerRecipe:
        return replace(optimizer, moments=self.layout.moments)

    def overrides(self) -> list[str]:
        """As they are written behind `microdit train`."""
        engine, plain = self.engine(EngineRecipe()), EngineRecipe()
        names = ("micro_batch", "sharding", "release_gradients", "averages_on_cpu", "activation_checkpointing")
        said = [(name, getattr(engine, name)) for name in names if getattr(engine, name) != getattr(plain, name)]
        moments = [] if self.layout.moments == "float32" else [f"optimizer.moments={self.layout.moments}"]
        return [f"engine.{name}={str(value).lower()}" for name, value in said] + moments

    def in_words(self) -> str:
        layout = self.layout
        savings = [
            "gradients released" if layout.release_gradients else "",
            "averages on CPU" if layout.averages_on_cpu else "",
            "int8 moments" if layout.moments == "int8" else "",
            "recomputed" if layout.recomputed == 1 else f"{layout.recomputed:.0%} recomputed" if layout.recomputed else "",
        ]
        way = "whole" if layout.sharding == "none" else layout.sharding
        return ", ".join([str(self.micro_batch), way, *filter(None, savings), f"{self.gigabytes:.1f}"])


class Load:
    """What a GPU has to hold of a phase: the model, and samples of its largest shape at its least masked step."""

    def __init__(self, recipe: Recipe, phase: PhaseRecipe, shapes: Shapes, ranks: int, check: Callable[[], None] = lambda: None):
        """`check` is called before each piece of work that takes a while, and may raise.

        Raises UserError if the batch cannot be dealt out.
        """
        check()
        self._check = check
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
        self._element: int = 4 if recipe.engine.precision == "float32" else 2
        self._muon = recipe.optimizer.method == "muon"
        self._config = config_of(recipe, shapes)
        with torch.device("meta"):
            self._model = MicroDiT(self._config)
        self.parameters = sum(weight.numel() for weight in self._model.parameters())
        self._of_one = cache(self._footprint_of_one)

    def footprint(self, micro_batch: int, layout: Layout) -> Footprint:
        return self._of_one(layout).of(micro_batch)

    def as_asked(self, recipe: Recipe, card_gb: float) -> tuple[Way, Footprint]:
        """As the recipe says. Raises UserError for hybrid sharding without several whole machines."""
        engine = recipe.engine
        micro_batch = min(engine.micro_batch or self.share, self.share)
        layout = Layout(
            self._sharding(engine, card_gb),
            self.ranks,
            MACHINE,
            self._element,
            float(engine.activation_checkpointing),
            recipe.optimizer.moments,
            engine.averages_on_cpu,
            engine.release_gradients,
            micro_batch < self.share,
            SPARE * card_gb * 1e9,
        )
        parts = self.footprint(micro_batch, layout)
        return Way(micro_batch, layout, parts.total / 1e9, self.time_of(layout)), parts

    def best_way(self, card_gb: float) -> Way | None:
        """Prefer what costs no time and changes nothing: whole weights, then sharded ones; then gradients released, averages on the CPU,
        moments in 8 bits; then recomputing, as few blocks as need be. The first of these that leaves samples of at least `ENOUGH` patches
        at a time.

        Else the most samples that any way allows. None: not even one sample fits.
        """
        most: Way | None = None
        for layout in self.layouts(card_gb):
            way = self._largest(card_gb, layout)
            if way is None:
                continue
            if way.micro_batch == self.share or way.micro_batch * self._kept >= ENOUGH:
                return way
            if most is None or way.micro_batch > most.micro_batch:
                most = way
        return most

    def layouts(self, card_gb: float) -> Iterator[Layout]:
        """All that there are to choose from, the dearest last."""
        whole = Layout("ddp" if self.ranks > 1 else "none", self.ranks, MACHINE, self._element, spare=SPARE * card_gb * 1e9)
        sharded = replace(whole, sharding="fsdp")
        near = [replace(whole, sharding="hybrid")] if self._has_machines else []
        released = replace(whole, release_gradients=True) if self.ranks == 1 else whole
        ways = [whole, *near, sharded, released]
        if self._emas:
            ways += [replace(way, averages_on_cpu=True) for way in (released, sharded)]
        if not self._muon:
            ways += [replace(way, averages_on_cpu=bool(self._emas), moments="int8") for way in (released, sharded)]
        for share in SHARES:
            yield from (replace(way, recomputed=share) for way in dict.fromkeys(ways))

    @property
    def _has_machines(self) -> bool:
        """Whether several machines are full of GPUs."""
        return self.ranks > MACHINE and self.ranks % MACHINE == 0

    def _sharding(self, engine: EngineRecipe, card_gb: float) -> Sharding:
        """As `sharding_of` has it, but that large models are always sharded."""
        if engine.sharding == "hybrid" and not self._has_machines:
            raise UserError(
                f"{self.name}: engine.sharding is hybrid, and {self.ranks} GPUs are not several machines of {MACHINE}: "
                "take fsdp, or more GPUs."
            )
        if engine.sharding in ("fsdp", "hybrid"):
            return engine.sharding
        if self.ranks == 1:
            return "none"
        if engine.sharding == "ddp" or self.parameters < LARGE:
            return "ddp"
        return "hybrid" if self._has_machines and STATE_BYTES * self.parameters / MACHINE < WHOLE * card_gb * 1e9 else "fsdp"

    def time_of(self, layout: Layout) -> float:
        """Of a step, 1 if nothing is recomputed."""
        shape = self._config, self._tokens, self._kept, self._caption_tokens
        return 1 + recomputed_flops(*shape, layout.recomputed) / training_flops(*shape)

    def refuse(self, card_gb: float, card: str) -> UserError:
        """The sentence for a card that has no way."""
        least = min(self.footprint(1, layout).total for layout in self.layouts(card_gb)) / 1e9
        return UserError(
            f"{self.name} does not fit: one sample at a time, with all that saves memory, needs {least:.1f} GB "
            f"of each of {self.ranks} {card}, and {usable(card_gb) / 1e9:.1f} of its {card_gb:g} GB can be used: "
            "take more GPUs, a larger card or a smaller model."
        )

    def _largest(self, card_gb: float, layout: Layout) -> Way | None:
        """The largest micro-batch that fits and divides the share. As large as that, nothing is accumulated."""
        self._check()
        room = usable(card_gb)
        at_once = replace(layout, accumulates=False)
        if self._of_one(at_once).samples_in(room) >= self.share:
            layout, micro_batch = at_once, self.share
        else:
            most = min(self.share - 1, self._of_one(layout).samples_in(room))
            if most < 1:
                return None
            micro_batch = next(size for size in range(most, 0, -1) if self.share % size == 0)
        return Way(micro_batch, layout, self.footprint(micro_batch, layout).total / 1e9, self.time_of(layout))

    def _footprint_of_one(self, layout: Layout) -> Footprint:
        self._check()
        shape = self._tokens, self._kept, self._caption_tokens
        if layout.recomputed:  # which changes nothing but activations
            kept = self._element * activations(self._config, *shape, layout.recomputed)
            return replace(self._of_one(replace(layout, recomputed=0.0)), activations=kept)
        return footprint(self._model, 1, *shape, layout, self._emas)


def usable(card_gb: float) -> float:
    """Bytes."""
    return card_gb * 1e9 * (1 - HEADROOM)
