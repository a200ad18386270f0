"""FLOPs of one sample by a closed formula: two for each multiply-add of a matrix product, attention's products included.

Exactly what PyTorch's FlopCounterMode counts (tests/model/test_flops.py), without running anything. Norms, activations, softmax and the
optimizer are not counted, as is usual.
"""

from microdit.model.blocks import BlockShape
from microdit.model.microdit import TIME_FREQUENCIES, ModelConfig
from microdit.model.routing import METHODS


def forward_flops(config: ModelConfig, tokens: int, kept: int, caption_tokens: int, routing: str = "deferred") -> int:
    """Of a forward pass on `tokens` patches, of which `kept` go on after the drop (all, where nothing is dropped)."""
    return 2 * (
        _without_input_gradient(config, tokens, caption_tokens) + _with_input_gradient(config, tokens, kept, caption_tokens, routing)
    )


def training_flops(config: ModelConfig, tokens: int, kept: int, caption_tokens: int, routing: str = "deferred") -> int:
    """Of a forward and a backward pass. Backward, a product costs twice as much; half of that where its input needs no gradient."""
    outer = _without_input_gradient(config, tokens, caption_tokens)
    inner = _with_input_gradient(config, tokens, kept, caption_tokens, routing)
    return 2 * (2 * outer + 3 * inner)


def _without_input_gradient(config: ModelConfig, tokens: int, caption_tokens: int) -> int:
    """Multiply-adds of the first products on patches, noise level and caption."""
    return config.dim * (tokens * config.patch_values + TIME_FREQUENCIES + caption_tokens * config.caption_channels)


def _with_input_gradient(config: ModelConfig, tokens: int, kept: int, caption_tokens: int, routing: str) -> int:
    """Multiply-adds of all other products, in the order of `MicroDiT.forward`."""
    dim, mixer_dim = config.dim, config.mixer_dim
    total = dim * dim + _caption(config, caption_tokens)

    before_drop = METHODS[routing].blocks_before_drop
    first_sparse = len(config.mixer) if before_drop is None else before_drop(len(config.mixer))
    in_mixer = tokens if first_sparse else kept
    for shape in config.mixer:
        total += _block(config, shape, mixer_dim, in_mixer, caption_tokens)
    if config.mixer and mixer_dim != dim:
        total += (tokens + caption_tokens + kept) * dim * mixer_dim

    for shape in config.blocks:
        total += _block(config, shape, dim, kept, caption_tokens)
    return total + 2 * dim * dim + kept * dim * config.patch_values


def _caption(config: ModelConfig, tokens: int) -> int:
    dim = config.dim
    attention = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
    return tokens * dim * dim + attention + 3 * tokens * dim * config.caption_ffn_dim + 2 * dim * dim


def _block(config: ModelConfig, shape: BlockShape, dim: int, tokens: int, caption_tokens: int) -> int:
    modulation = 6 * config.dim * dim
    attention = 4 * tokens * dim * shape.attention_dim + 2 * tokens * tokens * shape.attention_dim
    cross = 2 * (tokens + caption_tokens) * dim * dim + 2 * tokens * caption_tokens * dim
    if not shape.num_experts:
        return modulation + attention + cross + 3 * tokens * dim * shape.ffn_dim
    chosen = shape.num_experts * int(config.expert_capacity * tokens / shape.num_experts)
    return modulation + attention + cross + tokens * dim * shape.num_experts + 2 * chosen * dim * shape.ffn_dim
