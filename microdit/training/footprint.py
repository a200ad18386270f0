"""What a process holds in memory while it trains, by arithmetic. `benchmarks/memory.py` compares it with tensors that are counted.

Shape legend: n tokens of a block, D its width, A attention width, F feed-forward width, L caption tokens, C tokens that experts take.
"""

from dataclasses import dataclass

from microdit.model.blocks import BlockShape
from microdit.model.microdit import MicroDiT, ModelConfig
from microdit.model.routing import METHODS

FLOAT = 4  # bytes: weights, gradients, moments and averages are float32


@dataclass(frozen=True)
class Footprint:
    """Bytes. `activations`: what the forward pass keeps for the backward pass, at its end; `gathered`: low-precision copies of weights,
    FSDP's of the two largest blocks and of what lies outside of blocks, or autocast's of all."""

    parameters: int
    gradients: int
    moments: int
    averages: int
    activations: int
    gathered: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.moments + self.averages + self.activations + self.gathered


def footprint(
    model: MicroDiT,
    micro_batch: int,
    tokens: int,
    kept: int,
    caption_tokens: int,
    ranks: int = 1,
    emas: int = 1,
    element: int = 2,
    checkpointing: bool = False,
    sharded: bool = True,
) -> Footprint:
    """Of one of `ranks` processes that share the model by FSDP, or each hold the whole. `model` may be on the meta device.

    `element`: bytes of an activation, 2 in bfloat16 and 4 in float32. If not `sharded`, 2 is autocast, which keeps norms in float32:
    these are not reckoned, so activations come out low.
    """
    weights = {name: weight.numel() for name, weight in model.named_parameters()}
    # FSDP deals out rows of the first dimension, rounded up: the weights of 8 experts are never cut into more than 8.
    owners = ranks if sharded else 1
    share = sum(-(-len(weight) // owners) * weight[0].numel() for weight in model.parameters()) * FLOAT
    blocks: dict[str, int] = {}
    for name, count in weights.items():
        stack, number = name.split(".")[:2]
        group = f"{stack}.{number}" if stack in ("blocks", "mixer", "decoder") else "caption" if stack == "caption" else "rest"
        blocks[group] = blocks.get(group, 0) + count
    # One block computes while the next one comes in.
    copied = blocks.pop("rest") + 2 * max(blocks.values()) if sharded else sum(weights.values())
    gathered = copied * element if owners > 1 or element != FLOAT else 0
    kept_elements = activations(model.config, tokens, kept, caption_tokens, checkpointing)
    return Footprint(share, share, 2 * share, emas * share, micro_batch * kept_elements * element, gathered)


def activations(config: ModelConfig, tokens: int, kept: int, caption_tokens: int, checkpointing: bool) -> int:
    """Elements that autograd keeps for one sample. With checkpointing, blocks keep their input, and one block is computed anew."""
    by_block = config.tokens_by_block(tokens, kept)
    blocks = [_block(shape, width, n, caption_tokens, config.expert_capacity) for shape, width, n in by_block]
    inside = sum(n * width for _, width, n in by_block) + max(blocks) if checkpointing else sum(blocks)
    return inside + _outside(config, tokens, kept, caption_tokens)


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
