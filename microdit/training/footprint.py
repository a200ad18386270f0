"""What a process holds in memory while it trains, by arithmetic. `benchmarks/memory.py` compares it with tensors that are counted.

Shape legend: n tokens of a block, D its width, A attention width, F feed-forward width, L caption tokens, C tokens that experts take.
"""

from dataclasses import dataclass, replace
from typing import Literal

from microdit.model.blocks import BlockShape
from microdit.model.microdit import MicroDiT, ModelConfig
from microdit.model.routing import METHODS
from microdit.training.adamw8 import moment_bytes

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
