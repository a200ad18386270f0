"""The FLOPs of one sample in closed form: two for each multiply-add of a matrix product, those of attention included.

The figures equal the counts of PyTorch's FlopCounterMode (tests/models/test_flops.py) without running anything. As is usual, norms,
activations, softmax and the optimizer are not counted.

In all functions `tokens` is the number of patches, and `kept` how many of them remain after the drop (all of them if nothing is dropped).
"""

from microdit.models.alignment import KERNEL, ProjectorShape
from microdit.models.blocks import BlockShape
from microdit.models.microdit import TIME_FREQUENCIES, ModelConfig
from microdit.models.routing import METHODS


def forward_flops(config: ModelConfig, tokens: int, kept: int, caption_tokens: int) -> int:
    """Return the FLOPs of a forward pass. With routing sprint, `kept` 0 is a pass without the sparse blocks."""
    return 2 * (_without_input_gradient(config, tokens, caption_tokens) + _with_input_gradient(config, tokens, kept, caption_tokens))


def caption_flops(config: ModelConfig, caption_tokens: int) -> int:
    """Return the FLOPs of a forward pass that sampling spends only once: a caption's embedding, text-only blocks, keys and values."""
    length = config.caption_length or caption_tokens
    embedding = 0 if config.caption_length else caption_tokens * config.caption_channels * config.dim
    preamble = sum(_text_block(shape, config.dim, length) for shape in config.preamble)
    crossed = [width for shape, width, _ in config.tokens_by_block(1, 1) if shape.kind == "cross"]
    return 2 * (embedding + _caption(config, length) + preamble + sum(2 * length * width * width for width in crossed))


def parts_of_forward(config: ModelConfig, tokens: int, kept: int, caption_tokens: int) -> dict[str, int]:
    """Return the FLOPs of a forward pass by part of the network; they add up to `forward_flops`."""
    length = config.caption_length or caption_tokens
    blocks = [(shape, width, seen, length) for shape, width, seen in config.tokens_by_block(tokens, kept)]
    mixer, rest = blocks[: len(config.mixer)], blocks[len(config.mixer) :]
    backbone, decoder = rest[: len(rest) - len(config.decoder)], rest[len(rest) - len(config.decoder) :]
    embedding = 0 if config.caption_length else caption_tokens * config.caption_channels * config.dim
    parts = {
        "caption": embedding + _caption(config, length) + sum(_text_block(shape, config.dim, length) for shape in config.preamble),
        "patch-mixer": sum(_block(config, *block) for block in mixer),
        "backbone, attention": sum(_attention(config, *block) for block in backbone),
        "backbone, feed-forward": sum(_feed_forward(config, *block) for block in backbone),
        "decoder": sum(_block(config, *block) for block in decoder),
    }
    found = {name: 2 * count for name, count in parts.items() if count}
    return found | {"patches, noise level and head": forward_flops(config, tokens, kept, caption_tokens) - sum(found.values())}


def training_flops(config: ModelConfig, tokens: int, kept: int, caption_tokens: int) -> int:
    """Return the FLOPs of a forward and a backward pass.

    The backward pass of a product costs twice its forward pass, or the same where its input needs no gradient.
    """
    outer = _without_input_gradient(config, tokens, caption_tokens)
    inner = _with_input_gradient(config, tokens, kept, caption_tokens)
    return 2 * (2 * outer + 3 * inner)


def alignment_flops(projector: ProjectorShape, tokens: int, seen: int) -> int:
    """Return the FLOPs that representation alignment adds to a forward and a backward pass, at a block that sees `seen` of all tokens."""
    dim, width, channels = projector.dim, projector.width, projector.channels
    if projector.kind == "conv":
        return 6 * tokens * KERNEL**2 * dim * channels
    return 6 * seen * (dim * width + width * width + width * channels)


def recomputed_flops(config: ModelConfig, tokens: int, kept: int, caption_tokens: int, share: float) -> int:
    """Return the FLOPs that activation checkpointing adds: a second forward pass of the first `share` of all blocks."""
    first = config.tokens_by_block(tokens, kept)[: config.recomputed(share)]
    length = config.caption_length or caption_tokens
    return sum(2 * _block(config, shape, width, seen, length) for shape, width, seen in first)


