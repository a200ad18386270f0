"""Which tokens are dropped, where, and how they come back: the one diagram behind every masked diffusion transformer.

    patches -> [dense blocks] -> drop -> [sparse blocks] -> restore -> [dense blocks] -> head -> loss

A method is a row of `METHODS`; `MicroDiT.forward` is the diagram, and blocks never know of it. Without kept tokens to choose (`keep_ids`
None: sampling, or mask ratio 0) nothing is dropped. The network draws nothing: what is kept comes from outside.

Shape legend: B batch, T tokens, K kept tokens, D dim.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Routing = Literal["none", "naive", "deferred", "maskdit", "tread", "sprint"]
Place = Literal["patches", "mixer", "blocks"]
Pattern = Literal["random", "grid"]

GRID_RATIOS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    drop: in front of which step tokens are dropped: before all blocks ("patches"), behind the patch-mixer ("mixer"), or behind the first
        dense blocks of the backbone ("blocks"); None: never.
    dense_blocks: how many blocks of the backbone see all tokens before the drop, and after the restore.
    restore: what stands in the place of a dropped token behind the sparse blocks: nothing, what it was at the drop ("earlier"),
        a mask token, or a mask token that is then fused with what the token was at the drop ("fused").
    decoder: how many further, smaller blocks see all tokens at the end.
    loss: on the kept patches, on all, or on the kept ones with a reconstruction of the dropped ones.
    path_drop: the share of training samples whose sparse blocks count for nothing: all their tokens come back as mask tokens.
    """

    drop: Place | None
    dense_blocks: tuple[int, int] = (0, 0)
    restore: Literal["nothing", "earlier", "mask", "fused"] = "nothing"
    decoder: int = 0
    loss: Literal["kept", "all", "reconstruction"] = "kept"
    path_drop: float = 0.0


METHODS: dict[Routing, Method] = {
    # every block sees every token (DiT, Peebles & Xie 2023)
    "none": Method(drop=None),
    # the baseline of 2407.15811
    "naive": Method(drop="patches"),
    # MicroDiT, 2407.15811
    "deferred": Method(drop="mixer"),
    # MaskDiT, 2306.09305
    "maskdit": Method(drop="mixer", restore="mask", decoder=8, loss="reconstruction"),
    # TREAD, 2501.04765: dropped tokens leave behind the second block and are back behind the ninth of twelve, for the last three
    "tread": Method(drop="blocks", dense_blocks=(2, 3), restore="earlier", loss="all"),
    # SPRINT, 2510.21986; path_drop is that of the authors' recipes
    "sprint": Method(drop="blocks", dense_blocks=(2, 2), restore="fused", loss="all", path_drop=0.1),
}


@dataclass(frozen=True)
class Route:
    """One forward pass's way through the diagram.

    `keep_ids_BK`: the tokens that the sparse blocks see; with K = 0, only where they are fused, these blocks are left out.
    `path_keep_mask_B`: 0 where the sparse blocks shall count for nothing.
    """

    method: Method
    tokens: int
    keep_ids_BK: Tensor | None
    path_keep_mask_B: Tensor | None

    def drop(self, place: Place, x_BTD: Tensor) -> Tensor:
        """The tokens that go on from `place`: (B, T, D) -> (B, K, D) where this row drops here."""
        if self.keep_ids_BK is None or self.method.drop != place:
            return x_BTD
        return take_tokens(x_BTD, self.keep_ids_BK)

    def put_back(self, x_BKD: Tensor, onto_BTD: Tensor) -> Tensor:
        """All tokens, those that were dropped from `onto_BTD`: (B, K, D), (B, T, D) -> (B, T, D)."""
        return x_BKD if self.keep_ids_BK is None else put_tokens(x_BKD, self.keep_ids_BK, onto_BTD)


def make_route(routing: Routing, tokens: int, keep_ids_BK: Tensor | None, path_keep_mask_B: Tensor | None = None) -> Route:
    """Raises ValueError for what this row cannot do: drop at all, keep no token, or leave out its sparse blocks."""
    method = METHODS[routing]
    if method.drop is None and keep_ids_BK is not None:
        raise ValueError("routing 'none' drops no tokens: use mask_ratio 0, or another routing, such as 'deferred'")
    leaves_out = path_keep_mask_B is not None or (keep_ids_BK is not None and keep_ids_BK.shape[1] == 0)
    if leaves_out and method.restore != "fused":
        raise ValueError(f"only routing 'sprint' can leave out its sparse blocks, not '{routing}': keep at least one token")
    return Route(method, tokens, keep_ids_BK, path_keep_mask_B)


