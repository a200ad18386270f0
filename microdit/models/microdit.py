"""MicroDiT: a diffusion transformer whose backbone trains on a quarter of the patches (2407.15811).

Notable:
- deferred masking: a light patch-mixer sees all patches before most are dropped, so the kept ones carry information on the rest;
- layer-wise width scaling: later blocks are wider;
- expert-choice mixture of experts in every second block, never in the last;
- the caption enters twice: its tokens by cross-attention, its mean by adaLN;
- or as in later networks (MM-DiT, 2403.03206; MiniT2I): joint attention over both, rotary positions, RMS norms, no adaLN;
- `routing.py` has six ways to drop tokens and bring them back;
- the output is patches, not images: `patches.unpatchify` puts them together when none is missing.

Shape legend: B batch, C channels, H W height and width, T tokens, K kept tokens, P values in a patch, L caption tokens, D dim.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from microdit.models.blocks import (
    Block,
    BlockShape,
    BlockStyle,
    Conditioning,
    Head,
    JointBlock,
    Norm,
    QKNorm,
    TextBlock,
    make_block,
    make_norm,
)
from microdit.models.caption import Caption, CaptionEmbedder, CaptionEmbedding
from microdit.models.patches import patchify
from microdit.models.positions import Rotary, positions_on, rotary_of_image, rotary_of_text
from microdit.models.routing import METHODS, Restore, Routing, make_route

TIME_FREQUENCIES = 512

Positions = Literal["sincos", "rotary", "both"]


@dataclass(frozen=True)
class ModelConfig:
    """The architecture in full: one `BlockShape` for each block. `config.resolve` makes it from a `Size`, which describes the settings.

    Raises ValueError if the dense blocks or the decoder contradict the routing, or if the kinds of blocks do not go together.

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
    conditioning: Conditioning = "adaln"
    positions: Positions = "sincos"
    norm: Norm = "layer"
    qk_norm: QKNorm = "all_heads"
    attention_bias: bool = False
    patch_channels: int | None = None
    caption_embedding: CaptionEmbedding = "block"
    caption_length: int | None = None
    preamble: tuple[BlockShape, ...] = ()  # blocks of the caption alone, in front of all others

    def __post_init__(self) -> None:
        method = METHODS[self.routing]
        kinds = {shape.kind == "cross" for shape in (*self.mixer, *self.blocks, *self.decoder)}
        if len(kinds) > 1 or any(shape.kind != "text" for shape in self.preamble):
            raise ValueError("blocks must be all of kind cross, or all joint, and those of the preamble of kind text")
        if (any(self.dense_blocks) and method.drop != "blocks") or bool(self.decoder) != bool(method.decoder):
            raise ValueError(f"dense blocks {self.dense_blocks} and a decoder of {len(self.decoder)} do not fit routing '{self.routing}'")
        if method.drop == "blocks" and sum(self.dense_blocks) >= len(self.blocks):
            raise ValueError(f"{len(self.blocks)} blocks leave none to be sparse with {self.dense_blocks} dense ones before and after")

    @property
    def joint(self) -> bool:
        """True if caption and image tokens meet in joint attention."""
        return self.blocks[0].kind != "cross"

    @property
    def style(self) -> BlockStyle:
        """The settings that all blocks share."""
        return BlockStyle(
            self.head_dim,
            self.dim,
            self.conditioning,
            self.norm,
            self.qk_norm,
            self.bias,
            self.attention_bias,
            self.expert_capacity,
        )

    @property
    def patch_values(self) -> int:
        return self.patch_size**2 * self.in_channels

    @property
    def last_dim(self) -> int:
        """The width of the tokens that the head sees."""
        return self.mixer_dim if self.decoder else self.dim

    @property
    def modulated_widths(self) -> list[int]:
        """The widths of blocks that share a modulation, one for each width."""
        if self.conditioning != "shared":
            return []
        return sorted({self.dim, self.mixer_dim} if self.mixer or self.decoder else {self.dim})

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

    def is_sparse(self, block: int) -> bool:
        """Return whether number `block` of `blocks`, from 0, sees the kept tokens only."""
        first, last = self.dense_blocks
        return first <= block < len(self.blocks) - last

    @property
    def reads_no_text_at_last(self) -> bool:
        """True if the last block updates the caption's tokens, though nothing reads them, as in MiniT2I."""
        return (self.decoder or self.blocks)[-1].kind == "joint"

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
        dim, mixer_dim, style = config.dim, config.mixer_dim, config.style
        channels = config.patch_channels or config.patch_values
        self.patch_embed = nn.Linear(channels, dim)
        self.patch_bottleneck = nn.Linear(config.patch_values, channels, bias=False) if config.patch_channels else nn.Identity()
        if config.conditioning != "none":
            self.time_embed = nn.Sequential(nn.Linear(TIME_FREQUENCIES, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.caption = CaptionEmbedder(
            config.caption_channels, dim, config.caption_ffn_dim, style, config.caption_embedding, config.caption_length
        )

        def blocks(shapes: tuple[BlockShape, ...], width: int) -> nn.ModuleList:
            return nn.ModuleList(make_block(shape, width, style) for shape in shapes)

        def between(exists: bool, in_dim: int, out_dim: int) -> nn.Module:
            """Make the way from one stack of blocks to another."""
            if not exists or in_dim == out_dim:
                return nn.Identity()
            return nn.Sequential(make_norm(in_dim, config.norm), nn.Linear(in_dim, out_dim, bias=config.bias))

        self.preamble = blocks(config.preamble, dim)
        self.mixer = blocks(config.mixer, mixer_dim)
        self.mixer_in = between(bool(config.mixer), dim, mixer_dim)
        self.mixer_caption = between(bool(config.mixer), dim, mixer_dim)
        self.mixer_out = between(bool(config.mixer), mixer_dim, dim)
        self.mixer_caption_out = between(bool(config.mixer) and config.joint, mixer_dim, dim)
        self.blocks = blocks(config.blocks, dim)
        self.decoder = blocks(config.decoder, mixer_dim)
        self.decoder_in = between(bool(config.decoder), dim, mixer_dim)
        self.decoder_caption = between(bool(config.decoder), dim, mixer_dim)
        if config.conditioning == "shared":  # a joint block's drives both of its streams
            parts = 12 if config.joint else 6
            self.modulations = nn.ModuleDict({str(width): nn.Linear(dim, parts * width) for width in config.modulated_widths})
        self.restore = Restore(config.routing, config.last_dim)
        self.head = Head(config.last_dim, style, config.patch_values)
        if not self.patch_embed.weight.is_meta:  # which holds no numbers to draw, and pretends to for a third of a second
            self.init_weights()

    @property
    def all_blocks(self) -> list[Block | JointBlock]:
        """All blocks on image tokens, in the order of the forward pass."""
        return cast(list[Block | JointBlock], [*self.mixer, *self.blocks, *self.decoder])

    @property
    def inner_parts(self) -> list[nn.Module]:
        """The caption embedder and all blocks: what is sharded, scaled and optimised part by part."""
        return [self.caption, *self.preamble, *self.all_blocks]

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
        config, dtype = self.config, self.patch_embed.weight.dtype  # latents and noise levels are float32, whatever dtype the weights have
        patches_BTP = patchify(latents_BCHW, config.patch_size).to(dtype)
        x_BTD = self.patch_embed(self.patch_bottleneck(patches_BTP)).to(dtype)
        if config.positions != "rotary":
            x_BTD = x_BTD + self._positions(latents_BCHW, config.dim, dtype)
        all_rotary, text_rotary = self._rotary(latents_BCHW), self._text_rotary(caption.tokens_BLD.shape[1])
        condition_BD = self._condition(c_noise_B, caption)
        shared = {width: self.modulations[str(width)](condition_BD) for width in config.modulated_widths}

        def run(
            blocks: Iterable[nn.Module], x_BTD: Tensor, text_BLD: Tensor, rotary: Rotary | None, width: int = config.dim
        ) -> tuple[Tensor, Tensor]:
            """Return image and caption tokens behind the blocks. Cross-attention leaves the caption's as they are."""
            modulation = shared.get(width, condition_BD)
            for block in blocks:
                if config.joint:
                    x_BTD, text_BLD = self._run(block, x_BTD, text_BLD, caption.mask_BL, modulation, rotary, text_rotary)
                else:
                    x_BTD = self._run(block, x_BTD, caption.kv_cache.get(block, text_BLD), caption.mask_BL, modulation, rotary)
            return x_BTD, text_BLD

        route = make_route(config.routing, patches_BTP.shape[1], keep_ids_BK, path_keep_mask_B)
        first, last = config.dense_blocks
        blocks = list(self.blocks)
        dense, sparse, dense_again = blocks[:first], blocks[first : len(blocks) - last], blocks[len(blocks) - last :]

        text_BLD = caption.tokens_BLD.to(dtype) if config.joint else caption.tokens_BLD
        x_BTD, rotary = route.drop("patches", x_BTD, all_rotary)
        mixer_text_BLM = text_BLD if caption.kv_cache else self.mixer_caption(text_BLD)
        x_BTD, mixer_text_BLM = run(self.mixer, self.mixer_in(x_BTD), mixer_text_BLM, rotary, config.mixer_dim)
        x_BTD, rotary = route.drop("mixer", x_BTD, rotary)
        x_BTD = self.mixer_out(x_BTD)  # dropped tokens are not projected
        text_BLD = self.mixer_caption_out(mixer_text_BLM) if config.joint else text_BLD
        earlier_BTD, earlier_BLD = run(dense, x_BTD, text_BLD, rotary)
        x_BKD, rotary = route.drop("blocks", earlier_BTD, rotary)
        text_BLD = earlier_BLD
        if x_BKD.shape[1]:
            x_BKD, text_BLD = run(sparse, x_BKD, text_BLD, rotary)
        text_BLD = route.keep_path(text_BLD, earlier_BLD) if config.joint else text_BLD
        x_BTD = self.restore(self.decoder_in(x_BKD), earlier_BTD, route)
        x_BTD, text_BLD = run(dense_again, x_BTD, text_BLD, all_rotary)
        if self.decoder:
            if config.positions != "rotary":
                x_BTD = x_BTD + self._positions(latents_BCHW, config.mixer_dim, dtype)  # which mask tokens lack
            text_BLD = text_BLD if caption.kv_cache else self.decoder_caption(text_BLD)
            x_BTD, text_BLD = run(self.decoder, x_BTD, text_BLD, all_rotary, config.mixer_dim)
        if config.reads_no_text_at_last:  # zero, which keeps all weights in the graph: DDP waits for the gradient of each
            x_BTD = x_BTD + 0 * text_BLD.mean(dim=1, keepdim=True)
        return self.head(x_BTD, condition_BD)

    def embed_caption(self, text_BLE: Tensor, text_mask_BL: Tensor | None = None) -> Caption:
        """Embed text vectors (B, L, caption_channels). The mask is True at real tokens; without one, all tokens are real."""
        rotary = self._text_rotary(self.config.caption_length or text_BLE.shape[1])
        caption: Caption = self.caption(text_BLE, text_mask_BL, rotary)
        if not self.preamble:
            return caption
        tokens_BLD = caption.tokens_BLD.to(self.patch_embed.weight.dtype)
        for block in self.preamble:
            tokens_BLD = block(tokens_BLD, caption.mask_BL, rotary)
        return caption._replace(tokens_BLD=tokens_BLD)

    def precompute_kv(self, caption: Caption) -> Caption:
        """Return `caption` with every block's cross-attention keys and values, which sampling would otherwise recompute at each step.

        In joint attention they depend on the image tokens, and the caption is returned as it is.
        """
        if self.config.joint:
            return caption
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
        if self.config.conditioning != "none":
            for module in self.time_embed:
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        if self.config.conditioning == "shared":
            for module in self.modulations.values():
                nn.init.zeros_(cast(nn.Linear, module).weight)
        self.caption.init_weights()
        depths = [*enumerate(self.blocks, start=1), *((len(self.blocks), b) for b in (*self.preamble, *self.mixer, *self.decoder))]
        for depth, block in depths:
            cast(Block | JointBlock | TextBlock, block).init_weights(0.02 / math.sqrt(2 * depth))
        self.restore.init_weights()
        self.head.init_weights()
        bound = self.patch_embed.in_features**-0.5
        nn.init.uniform_(self.patch_embed.bias, -bound, bound)

    def recompute_first(self, share: float) -> None:
        """Checkpoint the activations of the first `share` of the blocks: the later ones are freed by the time these are recomputed."""
        self.recomputed = frozenset(self.all_blocks[: self.config.recomputed(share)])

    @torch.no_grad()
    def scale_init(self, factor: float) -> None:
        """Multiply the initial matrices of the blocks and the caption embedder by `factor`.

        The paper's standard deviation, about 0.02 at any width, suits its own widths: a narrow layer hardly passes its input on.
        """
        for part in self.inner_parts:
            for weight in part.parameters():
                if weight.dim() >= 2:
                    weight.mul_(factor)

    def _run(self, block: nn.Module, *inputs: object) -> Any:
        if block in self.recomputed and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # blocks use no random numbers
        return block(*inputs)

    def _positions(self, latents_BCHW: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        rows, columns = (side // self.config.patch_size for side in latents_BCHW.shape[-2:])
        return positions_on(latents_BCHW.device, dtype, rows, columns, dim, self.config.position_scale)

    def _rotary(self, latents_BCHW: Tensor) -> Rotary | None:
        if self.config.positions == "sincos":
            return None
        weight, (rows, columns) = self.patch_embed.weight, (side // self.config.patch_size for side in latents_BCHW.shape[-2:])
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return rotary_of_image(latents_BCHW.device, dtype, rows, columns, self.config.head_dim, self.config.position_scale)

    def _text_rotary(self, tokens: int) -> Rotary | None:
        if self.config.positions == "sincos":
            return None
        weight = self.patch_embed.weight
        return rotary_of_text(weight.device, torch.promote_types(weight.dtype, torch.float32), tokens, self.config.head_dim)

    def _condition(self, c_noise_B: Tensor, caption: Caption) -> Tensor | None:
        """Return the activated sum of the noise embedding and the pooled caption, (B, D); None for models without conditioning."""
        if caption.pooled_BD is None:
            return None
        return F.gelu(self._embed_noise(c_noise_B) + caption.pooled_BD, approximate="tanh")

    def _embed_noise(self, c_noise_B: Tensor) -> Tensor:
        """Embed the noise level: [cos | sin] at geometric frequencies from 1 to 1/10000, then an MLP; (B,) -> (B, D)."""
        exponent = torch.arange(TIME_FREQUENCIES // 2, dtype=torch.float32, device=c_noise_B.device)
        frequencies = torch.exp(-math.log(10000) * exponent / (TIME_FREQUENCIES // 2))
        angle = c_noise_B.float()[:, None] * frequencies
        return self.time_embed(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.patch_embed.weight.dtype))
