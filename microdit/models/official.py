"""Conversion of the authors' released weights to ours and back, tensor by tensor and to the last bit.

Both state dicts describe the same function: each tensor of theirs is one of ours under another name (the patch embedding also in another
shape and order). Two of theirs are not weights: `pos_embed` equals our `sincos_positions`, and `mask_token` is zero and never trained.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from microdit.errors import UserError
from microdit.models.blocks import BlockShape
from microdit.models.microdit import MicroDiT, ModelConfig
from microdit.models.positions import sincos_positions

# (theirs, ours): one is replaced at the start of a name ...
PREFIXES = [
    ("x_embedder.proj.", "patch_embed."),
    ("t_embedder.mlp.", "time_embed."),
    ("y_embedder.y_proj.", "caption.project."),
    ("pooled_y_emb_process.", "caption.pool."),
    ("y_emb_preprocess.norm1.", "caption.attn_norm."),
    ("y_emb_preprocess.norm2.", "caption.ffn_norm."),
    ("y_emb_preprocess.", "caption."),
    ("patch_mixer_map_xin.", "mixer_in."),
    ("patch_mixer_map_xout.", "mixer_out."),
    ("patch_mixer_map_y.", "mixer_caption."),
    ("patch_mixer.", "mixer."),
    ("final_layer.norm_final.", "head.norm."),
    ("final_layer.adaLN_modulation.1.", "head.modulation."),
    ("final_layer.linear.", "head.linear."),
    ("blocks.", "blocks."),
]
# ... and one inside it. The experts' `gate` is our `router`; their `w1` and `w2` are parameters, not modules.
PARTS = [
    (".norm1.", ".attn_norm."),
    (".norm2.", ".cross_norm."),
    (".norm3.", ".ffn_norm."),
    (".cross_attn.q_linear.", ".cross_attn.q."),
    (".cross_attn.kv_linear.", ".cross_attn.kv."),
    (".cross_attn.proj.", ".cross_attn.out."),
    (".attn.proj.", ".attn.out."),
    (".mlp.gate.", ".ffn.router."),
    (".mlp.w1.", ".ffn.gate."),
    (".mlp.w2.", ".ffn.up."),
    (".mlp.w3.", ".ffn.down."),
    (".mlp.w1", ".ffn.w_in"),
    (".mlp.w2", ".ffn.w_out"),
    (".adaLN_modulation.1.", ".modulation."),
]
NO_WEIGHTS = ("pos_embed", "mask_token")
SHOWN = 12  # how many problems of a checkpoint are listed
HEAD_DIM_OF_RELEASED = {512: 32, 1024: 64}  # by model width: Tiny and XL


def convert_from_official(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the authors' tensors (weights or gradients) to ours. Unknown names stay as they are."""
    ours = {}
    for name, tensor in official.items():
        if name in NO_WEIGHTS:
            continue
        if name == "x_embedder.proj.weight":  # a convolution (D, C, p, p) -> a matrix on patches whose channels vary fastest
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)
        ours[_rename(name, source=0)] = tensor
    return ours


