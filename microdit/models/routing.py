"""Token routing: which tokens are dropped, where, and how they come back, in one diagram for every masked diffusion transformer.

    patches -> [dense blocks] -> drop -> [sparse blocks] -> restore -> [dense blocks] -> head -> loss

Each method is a row of `METHODS`. `MicroDiT.forward` follows the diagram, of which the blocks know nothing. Without `keep_ids` (in
sampling, or at mask ratio 0) nothing is dropped. The network itself is deterministic: the caller chooses the kept tokens.

Shape legend: B batch, T tokens, K kept tokens, D dim.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from microdit.models.positions import Rotary
from microdit.ranges import OneOf

Place = Literal["patches", "mixer", "blocks"]
Pattern = Literal["random", "grid"]

GRID_RATIOS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    drop: where tokens are dropped: before all blocks ("patches"), after the patch-mixer ("mixer"), or after the first dense blocks of the
        backbone ("blocks"); None: nowhere.
    dense_blocks: how many blocks of the backbone see all tokens, before the drop and after the restore.
    restore: what takes the place of a dropped token after the sparse blocks: nothing, its own value at the drop ("earlier"), a mask token
        ("mask"), or a mask token that is then fused with the token's value at the drop ("fused").
    decoder: the number of additional, smaller blocks at the end, which see all tokens.
    loss: over the kept patches, over all, or over the kept ones with a reconstruction of the dropped ones.
    path_drop: the share of training samples whose sparse blocks are skipped: all their tokens come back as mask tokens.
    """

    drop: Place | None
    dense_blocks: tuple[int, int] = (0, 0)
    restore: Literal["nothing", "earlier", "mask", "fused"] = "nothing"
    decoder: int = 0
    loss: Literal["kept", "all", "reconstruction"] = "kept"
    path_drop: float = 0.0


METHODS: dict[str, Method] = {
    # every block sees every token (DiT, Peebles & Xie 2023)
    "none": Method(drop=None),
    # the baseline of 2407.15811
    "naive": Method(drop="patches"),
    # MicroDiT, 2407.15811
    "deferred": Method(drop="mixer"),
    # MaskDiT, 2306.09305
    "maskdit": Method(drop="mixer", restore="mask", decoder=8, loss="reconstruction"),
    # TREAD, 2501.04765: of twelve blocks, dropped tokens skip the third to the ninth
    "tread": Method(drop="blocks", dense_blocks=(2, 3), restore="earlier", loss="all"),
    # SPRINT, 2510.21986; path_drop as in the authors' recipes
    "sprint": Method(drop="blocks", dense_blocks=(2, 2), restore="fused", loss="all", path_drop=0.1),
}
Routing = Annotated[str, OneOf(METHODS)]  # rows that were added before a recipe is read count too (docs/extending.md)


@dataclass(frozen=True)
class Route:
    """The routing of one forward pass.

    `keep_ids_BK` are the tokens that the sparse blocks see. K = 0, allowed only with restore "fused", skips these blocks altogether.
    `path_keep_mask_B` is 0 for samples whose tokens all come back as mask tokens.
    """

    method: Method
    tokens: int
    keep_ids_BK: Tensor | None
    path_keep_mask_B: Tensor | None

    def drop(self, place: Place, x_BTD: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Rotary | None]:
        """Drop tokens if the method does so at `place`, (B, T, D) -> (B, K, D), and their rotary positions; else return them all."""
        if self.keep_ids_BK is None or self.method.drop != place:
            return x_BTD, rotary
        return take_tokens(x_BTD, self.keep_ids_BK), None if rotary is None else rotary.take(self.keep_ids_BK)

    def keep_path(self, text_BLD: Tensor, earlier_BLD: Tensor) -> Tensor:
        """Return the caption's tokens behind the sparse blocks, or those in front of them for samples whose blocks are left out."""
        if self.path_keep_mask_B is None:
            return text_BLD
        return torch.where(self.path_keep_mask_B.view(-1, 1, 1) > 0, text_BLD, earlier_BLD)

    def put_back(self, x_BKD: Tensor, onto_BTD: Tensor) -> Tensor:
        """Put the kept tokens in their places in `onto_BTD`: (B, K, D), (B, T, D) -> (B, T, D)."""
        return x_BKD if self.keep_ids_BK is None else put_tokens(x_BKD, self.keep_ids_BK, onto_BTD)


