"""Which tokens are dropped, where, and which ones come out: the one diagram behind every masked diffusion transformer.

    patches -> [dense blocks] -> drop -> [sparse blocks] -> restore -> [dense blocks] -> head -> loss

A method is a row of `METHODS`. Blocks never know about it: the model asks its route before each block.
At inference nothing is dropped (`keep_ids` is None), and every row is the same dense model.

Shape legend: B batch, T tokens, K kept tokens, D dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Method:
    """One row: how many blocks see all tokens before the drop, given the depth of the patch-mixer; None never drops."""

    blocks_before_drop: Callable[[int], int] | None
    description: str


METHODS: dict[str, Method] = {
    "none": Method(None, "every block sees every token (DiT, Peebles & Xie 2023)"),
    "naive": Method(lambda mixer_depth: 0, "drop before the first block (the baseline of 2407.15811)"),
    "deferred": Method(lambda mixer_depth: mixer_depth, "drop after the patch-mixer (MicroDiT, 2407.15811)"),
}


@dataclass(frozen=True)
class Route:
    """One forward pass's way through the diagram."""

    keep_ids_BK: Tensor | None
    drop_before: int | None  # index over all blocks: the mixer's, then the backbone's

    def before(self, block_index: int, x_BTD: Tensor) -> Tensor:
        """The tokens that block `block_index` shall see. Call once, in order, for each block."""
        if self.keep_ids_BK is None or block_index != self.drop_before:
            return x_BTD
        return take_tokens(x_BTD, self.keep_ids_BK)


def make_route(method: str, mixer_depth: int, keep_ids_BK: Tensor | None) -> Route:
    """The route of `method`; with `keep_ids_BK` None (sampling, or mask ratio 0) nothing is dropped."""
    blocks_before_drop = METHODS[method].blocks_before_drop
    if blocks_before_drop is None:
        if keep_ids_BK is not None:
            raise ValueError("routing 'none' drops no tokens: use mask_ratio 0, or routing 'deferred' or 'naive'")
        return Route(None, None)
    return Route(keep_ids_BK, blocks_before_drop(mixer_depth))


def random_keep_ids(
    batch: int, tokens: int, mask_ratio: float, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Draw the kept tokens of each sample: (B, K) indices, K by `kept_tokens`.

    Returns None for a mask ratio of 0. Raises ValueError outside [0, 1).
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must lie in [0, 1), got {mask_ratio}: at 1 no token would be left to learn from")
    if mask_ratio == 0:
        return None
    order = torch.rand(batch, tokens, generator=generator, device=device)
    return order.argsort(dim=1)[:, : kept_tokens(tokens, mask_ratio)]


def kept_tokens(tokens: int, mask_ratio: float) -> int:
    """tokens * (1 - mask_ratio), rounded down, at least 1."""
    return max(1, int(tokens * (1 - mask_ratio) + 1e-6))  # 1e-6: 20 * (1 - 0.9) is 1.9999999999999996


def take_tokens(x_BTD: Tensor, ids_BK: Tensor) -> Tensor:
    """Gather tokens: (B, T, D), (B, K) -> (B, K, D)."""
    return x_BTD.gather(1, ids_BK.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1]))


def put_tokens(x_BKD: Tensor, ids_BK: Tensor, tokens: int) -> Tensor:
    """Scatter kept tokens back among zeros: (B, K, D), (B, K) -> (B, tokens, D). The inverse of `take_tokens`."""
    B, _, D = x_BKD.shape
    zeros = x_BKD.new_zeros(B, tokens, D)
    return zeros.scatter(1, ids_BK.unsqueeze(-1).expand(-1, -1, D), x_BKD)