def _without_input_gradient(config: ModelConfig, tokens: int, caption_tokens: int) -> int:
    """Count the multiply-adds of the first layers, on patches, noise level and caption (if no mask token is learnt in front of that)."""
    patches = tokens * config.patch_values * (config.patch_channels or config.dim)
    noise_level = 0 if config.conditioning == "none" else TIME_FREQUENCIES * config.dim
    caption = 0 if config.caption_length else caption_tokens * config.caption_channels * config.dim
    return patches + noise_level + caption


def _with_input_gradient(config: ModelConfig, tokens: int, kept: int, caption_tokens: int) -> int:
    """Count the multiply-adds of all other products."""
    dim, mixer_dim, method, length = config.dim, config.mixer_dim, METHODS[config.routing], config.caption_length or caption_tokens
    total = _caption(config, length) + sum(_text_block(shape, dim, length) for shape in config.preamble)
    total += tokens * (config.patch_channels or 0) * dim
    if config.conditioning != "none":
        total += dim * dim + 2 * dim * config.last_dim  # of the noise level, and of the head
    for shape, width, seen in config.tokens_by_block(tokens, kept):
        total += _block(config, shape, width, seen, length)
    if config.conditioning == "shared":
        total += (12 if config.joint else 6) * dim * sum(config.modulated_widths)

    if config.mixer and mixer_dim != dim:
        into_mixer = kept if method.drop == "patches" else tokens
        out_of_mixer = tokens if method.drop == "blocks" else kept
        total += (into_mixer + (2 if config.joint else 1) * length + out_of_mixer) * dim * mixer_dim
    if config.decoder and mixer_dim != dim:
        total += (kept + length) * dim * mixer_dim
    if method.restore == "fused":
        total += tokens * 2 * dim * dim

    return total + config.last_tokens(tokens, kept) * config.last_dim * config.patch_values


def _caption(config: ModelConfig, tokens: int) -> int:
    dim = config.dim
    project = tokens * config.caption_channels * dim if config.caption_length else 0
    pool = 0 if config.conditioning == "none" else 2 * dim * dim
    if config.caption_embedding == "linear":
        return project + pool
    attention = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
    return project + tokens * dim * dim + attention + 3 * tokens * dim * config.caption_ffn_dim + pool


def _text_block(shape: BlockShape, dim: int, tokens: int) -> int:
    return 4 * tokens * dim * shape.attention_dim + 2 * tokens * tokens * shape.attention_dim + _dense(shape, dim, tokens)


def _block(config: ModelConfig, shape: BlockShape, dim: int, tokens: int, caption_tokens: int) -> int:
    return _attention(config, shape, dim, tokens, caption_tokens) + _feed_forward(config, shape, dim, tokens, caption_tokens)


def _attention(config: ModelConfig, shape: BlockShape, dim: int, tokens: int, caption_tokens: int) -> int:
    """Count a block's attention to image and caption, and its modulation."""
    width, both = shape.attention_dim, tokens + caption_tokens
    modulated = {"cross": 6, "joint": 12}.get(shape.kind, 8)
    if shape.kind == "cross":
        attention = 4 * tokens * dim * width + 2 * tokens * tokens * width
        attention += 2 * both * dim * dim + 2 * tokens * caption_tokens * dim
    elif shape.kind == "joint":
        attention = 4 * both * dim * width + 2 * both * both * width
    else:
        attention = (4 * tokens + 2 * caption_tokens) * dim * width + 2 * tokens * both * width
    return attention + (modulated * config.dim * dim if config.conditioning == "adaln" else 0)


def _feed_forward(config: ModelConfig, shape: BlockShape, dim: int, tokens: int, caption_tokens: int) -> int:
    """Count a block's feed-forward, in a joint block of both streams."""
    of_caption = _dense(shape, dim, caption_tokens) if shape.kind == "joint" else 0
    if not shape.num_experts:
        return of_caption + _dense(shape, dim, tokens)
    chosen = shape.num_experts * int(config.expert_capacity * tokens / shape.num_experts)
    return of_caption + tokens * dim * shape.num_experts + 2 * chosen * dim * shape.ffn_dim


def _dense(shape: BlockShape, dim: int, tokens: int) -> int:
    return (3 if shape.gated else 2) * tokens * dim * shape.ffn_dim
