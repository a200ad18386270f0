"""Conversion of MiniT2I's weights to ours and back, tensor by tensor and to the last bit.

MiniT2I's network (MM-JiT) is a `MicroDiT` with joint attention, RMS norms, positions of both kinds and no conditioning. Each of its tensors
is one of ours under another name, and matrices may be transposed. Two layouts are read: the parameter tree of the authors' JAX code, where
matrices are (in, out) and convolutions (height, width, in, out), and the state dict of the PyTorch copies, where they are (out, in) and
(out, in, height, width). The JAX layout is also written.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from microdit.errors import UserError
from microdit.models.blocks import BlockShape
from microdit.models.microdit import MicroDiT, ModelConfig
from microdit.models.official import SHOWN, misfits

CAPTION_LENGTH = 256  # tokens of the released models
UNUSED = ("t_embedder.", "pooled_embedder.")  # in the PyTorch copies, whose blocks take no notice of them
# Names of layers (theirs, ours), outside of blocks ...
LAYERS = {
    "img_embedder.proj1": "patch_bottleneck",
    "img_embedder.proj2": "patch_embed",
    "txt_embedder": "caption.project",
    "mask_token": "caption.mask_token",
    "final_layer.norm_final": "head.norm",
    "final_layer.linear": "head.linear",
}
STACKS = {"txt_preamble_blocks": "preamble", "double_blocks": "blocks"}
# ... and inside of them.
PARTS = {
    "img_norm1": "attn_norm",
    "img_norm2": "ffn_norm",
    "txt_norm1": "text_attn_norm",
    "txt_norm2": "text_ffn_norm",
    "img_qkv": "attn.qkv",
    "txt_qkv": "attn.text_qkv",
    "img_attn_proj": "attn.out",
    "txt_attn_proj": "attn.text_out",
    "img_mlp.w1": "ffn.gate",
    "img_mlp.w2": "ffn.down",
    "img_mlp.w3": "ffn.up",
    "txt_mlp.w1": "text_ffn.gate",
    "txt_mlp.w2": "text_ffn.down",
    "txt_mlp.w3": "text_ffn.up",
    "q_norm": "attn.heads.q",
    "k_norm": "attn.heads.k",
}
TEXT_PARTS = {  # of a block of the preamble
    "norm1": "attn_norm",
    "norm2": "ffn_norm",
    "qkv": "attn.qkv",
    "attn_proj": "attn.out",
    "mlp.w1": "ffn.gate",
    "mlp.w2": "ffn.down",
    "mlp.w3": "ffn.up",
    "q_norm": "attn.heads.q",
    "k_norm": "attn.heads.k",
}
_IN_STACK = re.compile(r"(\w+)\.(?:layers_)?(\d+)\.(.+)")


def convert_from_minit2i(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape MiniT2I's tensors (weights or gradients), of either layout, to ours. Unknown names stay as they are."""
    return {_our_name(name): _our_shape(name, tensor) for name, tensor in theirs.items() if not name.startswith(UNUSED)}