class Restore(nn.Module):
    """What puts tokens back behind the sparse blocks, with the weights that the row needs for it, if any."""

    def __init__(self, routing: Routing, dim: int):
        super().__init__()
        kind = METHODS[routing].restore
        if kind in ("mask", "fused"):
            self.mask_token = nn.Parameter(torch.zeros(dim))
        if kind == "fused":
            self.fuse = nn.Linear(2 * dim, dim)

    def forward(self, x_BKD: Tensor, earlier_BTD: Tensor, route: Route) -> Tensor:
        """(B, K, D) -> (B, T, D), or as it came, where the row puts nothing back. `earlier_BTD`: all tokens, as they were at the drop."""
        kind = route.method.restore
        if kind == "nothing":
            return x_BKD
        if kind == "earlier":
            return route.put_back(x_BKD, earlier_BTD)
        mask_D = self.mask_token.to(x_BKD.dtype)
        mask_BTD = mask_D.expand(len(x_BKD), route.tokens, -1)
        # 0 times: unused where nothing is dropped, and yet in the graph, since DDP waits for the gradient of every weight.
        x_BTD = route.put_back(x_BKD, mask_BTD) + 0 * mask_D
        if kind == "mask":
            return x_BTD
        if route.path_keep_mask_B is not None:
            x_BTD = torch.where(route.path_keep_mask_B.view(-1, 1, 1) > 0, x_BTD, mask_BTD)
        return self.fuse(torch.cat([x_BTD, earlier_BTD], dim=-1))

    def init_weights(self) -> None:
        """The mask token; `fuse` begins like any other linear layer."""
        if hasattr(self, "mask_token"):
            nn.init.normal_(self.mask_token, std=0.02)


def choose_kept(scores_BT: Tensor, mask_ratio: float, pattern: Pattern = "random", columns: int | None = None) -> Tensor | None:
    """The kept tokens of each sample, (B, K), K by `kept_tokens`: those of the lowest scores, which are uniform draws.

    With pattern "grid", as many out of each 2 x 2 cell of patches, which lie in `columns` columns; 0.75 keeps one of each four.
    Returns None for a mask ratio of 0. Raises ValueError for a ratio outside [0, 1), or that the pattern cannot have.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must lie in [0, 1), got {mask_ratio}: at 1 no token would be left to learn from")
    if mask_ratio == 0:
        return None
    if pattern == "random":
        return scores_BT.argsort(dim=1)[:, : kept_tokens(scores_BT.shape[1], mask_ratio)]
    if mask_ratio not in GRID_RATIOS:
        raise ValueError(f"mask_pattern grid keeps whole tokens of each 2 x 2: mask_ratio must be one of {GRID_RATIOS}, got {mask_ratio}")
    cells_N4 = _cells(scores_BT.shape[1], columns or 0).to(scores_BT.device)
    order_BNk = scores_BT[:, cells_N4].argsort(dim=2)[:, :, : kept_tokens(4, mask_ratio)]
    return cells_N4.expand(len(scores_BT), -1, -1).gather(2, order_BNk).flatten(1)


def kept_tokens(tokens: int, mask_ratio: float) -> int:
    """tokens * (1 - mask_ratio), rounded down, at least 1."""
    return max(1, int(tokens * (1 - mask_ratio) + 1e-6))  # 1e-6: 20 * (1 - 0.9) is 1.9999999999999996


def take_tokens(x_BTD: Tensor, ids_BK: Tensor) -> Tensor:
    """Gather tokens: (B, T, D), (B, K) -> (B, K, D)."""
    return x_BTD.gather(1, ids_BK.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1]))


def put_tokens(x_BKD: Tensor, ids_BK: Tensor, onto_BTD: Tensor) -> Tensor:
    """`onto_BTD` with the tokens `x_BKD` in the places `ids_BK`: (B, T, D). The inverse of `take_tokens`."""
    return onto_BTD.scatter(1, ids_BK.unsqueeze(-1).expand(-1, -1, x_BKD.shape[-1]), x_BKD)


def _cells(tokens: int, columns: int) -> Tensor:
    """The numbers of the four patches of each 2 x 2 cell, (T/4, 4)."""
    rows = tokens // columns if columns else 0
    if rows % 2 or columns % 2 or rows * columns != tokens:
        raise ValueError(f"mask_pattern grid needs an even number of patches on both sides, got {tokens} patches in {columns} columns")
    return torch.arange(tokens).view(rows // 2, 2, columns // 2, 2).transpose(1, 2).reshape(-1, 4)
