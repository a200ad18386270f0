"""The FLOPs of one sample in closed form: two for each multiply-add of a matrix product, those of attention included.

The figures equal the counts of PyTorch's FlopCounterMode (tests/models/test_flops.py) without running anything. As is usual, norms,
activations, softmax and the optimizer are not counted.

In all functions `tokens` is the number of patches, and `kept` how many of them remain after the drop (all of them if nothing is dropped).
"""

from microdit.models.blocks import BlockShape
from microdit.models.microdit import TIME_FREQUENCIES, ModelConfig
from microdit.models.routing import METHODS


def forward_flops(config: ModelConfig, tokens: int, kept: int, caption_tokens: int) -> int:
    """Return the FLOPs of a forward pass. With routing sprint, `kept` 0 is a pass without the sparse blocks."""
    return 2 * (_without_input_gradient(config, tokens, caption_tokens) + _with_input_gradient(config, tokens, kept, caption_tokens))


def training_flops(config: ModelConfig, tokens: int, kept: int, caption_tokens: int) -> int:
    """Return the FLOPs of a forward and a backward pass.

    The backward pass of a product costs twice its forward pass, or the same where its input needs no gradient.
    """
    outer = _without_input_gradient(config, tokens, caption_tokens)
    inner = _with_input_gradient(config, tokens, kept, caption_tokens)
    return 2 * (2 * outer + 3 * inner)


def recomputed_flops(config: ModelConfig, tokens: int, kept: int, caption_tokens: int, share: float) -> int:
    """Return the FLOPs that activation checkpointing adds: a second forward pass of the first `share` of all blocks."""
    first = config.tokens_by_block(tokens, kept)[: config.recomputed(share)]
    return sum(2 * _block(config, shape, width, seen, caption_tokens) for shape, width, seen in first)


def _without_input_gradient(config: ModelConfig, tokens: int, caption_tokens: int) -> int:
    """Count the multiply-adds of the first layers, on patches, noise level and caption."""
    return config.dim * (tokens * config.patch_values + TIME_FREQUENCIES + caption_tokens * config.caption_channels)


def _with_input_gradient(config: ModelConfig, tokens: int, kept: int, caption_tokens: int) -> int:
    """Count the multiply-adds of all other products."""
    dim, mixer_dim, method = config.dim, config.mixer_dim, METHODS[config.routing]
    total = dim * dim + _caption(config, caption_tokens)
    for shape, width, seen in config.tokens_by_block(tokens, kept):
        total += _block(config, shape, width, seen, caption_tokens)

    if config.mixer and mixer_dim != dim:
        into_mixer = kept if method.drop == "patches" else tokens
        out_of_mixer = tokens if method.drop == "blocks" else kept
        total += (into_mixer + caption_tokens + out_of_mixer) * dim * mixer_dim
    if config.decoder and mixer_dim != dim:
        total += (kept + caption_tokens) * dim * mixer_dim
    if method.restore == "fused":
        total += tokens * 2 * dim * dim

    return total + 2 * dim * config.last_dim + config.last_tokens(tokens, kept) * config.last_dim * config.patch_values


def _caption(config: ModelConfig, tokens: int) -> int:
    dim = config.dim
    attention = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
    return tokens * dim * dim + attention + 3 * tokens * dim * config.caption_ffn_dim + 2 * dim * dim


def _block(config: ModelConfig, shape: BlockShape, dim: int, tokens: int, caption_tokens: int) -> int:
    modulation = 6 * config.dim * dim
    attention = 4 * tokens * dim * shape.attention_dim + 2 * tokens * tokens * shape.attention_dim
    cross = 2 * (tokens + caption_tokens) * dim * dim + 2 * tokens * caption_tokens * dim
    if not shape.num_experts:
        return modulation + attention + cross + (3 if shape.gated else 2) * tokens * dim * shape.ffn_dim
    chosen = shape.num_experts * int(config.expert_capacity * tokens / shape.num_experts)
    return modulation + attention + cross + tokens * dim * shape.num_experts + 2 * chosen * dim * shape.ffn_dim
