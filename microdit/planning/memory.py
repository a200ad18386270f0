"""What a process holds in memory while it trains, by arithmetic. `benchmarks/memory.py` compares it with tensors that are counted.

Shape legend: n tokens of a block, D its width, A attention width, F feed-forward width, L caption tokens, C tokens that experts take.

Does a phase fit a card, and with which micro-batch, sharding and savings? By the arithmetic of `planning/memory.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

from microdit.config.schema import EngineRecipe, OptimizerRecipe, PhaseRecipe, Recipe
from microdit.errors import UserError
from microdit.models.blocks import BlockShape
from microdit.models.flops import recomputed_flops, training_flops
from microdit.models.microdit import MicroDiT, ModelConfig
from microdit.models.routing import METHODS, kept_tokens
from microdit.planning.workload import Shapes, config_of
from microdit.training.adamw8 import moment_bytes
from microdit.training.parallel import LARGE, SPARE, STATE_BYTES, WHOLE, Sharding

FLOAT = 4  # bytes: weights, sums of gradients, moments and averages are float32, but where a layout says otherwise


@dataclass(frozen=True)
class Layout:
    """How one of `ranks` processes holds a training: by FSDP its share of the model, by hybrid sharding that of one of the `machine`
    processes of its machine, else all of it.

    `element`: bytes of what products compute in, 2 in bfloat16 and 4 in float32. `recomputed`: the share of blocks that compute twice.
    `accumulates`: whether a step has several micro-batches. `spare`: bytes that the device may spend on speed (parallel.py).
    """

    sharding: Literal["none", "ddp", "fsdp", "hybrid"] = "none"
    ranks: int = 1
    machine: int = 8
    element: int = 2
    recomputed: float = 0.0
    moments: Literal["float32", "int8"] = "float32"
    averages_on_cpu: bool = False
    release_gradients: bool = False
    accumulates: bool = True
    spare: float = 0.0

    @property
    def owners(self) -> int | None:
        """How many processes share one model out; None where each holds all of it."""
        return {"fsdp": self.ranks, "hybrid": self.machine}.get(self.sharding)


@dataclass(frozen=True)
class Footprint:
    """Bytes. `activations`: what the forward pass keeps for the backward pass, at its end. `gathered`: low-precision copies of weights.
    `gradients`: sums that stay there through a step, and `passing`, that come while activations go and are freed behind the optimizer.
    `averages`: on the CPU, the one that is being updated.
    """

    parameters: int
    gradients: int
    passing: int
    moments: int
    averages: int
    activations: int
    gathered: int

    @property
    def lasting(self) -> int:
        return self.parameters + self.gradients + self.moments + self.averages + self.gathered

    @property
    def total(self) -> int:
        """At the worst moment. While all passing gradients come, at least half of the activations have gone: the later half of the blocks
        has most of the weights."""
        return self.lasting + max(self.activations, self.passing + self.activations // 2)

    def samples_in(self, room: float) -> int:
        """How many samples at a time fit there, if this is of one."""
        return int(min(room - self.lasting, 2 * (room - self.lasting - self.passing)) // self.activations)

    def of(self, micro_batch: int) -> "Footprint":
        """For so many samples at a time, if this is of one."""
        return replace(self, activations=micro_batch * self.activations)


def footprint(
    model: MicroDiT,
    micro_batch: int,
    tokens: int,
    kept: int,
    caption_tokens: int,
    layout: Layout = Layout(),
    emas: int = 1,
) -> Footprint:
    """`model` may be on the meta device. With DDP, autocast keeps norms in float32: these are not reckoned, so activations come out low."""
    owners = layout.owners or 1
    # FSDP deals out rows of the first dimension, rounded up: the weights of 8 experts are never cut into more than 8.
    rows = [(-(-len(weight) // owners), weight.shape) for weight in model.parameters()]
    sizes = [count * shape[1:].numel() for count, shape in rows]
    mine, everything = sum(sizes) * FLOAT, sum(weight.numel() for weight in model.parameters())
    moments = sum(moment_bytes(*item) for item in rows) if layout.moments == "int8" else 2 * mine
    averages = max(sizes) * FLOAT * bool(emas) if layout.averages_on_cpu else emas * mine
    kept_elements = activations(model.config, tokens, kept, caption_tokens, layout.recomputed)
    lasting, passing = _gradients(layout, mine, everything)
    return Footprint(
        mine, lasting, passing, moments, averages, micro_batch * kept_elements * layout.element, _gathered(model, layout, everything)
    )


def _gradients(layout: Layout, mine: int, everything: int) -> tuple[int, int]:
    """Bytes of those that last, and of those that pass. `mine`: bytes of the process's weights; `everything`: numbers of the model's."""
    if layout.sharding == "ddp":
        return mine, 0  # its buckets
    if layout.owners:
        if not layout.accumulates:
            return 0, mine
        return (FLOAT * everything, mine) if layout.owners > 1 and FLOAT * everything < layout.spare else (mine, 0)
    if layout.release_gradients:
        return (mine, 0) if layout.accumulates else (0, layout.element * everything)
    return mine, layout.element * everything


def _gathered(model: MicroDiT, layout: Layout, everything: int) -> int:
    """Of all weights, if there is room with FSDP; else of the two largest blocks and of what lies outside of blocks."""
    if layout.element == FLOAT and layout.owners in (None, 1):
        return 0
    if layout.owners is None or layout.element * everything < layout.spare:
        return layout.element * everything
    blocks: dict[str, int] = {}
    for name, weight in model.named_parameters():
        stack, number = name.split(".")[:2]
        group = f"{stack}.{number}" if stack in ("blocks", "mixer", "decoder") else "caption" if stack == "caption" else "rest"
        blocks[group] = blocks.get(group, 0) + weight.numel()
    # One block computes while the next one comes in.
    return (blocks.pop("rest") + 2 * max(blocks.values())) * layout.element


def activations(config: ModelConfig, tokens: int, kept: int, caption_tokens: int, recomputed: float) -> int:
    """Elements that autograd keeps for one sample. Of blocks that are recomputed, the first ones, it keeps their input; one of them at a
    time has all, when the later blocks' have gone.
    """
    by_block = config.tokens_by_block(tokens, kept)
    blocks = [_block(shape, width, n, caption_tokens, config.expert_capacity) for shape, width, n in by_block]
    again = config.recomputed(recomputed)
    inputs = sum(n * width for _, width, n in by_block[:again])
    return inputs + max([sum(blocks[again:]), *blocks[:again]]) + _outside(config, tokens, kept, caption_tokens)


def _block(shape: BlockShape, dim: int, n: int, caption_tokens: int, capacity: float) -> int:
    D, A, F, L = dim, shape.attention_dim, shape.ffn_dim, caption_tokens
    # residual, its norm, modulated; qkv, q and k normed, output twice (as heads and flat); projected
    attention = 3 * n * D + 3 * n * A + 2 * n * A + 2 * n * A + n * D
    # residual, its norm, q, q normed, output twice; k and v, k normed
    cross = 2 * n * D + 2 * n * D + 2 * n * D + 3 * L * D
    # residual, its norm, modulated; then gate, its activation, up, their product (or up and its activation), and the output
    feed_forward = 3 * n * D + (4 if shape.gated else 2) * n * F + n * D
    if shape.num_experts:
        chosen = shape.num_experts * int(capacity * n / shape.num_experts)
        # the tokens that experts take, hidden before and after its activation, their output, weighted; the sum
        feed_forward = 3 * n * D + chosen * D + 2 * chosen * F + chosen * D + n * D
    return attention + cross + feed_forward + 6 * D


def _outside(config: ModelConfig, tokens: int, kept: int, caption_tokens: int) -> int:
    D, M, L, F = config.dim, config.mixer_dim, caption_tokens, config.caption_ffn_dim
    # text; projected, activated, normed, projected; the caption block's attention and feed-forward
    caption = L * (config.caption_channels + 4 * D) + L * (2 * D + 7 * D) + L * (2 * D + 4 * F)
    method, P = METHODS[config.routing], config.patch_values
    projections = 0
    if config.mixer and M != D:  # into the mixer, its caption, and out of it
        projections += 2 * (kept if method.drop == "patches" else tokens) * D + L * (D + M)
        projections += 2 * (tokens if method.drop == "blocks" else kept) * M
    if config.decoder and M != D:
        projections += 2 * kept * D + L * (D + M)
    fused = 2 * tokens * D if method.restore == "fused" else 0
    return caption + projections + fused + tokens * P + config.last_tokens(tokens, kept) * (3 * config.last_dim + 4 * P)


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