def make_route(routing: Routing, tokens: int, keep_ids_BK: Tensor | None, path_keep_mask_B: Tensor | None = None) -> Route:
    """Return the route of one forward pass. Raises ValueError if the method cannot drop tokens, or cannot skip its sparse blocks."""
    method = METHODS[routing]
    if method.drop is None and keep_ids_BK is not None:
        raise ValueError("routing 'none' drops no tokens: use mask_ratio 0, or another routing, such as 'deferred'")
    leaves_out = path_keep_mask_B is not None or (keep_ids_BK is not None and keep_ids_BK.shape[1] == 0)
    if leaves_out and method.restore != "fused":
        raise ValueError(f"only routing 'sprint' can leave out its sparse blocks, not '{routing}': keep at least one token")
    return Route(method, tokens, keep_ids_BK, path_keep_mask_B)


class Restore(nn.Module):
    """Puts dropped tokens back after the sparse blocks. Holds the mask token and the fusion layer of methods that have them."""

    def __init__(self, routing: Routing, dim: int):
        super().__init__()
        kind = METHODS[routing].restore
        if kind in ("mask", "fused"):
            self.mask_token = nn.Parameter(torch.zeros(dim))
        if kind == "fused":
            self.fuse = nn.Linear(2 * dim, dim)

    def forward(self, x_BKD: Tensor, earlier_BTD: Tensor, route: Route) -> Tensor:
        """Map (B, K, D) -> (B, T, D), or return the input if the method restores nothing. `earlier_BTD` holds all tokens at the drop."""
        kind = route.method.restore
        if kind == "nothing":
            return x_BKD
        if kind == "earlier":
            return route.put_back(x_BKD, earlier_BTD)
        mask_D = self.mask_token.to(x_BKD.dtype)
        mask_BTD = mask_D.expand(len(x_BKD), route.tokens, -1)
        # The zero term keeps the mask token in the graph where nothing is dropped: DDP waits for the gradient of every weight.
        x_BTD = route.put_back(x_BKD, mask_BTD) + 0 * mask_D
        if kind == "mask":
            return x_BTD
        if route.path_keep_mask_B is not None:
            x_BTD = torch.where(route.path_keep_mask_B.view(-1, 1, 1) > 0, x_BTD, mask_BTD)
        return self.fuse(torch.cat([x_BTD, earlier_BTD], dim=-1))

    def init_weights(self) -> None:
        """Draw the mask token. `fuse` is initialised like any other linear layer."""
        if hasattr(self, "mask_token"):
            nn.init.normal_(self.mask_token, std=0.02)


def choose_kept(scores_BT: Tensor, mask_ratio: float, pattern: Pattern = "random", columns: int | None = None) -> Tensor | None:
    """Return the kept tokens of each sample, (B, K): the K = `kept_tokens(T, mask_ratio)` with the lowest scores, which are random.

    Pattern "grid" keeps equally many in each 2 x 2 cell of patches, which lie in `columns` columns; at ratio 0.75, one of each four.
    Returns None at mask ratio 0. Raises ValueError for a ratio outside [0, 1) or one that the pattern does not have.
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
    """Return tokens * (1 - mask_ratio), rounded down, but at least 1."""
    return max(1, int(tokens * (1 - mask_ratio) + 1e-6))  # 1e-6: 20 * (1 - 0.9) is 1.9999999999999996


def take_tokens(x_BTD: Tensor, ids_BK: Tensor) -> Tensor:
    """Gather tokens: (B, T, D), (B, K) -> (B, K, D)."""
    return x_BTD.gather(1, ids_BK.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1]))


def put_tokens(x_BKD: Tensor, ids_BK: Tensor, onto_BTD: Tensor) -> Tensor:
    """Return `onto_BTD` with the tokens `x_BKD` in the places `ids_BK`, (B, T, D): the inverse of `take_tokens`."""
    return onto_BTD.scatter(1, ids_BK.unsqueeze(-1).expand(-1, -1, x_BKD.shape[-1]), x_BKD)


def _cells(tokens: int, columns: int) -> Tensor:
    """Return the indices of the four patches of each 2 x 2 cell, (T/4, 4)."""
    rows = tokens // columns if columns else 0
    if rows % 2 or columns % 2 or rows * columns != tokens:
        raise ValueError(f"mask_pattern grid needs an even number of patches on both sides, got {tokens} patches in {columns} columns")
    return torch.arange(tokens).view(rows // 2, 2, columns // 2, 2).transpose(1, 2).reshape(-1, 4)