def convert_to_minit2i(ours: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename and reshape our tensors (weights or gradients) to those of the JAX code: the inverse of `convert_from_minit2i`."""
    theirs = {}
    for name, tensor in ours.items():
        layer, kind = _their_layer(name), "kernel"
        if name == "caption.mask_token":
            layer, kind, tensor = f"{layer}._flax_param", "param_tensor", tensor[None, None]
        elif name == "patch_bottleneck.weight":
            p = config.patch_size
            tensor = tensor.unflatten(1, (p, p, config.in_channels)).permute(1, 2, 3, 0)
        elif name == "patch_embed.weight":
            tensor = tensor.T[None, None]
        elif name == "patch_embed.bias":
            kind = "bias"
        elif name.endswith(".bias"):
            layer, kind = f"{layer}._flax_linear", "bias"
        elif tensor.dim() == 2:
            layer, tensor = f"{layer}._flax_linear", tensor.T
        else:
            layer = f"{layer}._flax_rmsnorm"
        theirs[f"{layer}.{kind}"] = tensor.contiguous()
    return theirs


def load_minit2i(theirs: Mapping[str, Tensor], caption_length: int = CAPTION_LENGTH) -> MicroDiT:
    """Build a model with the architecture and the weights of MiniT2I's tensors, of either layout.

    Everything but `caption_length` is read off their shapes. Raises UserError that lists every misfit.
    """
    weights = convert_from_minit2i(theirs)
    config = infer_config(theirs, weights, caption_length)
    with torch.device("meta"):
        model = MicroDiT(config)
    problems = misfits(model.state_dict(), weights, lambda name: re.sub(r"\.layers_(\d)", r".\1", _their_layer(name)))
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError("This is not a checkpoint of MiniT2I:\n  - " + "\n  - ".join([*problems[:SHOWN], *more]))
    model.load_state_dict(weights, assign=True)
    return model


def infer_config(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], caption_length: int) -> ModelConfig:
    """Infer the architecture from the shapes. Raises UserError that names the layers it needs and does not find."""
    needed = ("patch_bottleneck.weight", "patch_embed.weight", "caption.project.weight", "blocks.0.attn.qkv.weight")
    missing = [_their_layer(name) for name in needed if name not in ours or ours[name].dim() != 2]
    if "blocks.0.attn.heads.q_weight" not in ours:
        missing.append("double_blocks.layers_0.q_norm")
    kernel = next((tensor for name, tensor in theirs.items() if name.startswith("img_embedder.proj1.")), None)
    if missing or kernel is None or kernel.dim() != 4:
        raise UserError(f"This is not a checkpoint of MiniT2I: missing or misshapen {', '.join(missing) or 'img_embedder.proj1'}.")
    patch_size = kernel.shape[0 if "img_embedder.proj1.kernel" in theirs else -1]
    dim, channels = ours["patch_embed.weight"].shape
    return ModelConfig(
        dim=dim,
        head_dim=len(ours["blocks.0.attn.heads.q_weight"]),
        blocks=_block_shapes(ours, "blocks"),
        mixer_dim=dim,
        mixer=(),
        caption_ffn_dim=0,
        routing="none",
        in_channels=ours["patch_bottleneck.weight"].shape[1] // patch_size**2,
        patch_size=patch_size,
        caption_channels=ours["caption.project.weight"].shape[1],
        conditioning="none",
        positions="both",
        norm="rms",
        qk_norm="per_head",
        attention_bias=True,
        patch_channels=channels,
        caption_embedding="linear",
        caption_length=caption_length,
        preamble=_block_shapes(ours, "preamble"),
    )


def _our_name(name: str) -> str:
    kind = name.rpartition(".")[2]
    layer = re.sub(r"\._flax_\w+$", "", name.removesuffix(f".{kind}")) if kind in ("kernel", "weight", "bias", "param_tensor") else name
    found = _IN_STACK.fullmatch(layer)
    if found and found[1] in STACKS:
        parts = TEXT_PARTS if found[1] == "txt_preamble_blocks" else PARTS
        ours = f"{STACKS[found[1]]}.{found[2]}.{parts.get(found[3], found[3])}"
        if ".heads." in ours:
            return f"{ours}_weight"
    else:
        ours = LAYERS.get(layer, layer)
    return ours if layer == "mask_token" else f"{ours}.{'bias' if kind == 'bias' else 'weight'}"


def _their_layer(name: str) -> str:
    """Return the layer of one of our tensors in the JAX code's tree, without the words of Flax and the tensor's kind."""
    layer = re.sub(r"[._](weight|bias)$", "", name)
    stack, _, rest = layer.partition(".")
    if stack in STACKS.values():
        theirs = next(name for name, ours in STACKS.items() if ours == stack)
        number, _, part = rest.partition(".")
        parts = TEXT_PARTS if stack == "preamble" else PARTS
        return f"{theirs}.layers_{number}.{next((name for name, ours in parts.items() if ours == part), part)}"
    return next((name for name, ours in LAYERS.items() if ours == layer), layer)


def _our_shape(name: str, tensor: Tensor) -> Tensor:
    """Return matrices as (out, in), convolutions as matrices on patches whose channels vary fastest, and the mask token as a vector."""
    if name.startswith("mask_token"):
        return tensor.flatten()
    if tensor.dim() == 4:
        return (tensor.permute(3, 0, 1, 2) if name.endswith(".kernel") else tensor.permute(0, 2, 3, 1)).flatten(1)
    return tensor.T if tensor.dim() == 2 and name.endswith(".kernel") else tensor


def _block_shapes(ours: Mapping[str, Tensor], stack: str) -> tuple[BlockShape, ...]:
    found = {int(m[1]) for name in ours if (m := re.match(rf"{stack}\.(\d+)\.", name))}
    shapes = []
    for index in range(len(found)):
        qkv, gate = ours.get(f"{stack}.{index}.attn.qkv.weight"), ours.get(f"{stack}.{index}.ffn.gate.weight")
        if qkv is None or gate is None or qkv.dim() != 2 or gate.dim() != 2:
            raise UserError(f"This is not a checkpoint of MiniT2I: block {index} of its {stack} lacks its attention or its feed-forward.")
        shapes.append(BlockShape(qkv.shape[0] // 3, gate.shape[0], kind="text" if stack == "preamble" else "joint"))
    return tuple(shapes)