def convert_to_official(ours: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename and reshape our tensors (weights or gradients) to the authors': the inverse of `convert_from_official`."""
    official = {}
    for name, tensor in ours.items():
        if name == "patch_embed.weight":
            p = config.patch_size
            tensor = tensor.unflatten(1, (p, p, config.in_channels)).permute(0, 3, 1, 2).contiguous()
        official[_rename(name, source=1)] = tensor
    return official


def export_official(model: MicroDiT, grid_size: int) -> dict[str, Tensor]:
    """Return the complete official state dict of `model` for square latents of `grid_size` x `grid_size` patches.

    Raises UserError if the model has weights that the official layout has no names for.
    """
    config = model.config
    if config.routing in ("maskdit", "sprint"):
        raise UserError(f"The official layout has no place for the weights of routing {config.routing}.")
    plain = ModelConfig(config.dim, config.head_dim, config.blocks, config.mixer_dim, config.mixer, config.caption_ffn_dim)
    new = (
        "conditioning",
        "positions",
        "norm",
        "qk_norm",
        "attention_bias",
        "patch_channels",
        "caption_embedding",
        "caption_length",
        "preamble",
    )
    if config.joint or any(getattr(config, name) != getattr(plain, name) for name in new):
        raise UserError("The official layout has no place for joint attention, nor for another conditioning, norm or embedding.")
    if any(not shape.gated and not shape.num_experts for shape in config.blocks + config.mixer):
        raise UserError("The official layout has no place for feed-forwards without a gate (model.gated_ffn: false).")
    official = convert_to_official(model.state_dict(), config)
    official["pos_embed"] = sincos_positions(grid_size, grid_size, config.dim, config.position_scale).unsqueeze(0).clone()
    official["mask_token"] = torch.zeros(1, 1, config.patch_values)
    return official


def load_official(official: Mapping[str, Tensor], head_dim: int | None = None, expert_capacity: float = 2.0) -> MicroDiT:
    """Build a model with the architecture and the weights of an official state dict.

    The weights do not reveal two numbers: `head_dim` (known for the released widths 512 and 1024) and `expert_capacity`.
    Raises UserError that lists every misfit.
    """
    config = infer_config(official, head_dim, expert_capacity)
    with torch.device("meta"):
        model = MicroDiT(config)
    weights = convert_from_official(official)
    problems = misfits(model.state_dict(), weights, lambda name: _rename(name, source=1))
    problems += _head_misfits(config) + _position_misfits(official, config)
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError("This is not a MicroDiT checkpoint of the official layout:\n  - " + "\n  - ".join([*problems[:SHOWN], *more]))
    model.load_state_dict(weights, assign=True)
    return model


def infer_config(official: Mapping[str, Tensor], head_dim: int | None = None, expert_capacity: float = 2.0) -> ModelConfig:
    """Infer the architecture from the shapes. Raises UserError that names the tensors it needs and does not find."""
    needed = ("x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight", "y_emb_preprocess.mlp.w1.weight", "pos_embed")
    ranks = {"x_embedder.proj.weight": 4, "pos_embed": 3}
    missing = [name for name in needed if name not in official or official[name].dim() != ranks.get(name, 2)]
    if missing:
        raise UserError(f"This is not a MicroDiT checkpoint of the official layout: missing or misshapen {', '.join(missing)}.")
    dim, in_channels, patch_size, _ = official["x_embedder.proj.weight"].shape
    head_dim = head_dim or HEAD_DIM_OF_RELEASED.get(dim)
    if head_dim is None or dim % head_dim:
        raise UserError(f"The width of a head cannot be read off the weights (model width {dim}): pass head_dim, a divisor of {dim}.")
    mixer_width = official.get("patch_mixer.0.norm1.weight")
    return ModelConfig(
        dim=dim,
        head_dim=head_dim,
        blocks=_block_shapes(official, "blocks"),
        mixer_dim=dim if mixer_width is None else mixer_width.shape[0],
        mixer=_block_shapes(official, "patch_mixer"),
        caption_ffn_dim=official["y_emb_preprocess.mlp.w1.weight"].shape[0],
        in_channels=in_channels,
        patch_size=patch_size,
        caption_channels=official["y_embedder.y_proj.fc1.weight"].shape[1],
        expert_capacity=expert_capacity,
        bias="y_emb_preprocess.attn.qkv.bias" in official,
        position_scale=_position_scale(official["pos_embed"]),
    )


def _rename(name: str, source: int) -> str:
    for pair in PREFIXES:
        if name.startswith(pair[source]):
            name = pair[1 - source] + name.removeprefix(pair[source])
            break
    # A prefix has already renamed the caption block's `attn_norm`; its attention and feed-forward are named like a block's.
    for pair in PARTS:
        if pair[source] in name:
            return name.replace(pair[source], pair[1 - source], 1)
    return name


def _block_shapes(official: Mapping[str, Tensor], stack: str) -> tuple[BlockShape, ...]:
    found = {int(m[1]) for name in official if (m := re.match(rf"{stack}\.(\d+)\.", name))}
    shapes = []
    for index in range(len(found)):
        qkv = official.get(f"{stack}.{index}.attn.qkv.weight")
        gate = official.get(f"{stack}.{index}.mlp.gate.weight")
        hidden = official.get(f"{stack}.{index}.mlp.w1" + (".weight" if gate is None else ""))
        if qkv is None or hidden is None or hidden.dim() != (2 if gate is None else 3):
            raise UserError(f"This is not a MicroDiT checkpoint of the official layout: {stack}.{index} lacks its attention or MLP.")
        if gate is None:
            shapes.append(BlockShape(qkv.shape[0] // 3, hidden.shape[0]))
        else:
            shapes.append(BlockShape(qkv.shape[0] // 3, hidden.shape[2], gate.shape[0]))
    return tuple(shapes)


def _position_scale(pos_embed_1TD: Tensor) -> float:
    """Infer the scale: the second patch lies at column 1/scale and the first frequency is 1, so its sine and cosine give it."""
    if pos_embed_1TD.shape[1] < 2:
        return 1.0
    sine = pos_embed_1TD[0, 1, 0].double().clamp(1e-6, 1)
    cosine = pos_embed_1TD[0, 1, pos_embed_1TD.shape[2] // 4].double()
    return round(1 / torch.atan2(sine, cosine).item(), 4)


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], their_name: Callable[[str], str]) -> list[str]:
    """Describe each tensor that is missing, unknown or misshapen, one line each, by its name in the layout of others."""
    problems = [f"{their_name(name)} is missing" for name in expected if name not in found]
    problems += [f"{their_name(name)} is not a part of this architecture" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if expected[name].shape != found[name].shape:
            problems.append(f"{their_name(name)} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}")
        elif not found[name].is_floating_point():
            problems.append(f"{their_name(name)} holds {found[name].dtype}, not floating-point numbers")
    return sorted(problems)


def _head_misfits(config: ModelConfig) -> list[str]:
    widths = {shape.attention_dim for shape in config.blocks + config.mixer}
    return [f"an attention of width {w} is not a whole number of heads of {config.head_dim}" for w in sorted(widths) if w % config.head_dim]


def _position_misfits(official: Mapping[str, Tensor], config: ModelConfig) -> list[str]:
    pos_embed_1TD = official["pos_embed"].float()
    grid = round(pos_embed_1TD.shape[1] ** 0.5)
    expected_1TD = sincos_positions(grid, grid, config.dim, config.position_scale).unsqueeze(0)
    problems = []
    if pos_embed_1TD.shape != expected_1TD.shape or not torch.allclose(pos_embed_1TD, expected_1TD, atol=1e-3):
        problems.append(f"pos_embed is not the sine-cosine table of a square grid (read scale {config.position_scale})")
    if "mask_token" not in official:
        problems.append("mask_token is missing")
    elif official["mask_token"].abs().max() > 0:
        problems.append("mask_token is not zero: the official model never trains it, so these weights come from elsewhere")
    return problems
