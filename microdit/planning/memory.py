"""The memory that a training process needs, by arithmetic, and the engine settings with which a phase fits a card.

`footprint` adds up weights, gradients, optimizer moments, weight averages, activations and FSDP's gathered copies for a `Layout`.
`benchmarks/memory.py` compares the sums with tensors that are counted. `PhaseMemory` searches layouts for one phase of a recipe.

Shape legend: n tokens of a block, D its width, A attention width, F feed-forward width, L caption tokens, C tokens that experts take.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal

import torch
from torch import nn

from microdit.config.schema import AlignmentRecipe, EngineRecipe, OptimizerRecipe, PhaseRecipe, Recipe, projector_of
from microdit.errors import UserError
from microdit.models.alignment import Alignment
from microdit.models.blocks import BlockShape
from microdit.models.flops import recomputed_flops, training_flops
from microdit.models.microdit import MicroDiT, ModelConfig
from microdit.models.routing import METHODS, kept_tokens
from microdit.planning.workload import Shapes, config_of

Sharding = Literal["none", "ddp", "fsdp", "hybrid"]
FLOAT = 4  # bytes: weights, accumulated gradients, moments and averages are float32 unless a layout says otherwise
LARGE = 500_000_000  # parameters from which sharding "auto" shards a model, unless it is known to fit unsharded
STATE_BYTES = 20  # per parameter of an unsharded model: float32 weights, gradients and two moments; bfloat16 weights and gradients
WHOLE = 0.4  # of a GPU's memory: sharding "auto" does not shard a model whose state takes less
SPARE = 0.1  # of a device's memory, which may be traded for speed
HEADROOM = 0.1  # of a card, left free for kernels' workspaces and for fragmentation
ENOUGH = 4096  # patches in a micro-batch from which a GPU is taken to be busy (a judgement, not measured)
RECOMPUTED = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the blocks for which activation checkpointing is considered
MACHINE = 8  # GPUs of one machine, where there are several
BLOCK = 256  # numbers that share a scale in 8-bit moments, at most
LEAST_BLOCK = 16  # vectors, and weights whose rows only smaller blocks divide, keep float32 moments


@dataclass(frozen=True)
class Layout:
    """The layout of the training state on one of `ranks` processes.

    With sharding "fsdp" it holds its part of the model, with "hybrid" the part of one of the `machine` processes on its machine, else all
    of it. `element` is the size in bytes of the dtype of matrix products: 2 for bfloat16, 4 for float32. `recomputed` is the share of
    blocks under activation checkpointing. `accumulates` says whether a step has several micro-batches. `spare` is how many bytes of the
    device may be traded for speed.
    """

    sharding: Sharding = "none"
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
        """Number of processes that share one copy of the model; None if each process holds all of it."""
        return {"fsdp": self.ranks, "hybrid": self.machine}.get(self.sharding)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process, by purpose.

    `gradients` stay allocated throughout a step; `passing` gradients appear while activations are freed, and go after the optimizer step.
    `averages` that live on the CPU count with the one that is being updated. `activations` are what the forward pass keeps for the
    backward pass, at its peak. `gathered` are low-precision copies of weights, a
    distillation's teacher among them.
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
        """Peak memory.

        By the time all passing gradients exist, at least half of the activations are freed, because most weights lie in later blocks.
        """
        return self.lasting + max(self.activations, self.passing + self.activations // 2)

    def samples_in(self, room: float) -> int:
        """Return the largest micro-batch that fits into `room` bytes, if this is the footprint of one sample."""
        return int(min(room - self.lasting, 2 * (room - self.lasting - self.passing)) // self.activations)

    def of(self, micro_batch: int) -> "Footprint":
        """Return the footprint of `micro_batch` samples, if this is the footprint of one."""
        return replace(self, activations=micro_batch * self.activations)


def footprint(
    model: MicroDiT,
    micro_batch: int,
    tokens: int,
    kept: int,
    caption_tokens: int,
    layout: Layout = Layout(),
    emas: int = 1,
    alignment: Alignment | None = None,
) -> Footprint:
    """Return the bytes of one process, with those of an `alignment` that is trained beside the model. Both may be on the meta device.

    With DDP, autocast keeps norms in float32: these are not counted, so activations come out low.
    """
    owners = layout.owners or 1
    trained = [*model.named_parameters(), *(alignment.named_parameters() if alignment else ())]
    # FSDP deals out rows of the first dimension, rounded up: the weights of 8 experts are never cut into more than 8.
    rows = [(-(-len(weight) // owners), weight.shape) for _, weight in trained]
    sizes = [count * shape[1:].numel() for count, shape in rows]
    mine, everything = sum(sizes) * FLOAT, sum(weight.numel() for _, weight in trained)
    moments = sum(moment_bytes(*item) for item in rows) if layout.moments == "int8" else 2 * mine
    averaged = sizes[: len(list(model.parameters()))]
    averages = max(averaged) * FLOAT * bool(emas) if layout.averages_on_cpu else emas * sum(averaged) * FLOAT
    of_sample = activations(model.config, tokens, kept, caption_tokens, layout.recomputed) * layout.element
    of_sample += alignment_activations(alignment, model.config, tokens, kept, layout.element) if alignment else 0
    lasting, passing = _gradients(layout, mine, everything)
    return Footprint(mine, lasting, passing, moments, averages, micro_batch * of_sample, _gathered(trained, layout, everything))


def _gradients(layout: Layout, mine: int, everything: int) -> tuple[int, int]:
    """Return the bytes of lasting and of passing gradients.

    `mine` are the bytes of this process's weights; `everything` is the number of parameters of the model.
    """
    if layout.sharding == "ddp":
        return mine, 0  # they are views of its buckets
    if layout.owners:
        if not layout.accumulates:
            return 0, mine
        return (FLOAT * everything, mine) if layout.owners > 1 and FLOAT * everything < layout.spare else (mine, 0)
    if layout.release_gradients:
        return (mine, 0) if layout.accumulates else (0, layout.element * everything)
    return mine, layout.element * everything


@cache
def block_size(shape: torch.Size) -> int | None:
    """Return how many numbers share a scale in 8-bit moments of a weight: the largest divisor of a row up to `BLOCK`.

    None means that the moments stay float32. A block lies within one row of the first dimension, the unit in which FSDP shards.
    """
    row = math.prod(shape[1:])
    size = next(size for size in range(min(BLOCK, row), 0, -1) if row % size == 0)
    return size if len(shape) >= 2 and size >= LEAST_BLOCK else None


def moment_bytes(rows: int, shape: torch.Size) -> int:
    """Return the bytes of both 8-bit moments of `rows` rows of a weight of that shape."""
    numbers, block = rows * math.prod(shape[1:]), block_size(shape)
    return 8 * numbers if block is None else 2 * numbers + 8 * (numbers // block)


def _gathered(trained: list[tuple[str, nn.Parameter]], layout: Layout, everything: int) -> int:
    """Return the bytes of low-precision copies: of all weights if there is room, else of two blocks and what lies outside of blocks."""
    if layout.element == FLOAT and layout.owners in (None, 1):
        return 0
    if layout.owners is None or layout.element * everything < layout.spare:
        return layout.element * everything
    blocks: dict[str, int] = {}
    for name, weight in trained:
        stack, number = name.split(".")[:2]
        group = f"{stack}.{number}" if stack in ("blocks", "mixer", "decoder", "preamble") else "caption" if stack == "caption" else "rest"
        blocks[group] = blocks.get(group, 0) + weight.numel()
    # One block computes while the next one comes in.
    return (blocks.pop("rest") + 2 * max(blocks.values())) * layout.element


def activations(config: ModelConfig, tokens: int, kept: int, caption_tokens: int, recomputed: float) -> int:
    """Return how many numbers autograd keeps for one sample.

    The first blocks may be recomputed: of these it keeps the inputs, plus all activations of one block at a time, at a moment when those of
    the later blocks are freed.
    """
    L = config.caption_length or caption_tokens
    by_block = config.tokens_by_block(tokens, kept)
    blocks = [_block(config, shape, width, n, L) for shape, width, n in by_block]
    again = config.recomputed(recomputed)
    inputs = sum((n + (L if config.joint else 0)) * width for _, width, n in by_block[:again])
    return inputs + max([sum(blocks[again:]), *blocks[:again]]) + _outside(config, tokens, kept, L)


def alignment_activations(alignment: Alignment, config: ModelConfig, tokens: int, kept: int, element: int) -> int:
    """Return the bytes that autograd keeps of one sample's alignment, beside the block's output, which the next layer keeps too.

    These are the MLP's hidden layers before and after their activation, or a convolution's input and output on all places, where tokens
    were dropped; and in float32 the projected tokens and the features.
    """
    seen, shape = kept if config.is_sparse(alignment.block - 1) else tokens, alignment.shape
    inside = 4 * seen * shape.width if shape.kind == "mlp" else tokens * (shape.dim + shape.channels) * (seen < tokens)
    return inside * element + 2 * seen * shape.channels * FLOAT


def _block(config: ModelConfig, shape: BlockShape, dim: int, n: int, caption_tokens: int) -> int:
    D, A, L, kept_norm, gated = dim, shape.attention_dim, caption_tokens, _norm(config), config.conditioning != "none"
    per_head = config.qk_norm == "per_head"  # the norm before it is weighted
    # residual, its norm, modulated, and the branch's output, for the gate; twice
    streams = 2 * n * D * (kept_norm + 2 * gated)
    if shape.kind == "cross":
        # qkv, q and k normed, output twice (as heads and flat)
        attention = (3 + 2 + 2 + 2 * per_head) * n * A
        # residual, its norm, q, q normed, output twice; k and v, k normed
        attention += (kept_norm + 4 + per_head) * n * D + (3 + per_head) * L * D
        return streams + attention + _feed_forward(config, shape, D, n) + 6 * D * gated
    both = n + L
    if shape.kind == "joint":
        # qkv, all three of them side by side, output twice
        attention = (3 + 3 + 2 + 2 * per_head) * both * A
        texts = 2 * L * D * (kept_norm + 2 * gated) + _dense(shape, L)
        return streams + texts + attention + _feed_forward(config, shape, D, n) + 12 * D * gated
    # of the caption k and v alone
    attention = (3 * n + 2 * L + (1 + per_head) * n + (2 + per_head) * both + 2 * n) * A
    texts = L * D * (kept_norm + gated)
    return streams + texts + attention + _feed_forward(config, shape, D, n) + 8 * D * gated


def _norm(config: ModelConfig) -> int:
    """Return what an unmodulated norm keeps for each number: its input and its output, and an RMS norm also the one without weight."""
    return 3 if config.norm == "rms" else 2


def _feed_forward(config: ModelConfig, shape: BlockShape, dim: int, n: int) -> int:
    if not shape.num_experts:
        return _dense(shape, n)
    chosen = shape.num_experts * int(config.expert_capacity * n / shape.num_experts)
    # the tokens that experts take, hidden before and after its activation, their output, weighted
    return chosen * dim + 2 * chosen * shape.ffn_dim + chosen * dim


def _dense(shape: BlockShape, n: int) -> int:
    """Count gate, its activation, up, their product (or up and its activation)."""
    return (4 if shape.gated else 2) * n * shape.ffn_dim


def _outside(config: ModelConfig, tokens: int, kept: int, caption_tokens: int) -> int:
    D, M, L, F, kept_norm = config.dim, config.mixer_dim, caption_tokens, config.caption_ffn_dim, _norm(config)
    gated, per_head = config.conditioning != "none", config.qk_norm == "per_head"
    caption = L * config.caption_channels  # text
    if config.caption_embedding == "block":
        # projected, activated, normed, projected; the caption block's attention and feed-forward
        caption += L * (2 + kept_norm) * D + L * (kept_norm + 7 + 2 * per_head) * D + L * (kept_norm * D + 4 * F)
    for shape in config.preamble:
        caption += L * (2 * kept_norm * D + (7 + 2 * per_head) * shape.attention_dim) + _dense(shape, L)
    method, P = METHODS[config.routing], config.patch_values
    projections = 0
    if config.mixer and M != D:  # into the mixer, its caption, and out of it
        projections += kept_norm * (kept if method.drop == "patches" else tokens) * D + L * ((kept_norm - 1) * D + M)
        projections += kept_norm * (tokens if method.drop == "blocks" else kept) * M
        projections += kept_norm * L * M * config.joint
    if config.decoder and M != D:
        projections += kept_norm * kept * D + L * ((kept_norm - 1) * D + M)
    fused = 2 * tokens * D if method.restore == "fused" else 0
    first = tokens * (P + (config.patch_channels or 0))
    rotary = 0 if config.positions == "sincos" else 2 * kept * config.head_dim
    return (
        caption + projections + fused + first + rotary + config.last_tokens(tokens, kept) * ((kept_norm + gated) * config.last_dim + 4 * P)
    )


@dataclass(frozen=True)
class MemoryPlan:
    """A micro-batch and a layout, with the memory they take in GB (10^9 bytes) and the time of a step relative to no recomputation."""

    micro_batch: int
    layout: Layout
    gigabytes: float
    time: float

    def engine(self, engine: EngineRecipe) -> EngineRecipe:
        """Return `engine` with the settings of this plan."""
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
        """Return `optimizer` with the settings of this plan."""
        return replace(optimizer, moments=self.layout.moments)

    def overrides(self) -> list[str]:
        """Return the overrides for `microdit train` that apply this plan."""
        engine, plain = self.engine(EngineRecipe()), EngineRecipe()
        names = ("micro_batch", "sharding", "release_gradients", "averages_on_cpu", "activation_checkpointing")
        changed = [(name, getattr(engine, name)) for name in names if getattr(engine, name) != getattr(plain, name)]
        moments = [] if self.layout.moments == "float32" else [f"optimizer.moments={self.layout.moments}"]
        return [f"engine.{name}={str(value).lower()}" for name, value in changed] + moments

    def summary(self) -> str:
        """Return the plan as table cell text."""
        layout = self.layout
        savings = [
            "gradients released" if layout.release_gradients else "",
            "averages on CPU" if layout.averages_on_cpu else "",
            "int8 moments" if layout.moments == "int8" else "",
            "recomputed" if layout.recomputed == 1 else f"{layout.recomputed:.0%} recomputed" if layout.recomputed else "",
        ]
        way = "whole" if layout.sharding == "none" else layout.sharding
        return ", ".join([str(self.micro_batch), way, *filter(None, savings), f"{self.gigabytes:.1f}"])


class PhaseMemory:
    """Memory of one phase on each GPU, for samples of its largest shape at its least masked step."""

    def __init__(self, recipe: Recipe, phase: PhaseRecipe, shapes: Shapes, ranks: int, check: Callable[[], None] = lambda: None):
        """Build the phase's model on the meta device. `check` is called before each slow computation and may raise to cancel it.

        Raises UserError if the batch size is not a multiple of `ranks`.
        """
        check()
        self._check = check
        if phase.batch_size % ranks:
            raise UserError(
                f"{recipe.name}: the batch of {phase.batch_size} cannot be split evenly over {ranks} GPUs: use a multiple of {ranks}."
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
        self._model = _weightless(replace(self._config, position_scale=1.0))
        self._alignment = _weightless_alignment(recipe.alone(phase).alignment, self._config.dim, shapes.feature_channels)
        self.parameters = sum(weight.numel() for weight in self._model.parameters())
        self._teacher = self.parameters * self._element * (recipe.distillation is not None)  # each process holds it whole
        self._of_one = cache(self._footprint_of_one)

    def footprint(self, micro_batch: int, layout: Layout) -> Footprint:
        """Return the bytes of one process."""
        return self._of_one(layout).of(micro_batch)

    def as_configured(self, recipe: Recipe, card_gb: float) -> tuple[MemoryPlan, Footprint]:
        """Return the plan and footprint of the recipe's own settings. Raises UserError for hybrid sharding without several machines."""
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
        return MemoryPlan(micro_batch, layout, parts.total / 1e9, self.time_of(layout)), parts

    def best_plan(self, card_gb: float) -> MemoryPlan | None:
        """Return the first of `layouts` whose micro-batch fits the card and holds at least `ENOUGH` patches (or the whole batch).

        If none does, return the layout with the largest micro-batch, or None if not even one sample fits.
        """
        most: MemoryPlan | None = None
        for layout in self.layouts(card_gb):
            plan = self._largest(card_gb, layout)
            if plan is None:
                continue
            if plan.micro_batch == self.share or plan.micro_batch * self._kept >= ENOUGH:
                return plan
            if most is None or plan.micro_batch > most.micro_batch:
                most = plan
        return most

    def layouts(self, card_gb: float) -> Iterator[Layout]:
        """Yield the layouts in order of preference.

        First those that cost no time and change no result: unsharded, then sharded weights. Then released gradients, averages on the CPU
        and 8-bit moments. Last the same with activation checkpointing of more and more blocks.
        """
        whole = Layout("ddp" if self.ranks > 1 else "none", self.ranks, MACHINE, self._element, spare=SPARE * card_gb * 1e9)
        sharded = replace(whole, sharding="fsdp")
        near = [replace(whole, sharding="hybrid")] if self._has_machines else []
        released = replace(whole, release_gradients=True) if self.ranks == 1 else whole
        layouts = [whole, *near, sharded, released]
        if self._emas:
            layouts += [replace(layout, averages_on_cpu=True) for layout in (released, sharded)]
        if not self._muon:
            layouts += [replace(layout, averages_on_cpu=bool(self._emas), moments="int8") for layout in (released, sharded)]
        for share in RECOMPUTED:
            yield from (replace(layout, recomputed=share) for layout in dict.fromkeys(layouts))

    @property
    def _has_machines(self) -> bool:
        """True if the GPUs fill several machines."""
        return self.ranks > MACHINE and self.ranks % MACHINE == 0

    def _sharding(self, engine: EngineRecipe, card_gb: float) -> Sharding:
        """Return what `training.parallel.sharding_of` would choose on such cards."""
        if engine.sharding == "hybrid" and not self._has_machines:
            raise UserError(
                f"{self.name}: engine.sharding is hybrid, and {self.ranks} GPUs are not several machines of {MACHINE}: "
                "use fsdp, or more GPUs."
            )
        if engine.sharding in ("fsdp", "hybrid"):
            return engine.sharding
        if self.ranks == 1:
            return "none"
        if engine.sharding == "ddp" or self.parameters < LARGE:
            return "ddp"
        return "hybrid" if self._has_machines and STATE_BYTES * self.parameters / MACHINE < WHOLE * card_gb * 1e9 else "fsdp"

    def time_of(self, layout: Layout) -> float:
        """Return the time of a step relative to one without recomputation."""
        shape = self._config, self._tokens, self._kept, self._caption_tokens
        return 1 + recomputed_flops(*shape, layout.recomputed) / training_flops(*shape)

    def no_fit_error(self, card_gb: float, card: str) -> UserError:
        """Return the error for a card that no layout fits."""
        least = min(self.footprint(1, layout).total for layout in self.layouts(card_gb)) / 1e9
        return UserError(
            f"{self.name} does not fit: one sample at a time, with all memory savings, needs {least:.1f} GB "
            f"on each of {self.ranks} {card}, and {usable(card_gb) / 1e9:.1f} of its {card_gb:g} GB can be used: "
            "use more GPUs, a larger card or a smaller model."
        )

    def _largest(self, card_gb: float, layout: Layout) -> MemoryPlan | None:
        """Return the plan with the largest micro-batch that fits and divides a GPU's part of the batch, None if none fits."""
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
        return MemoryPlan(micro_batch, layout, self.footprint(micro_batch, layout).total / 1e9, self.time_of(layout))

    def _footprint_of_one(self, layout: Layout) -> Footprint:
        self._check()
        shape = self._tokens, self._kept, self._caption_tokens
        if layout.recomputed:  # changes activations only
            whole = self._of_one(replace(layout, recomputed=0.0))
            saved = activations(self._config, *shape, 0.0) - activations(self._config, *shape, layout.recomputed)
            return replace(whole, activations=whole.activations - self._element * saved)
        one = footprint(self._model, 1, *shape, layout, self._emas, self._alignment)
        return replace(one, gathered=one.gathered + self._teacher)


@lru_cache(maxsize=16)
def _weightless(config: ModelConfig) -> MicroDiT:
    """Return the model on the meta device, where building it takes a second. Phases that differ in positions alone share it."""
    with torch.device("meta"):
        return MicroDiT(config)


def _weightless_alignment(alignment: AlignmentRecipe | None, dim: int, channels: int | None) -> Alignment | None:
    if alignment is None or channels is None:
        return None
    with torch.device("meta"):
        return Alignment(projector_of(alignment, dim, channels), alignment.block)


def usable(card_gb: float) -> float:
    """Return how many bytes of a card a training may use."""
    return card_gb * 1e9 * (1 - HEADROOM)
