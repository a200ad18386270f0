"""MicroDiT: a diffusion transformer whose backbone trains on a quarter of the patches (2407.15811).

Notable:
- deferred masking: a light patch-mixer sees all patches before most are dropped, so the kept ones carry information on the rest;
- layer-wise width scaling: later blocks are wider;
- expert-choice mixture of experts in every second block, never in the last;
- the caption enters twice: its tokens by cross-attention, its mean by adaLN;
- `routing.py` has six ways to drop tokens and bring them back;
- the output is patches, not images: `patches.unpatchify` puts them together when none is missing.

Shape legend: B batch, C channels, H W height and width, T tokens, K kept tokens, P values in a patch, L caption tokens, D dim.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from microdit.models.blocks import Block, BlockShape, Head, KeysValues, layer_norm
from microdit.models.caption import Caption, CaptionEmbedder
from microdit.models.patches import patchify, positions_on
from microdit.models.routing import METHODS, Restore, Routing, make_route

TIME_FREQUENCIES = 512


@dataclass(frozen=True)
class ModelConfig:
    """The architecture in full: one `BlockShape` for each block. `config.resolve` makes it from a `Size`.

    Raises ValueError if the dense blocks or the decoder contradict the routing.

    >>> from microdit.models.config import Size, resolve
    >>> config = resolve(Size(dim=64, depth=4, head_dim=16, mixer_dim=32, mixer_depth=1, num_experts=0), caption_channels=384)
    >>> len(config.blocks), config.in_channels
    (4, 4)
    """

    dim: int
    head_dim: int
    blocks: tuple[BlockShape, ...]
    mixer_dim: int
    mixer: tuple[BlockShape, ...]
    caption_ffn_dim: int
    decoder: tuple[BlockShape, ...] = ()  # as wide as the mixer
    routing: Routing = "deferred"
    dense_blocks: tuple[int, int] = (0, 0)  # how many of `blocks` see all tokens, before the drop and after the restore
    in_channels: int = 4
    patch_size: int = 2
    caption_channels: int = 1024
    expert_capacity: float = 2.0
    bias: bool = False
    position_scale: float = 1.0

    def __post_init__(self) -> None:
        method = METHODS[self.routing]
        if (any(self.dense_blocks) and method.drop != "blocks") or bool(self.decoder) != bool(method.decoder):
            raise ValueError(f"dense blocks {self.dense_blocks} and a decoder of {len(self.decoder)} do not fit routing '{self.routing}'")
        if method.drop == "blocks" and sum(self.dense_blocks) >= len(self.blocks):
            raise ValueError(f"{len(self.blocks)} blocks leave none to be sparse with {self.dense_blocks} dense ones before and after")

    @property
    def patch_values(self) -> int:
        return self.patch_size**2 * self.in_channels

    @property
    def last_dim(self) -> int:
        """The width of the tokens that the head sees."""
        return self.mixer_dim if self.decoder else self.dim

    def last_tokens(self, tokens: int, kept: int) -> int:
        """Return how many tokens the head sees if `kept` pass the drop."""
        return kept if METHODS[self.routing].restore == "nothing" else tokens

    def tokens_by_block(self, tokens: int, kept: int) -> list[tuple[BlockShape, int, int]]:
        """List the blocks that run, in order: shape, width, and the number of tokens that each sees if `kept` pass the drop."""
        first, last = self.dense_blocks
        method = METHODS[self.routing]
        in_mixer = kept if method.drop == "patches" else tokens
        sparse = self.blocks[first : len(self.blocks) - last]
        return [
            *((shape, self.mixer_dim, in_mixer) for shape in self.mixer),
            *((shape, self.dim, tokens) for shape in self.blocks[:first]),
            *((shape, self.dim, kept) for shape in sparse if kept),
            *((shape, self.dim, tokens) for shape in self.blocks[len(self.blocks) - last :]),
            *((shape, self.mixer_dim, tokens) for shape in self.decoder),
        ]

    def recomputed(self, share: float) -> int:
        """Return how many blocks `share` of them is, rounded up."""
        return math.ceil(share * (len(self.mixer) + len(self.blocks) + len(self.decoder)))


class MicroDiT(nn.Module):
    """The denoising network F of `Objective.preconditioning`: noisy latents, noise level and caption in, patches out.

    >>> import torch
    >>> from microdit import create_model
    >>> model = create_model("MicroDiT_Nano_2", in_channels=8, caption_channels=384)
    >>> caption = model.embed_caption(torch.randn(2, 12, 384))
    >>> model(torch.randn(2, 8, 8, 8), torch.zeros(2), caption).shape  # 16 patches of 2 x 2 x 8 values
    torch.Size([2, 16, 32])
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.recomputed: frozenset[nn.Module] = frozenset()  # blocks under activation checkpointing
        dim, mixer_dim = config.dim, config.mixer_dim
        self.patch_embed = nn.Linear(config.patch_values, dim)
        self.time_embed = nn.Sequential(nn.Linear(TIME_FREQUENCIES, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.caption = CaptionEmbedder(config.caption_channels, dim, config.head_dim, config.caption_ffn_dim, config.bias)

        def blocks(shapes: tuple[BlockShape, ...], width: int) -> nn.ModuleList:
            return nn.ModuleList(Block(shape, width, dim, config.head_dim, config.bias, config.expert_capacity) for shape in shapes)

        self.mixer = blocks(config.mixer, mixer_dim)
        if config.mixer and mixer_dim != dim:
            self.mixer_in: nn.Module = _norm_linear(dim, mixer_dim, config.bias)
            self.mixer_caption: nn.Module = _norm_linear(dim, mixer_dim, config.bias)
            self.mixer_out: nn.Module = _norm_linear(mixer_dim, dim, config.bias)
        else:
            self.mixer_in = self.mixer_caption = self.mixer_out = nn.Identity()
        self.blocks = blocks(config.blocks, dim)
        self.decoder = blocks(config.decoder, mixer_dim)
        if config.decoder and mixer_dim != dim:
            self.decoder_in: nn.Module = _norm_linear(dim, mixer_dim, config.bias)
            self.decoder_caption: nn.Module = _norm_linear(dim, mixer_dim, config.bias)
        else:
            self.decoder_in = self.decoder_caption = nn.Identity()
        self.restore = Restore(config.routing, config.last_dim)
        self.head = Head(config.last_dim, dim, config.patch_values)
        if not self.patch_embed.weight.is_meta:  # which holds no numbers to draw, and pretends to for a third of a second
            self.init_weights()

    @property
    def all_blocks(self) -> list[Block]:
        """All blocks in the order of the forward pass."""
        return cast(list[Block], [*self.mixer, *self.blocks, *self.decoder])

    def forward(
        self,
        latents_BCHW: Tensor,
        c_noise_B: Tensor,
        caption: Caption,
        keep_ids_BK: Tensor | None = None,
        path_keep_mask_B: Tensor | None = None,
    ) -> Tensor:
        """Return F on all patches, (B, T, P), or on the kept ones, (B, K, P), in the order of `keep_ids_BK`.

        Only the routings naive and deferred return the kept ones alone; the others restore all tokens before the head. Without
        `keep_ids_BK` nothing is dropped. `c_noise_B` is the objective's (see `Objective.preconditioning`).

        With routing sprint, `path_keep_mask_B` is 0 for samples whose sparse blocks are replaced by mask tokens, and with K = 0 the sparse
        blocks are not run at all.
        """
        dtype = self.patch_embed.weight.dtype  # latents and noise levels are float32, whatever dtype the weights have
        patches_BTP = patchify(latents_BCHW, self.config.patch_size).to(dtype)
        x_BTD = self.patch_embed(patches_BTP) + self._positions(latents_BCHW, self.config.dim, dtype)
        condition_BD = F.gelu(self._embed_noise(c_noise_B) + caption.pooled_BD, approximate="tanh")

        def run(blocks: Iterable[nn.Module], x_BTD: Tensor, narrow: nn.Module | None = None) -> Tensor:
            tokens_BLD = narrow(caption.tokens_BLD) if narrow is not None and not caption.kv_cache else caption.tokens_BLD
            for block in blocks:
                x_BTD = self._run(block, x_BTD, caption.kv_cache.get(block, tokens_BLD), caption.mask_BL, condition_BD)
            return x_BTD

        route = make_route(self.config.routing, patches_BTP.shape[1], keep_ids_BK, path_keep_mask_B)
        first, last = self.config.dense_blocks
        blocks = list(self.blocks)
        dense, sparse, dense_again = blocks[:first], blocks[first : len(blocks) - last], blocks[len(blocks) - last :]

        x_BTD = self.mixer_in(route.drop("patches", x_BTD))
        x_BTD = run(self.mixer, x_BTD, self.mixer_caption)
        x_BTD = self.mixer_out(route.drop("mixer", x_BTD))  # dropped tokens are not projected
        earlier_BTD = run(dense, x_BTD)
        x_BKD = route.drop("blocks", earlier_BTD)
        if x_BKD.shape[1]:
            x_BKD = run(sparse, x_BKD)
        x_BTD = self.restore(self.decoder_in(x_BKD), earlier_BTD, route)
        x_BTD = run(dense_again, x_BTD)
        if self.decoder:
            x_BTD = x_BTD + self._positions(latents_BCHW, self.config.mixer_dim, dtype)  # which mask tokens lack
            x_BTD = run(self.decoder, x_BTD, self.decoder_caption)
        return self.head(x_BTD, condition_BD)

    def embed_caption(self, text_BLE: Tensor, text_mask_BL: Tensor | None = None) -> Caption:
        """Embed text vectors (B, L, caption_channels). The mask is True at real tokens; without one, all tokens are real."""
        return self.caption(text_BLE, text_mask_BL)

    def precompute_kv(self, caption: Caption) -> Caption:
        """Return `caption` with every block's cross-attention keys and values, which sampling would otherwise recompute at each step."""
        tokens_BLD = caption.tokens_BLD
        stacks = ((self.mixer, self.mixer_caption(tokens_BLD)), (self.blocks, tokens_BLD), (self.decoder, self.decoder_caption(tokens_BLD)))
        kv_cache = {block: cast(Block, block).cross_attn.keys_values(y_BLD) for blocks, y_BLD in stacks for block in blocks}
        return caption._replace(kv_cache=kv_cache)

    def init_weights(self) -> None:
        """Draw depth-scaled truncated normals in the blocks; zero adaLN, the head and the outputs of the caption's block.

        Biases are zero except the patch embedding's, which the released code leaves at PyTorch's default for a convolution.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.time_embed:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        self.caption.init_weights()
        backbone = cast(list[Block], self.blocks)
        for index, block in enumerate(backbone):
            block.init_weights(0.02 / math.sqrt(2 * (index + 1)))
        for block in cast(list[Block], [*self.mixer, *self.decoder]):
            block.init_weights(0.02 / math.sqrt(2 * len(backbone)))
        self.restore.init_weights()
        self.head.init_weights()
        bound = self.config.patch_values**-0.5
        nn.init.uniform_(self.patch_embed.bias, -bound, bound)

    def recompute_first(self, share: float) -> None:
        """Checkpoint the activations of the first `share` of the blocks: the later ones are freed by the time these are recomputed."""
        self.recomputed = frozenset(self.all_blocks[: self.config.recomputed(share)])

    @torch.no_grad()
    def scale_init(self, factor: float) -> None:
        """Multiply the initial matrices of the blocks and the caption embedder by `factor`.

        The paper's standard deviation, about 0.02 at any width, suits its own widths: a narrow layer hardly passes its input on.
        """
        for part in (self.caption, *self.all_blocks):
            for weight in part.parameters():
                if weight.dim() >= 2:
                    weight.mul_(factor)

    def _run(self, block: nn.Module, *inputs: Tensor | KeysValues | None) -> Tensor:
        if block in self.recomputed and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # blocks use no random numbers
        return block(*inputs)

    def _positions(self, latents_BCHW: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        rows, columns = (side // self.config.patch_size for side in latents_BCHW.shape[-2:])
        return positions_on(latents_BCHW.device, dtype, rows, columns, dim, self.config.position_scale)

    def _embed_noise(self, c_noise_B: Tensor) -> Tensor:
        """Embed the noise level: [cos | sin] at geometric frequencies from 1 to 1/10000, then an MLP; (B,) -> (B, D)."""
        exponent = torch.arange(TIME_FREQUENCIES // 2, dtype=torch.float32, device=c_noise_B.device)
        frequencies = torch.exp(-math.log(10000) * exponent / (TIME_FREQUENCIES // 2))
        angle = c_noise_B.float()[:, None] * frequencies
        return self.time_embed(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.patch_embed.weight.dtype))


def _norm_linear(in_dim: int, out_dim: int, bias: bool) -> nn.Sequential:
    return nn.Sequential(layer_norm(in_dim), nn.Linear(in_dim, out_dim, bias=bias))
