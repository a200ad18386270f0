"""MiniT2I's network, objective and samplers written down a second time, as plainly as possible, in float64: a reference for other sizes.

It is itself compared with the numbers of the authors' code. Names of weights are those of their parameter tree. Shapes: B images, T tokens
of either stream, N heads, H channels of a head, D width.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
Config = Mapping[str, Any]


def network(weights: Weights, config: Config, images_BHWC: Tensor, text_BLE: Tensor, mask_BL: Tensor) -> Tensor:
    """The predicted images."""
    p, heads, side = config["patch_size"], config["num_heads"], images_BHWC.shape[1] // config["patch_size"]
    text_BLE = torch.where(mask_BL[..., None] > 0.5, text_BLE, weights["mask_token._flax_param.param_tensor"])
    patches = images_BHWC.reshape(len(images_BHWC), side, p, side, p, -1).transpose(2, 3).flatten(3).flatten(1, 2)
    image = patches @ weights["img_embedder.proj1.kernel"].flatten(0, 2) @ weights["img_embedder.proj2.kernel"][0, 0]
    image = image + weights["img_embedder.proj2.bias"] + sincos(image.shape[-1], side)
    text = linear(weights, "txt_embedder", text_BLE)
    angles = text_angles(text.shape[1], config["head_dim"]), image_angles(side, config["head_dim"])
    for number in range(config["txt_preamble_depth"]):
        name = f"txt_preamble_blocks.layers_{number}"
        (text,) = block(weights, name, {"": text}, angles[0], heads)
    for number in range(config["depth_double"]):
        text, image = block(weights, f"double_blocks.layers_{number}", {"txt_": text, "img_": image}, torch.cat(angles), heads)
    image = linear(weights, "final_layer.linear", rms(weights, "final_layer.norm_final", image))
    return image.unflatten(1, (side, side)).unflatten(3, (p, p, -1)).transpose(2, 3).reshape(images_BHWC.shape)


def block(weights: Weights, name: str, streams: Mapping[str, Tensor], angles_TH: Tensor, heads: int) -> list[Tensor]:
    """One attention over all streams, each with its own matrices, then each one's SwiGLU."""
    project = [linear(weights, f"{name}.{of}qkv", rms(weights, f"{name}.{of}norm1", x)) for of, x in streams.items()]
    q, k, v = torch.cat([x.unflatten(-1, (3, heads, -1)) for x in project], 1).unbind(2)
    q, k = (rotated(rms(weights, f"{name}.{which}_norm", x), angles_TH) for which, x in (("q", q), ("k", k)))
    scores = torch.einsum("bqnh,bknh->bnqk", q, k) / math.sqrt(q.shape[-1])
    attended = torch.einsum("bnqk,bknh->bqnh", scores.softmax(-1), v).flatten(2).split([x.shape[1] for x in streams.values()], 1)
    found = []
    for (of, x), out in zip(streams.items(), attended, strict=True):
        x = x + linear(weights, f"{name}.{of}attn_proj", out)
        inner, mlp = rms(weights, f"{name}.{of}norm2", x), f"{name}.{of}mlp"
        gated = F.silu(linear(weights, f"{mlp}.w1", inner)) * linear(weights, f"{mlp}.w3", inner)
        found.append(x + linear(weights, f"{mlp}.w2", gated))
    return found


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}._flax_linear.kernel"] + weights.get(f"{name}._flax_linear.bias", torch.zeros(1, dtype=x.dtype))


def rms(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}._flax_rmsnorm.kernel"]


def rotated(x_BTNH: Tensor, angles_TH: Tensor) -> Tensor:
    """Channel h turns together with channel h + H/2, by the angle of its token."""
    first, second = x_BTNH.chunk(2, -1)
    return x_BTNH * angles_TH.cos()[:, None] + torch.cat([-second, first], -1) * angles_TH.sin()[:, None]


def text_angles(tokens: int, head_dim: int) -> Tensor:
    angles = torch.outer(torch.arange(tokens).double(), 10000.0 ** -(torch.arange(0, head_dim, 2).double() / head_dim))
    return torch.cat([angles, angles], 1)


def image_angles(side: int, head_dim: int) -> Tensor:
    """A quarter of the channels turns by the row and a quarter by the column, twice."""
    by_place = text_angles(side, head_dim // 2)[:, : head_dim // 4]
    both = torch.stack([torch.cat([by_place[row], by_place[column]]) for row in range(side) for column in range(side)])
    return torch.cat([both, both], 1)


def sincos(dim: int, side: int) -> Tensor:
    def by(place: Tensor) -> Tensor:
        angles = torch.outer(place, 10000.0 ** -(torch.arange(dim // 4).double() / (dim / 4)))
        return torch.cat([angles.sin(), angles.cos()], 1)

    rows, columns = torch.meshgrid(torch.arange(side).double(), torch.arange(side).double(), indexing="ij")
    return torch.cat([by(columns.flatten()), by(rows.flatten())], 1)


def velocity(weights: Weights, config: Config, floor: float, x: Tensor, t_B: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    return (network(weights, config, x, text, mask) - x) / (1 - t_B).clamp(min=floor).view(-1, 1, 1, 1)


def loss(weights: Weights, config: Config, floor: float, tensors: Weights) -> Tensor:
    t_B, clean, text, mask = (tensors[name] for name in ("loss.t", "loss.clean", "in.context_BLE", "in.mask_BL"))
    t = t_B.view(-1, 1, 1, 1)
    noisy = t * clean + (1 - t) * tensors["loss.noise"]
    target = (clean - noisy) / (1 - t).clamp(min=floor)
    return (velocity(weights, config, floor, noisy, t_B, text, mask) - target).square().mean()


def sample(weights: Weights, config: Config, floor: float, tensors: Weights, steps: int, guidance: float, heun: bool) -> Tensor:
    """From noise at t = 0 to an image at t = 1 in equal steps; Heun's last one is Euler's."""
    x, text, mask = (tensors[name] for name in ("sample.noise", "in.context_BLE", "in.mask_BL"))

    def slope(x: Tensor, t: float) -> Tensor:
        t_B = torch.full((len(x),), t, dtype=torch.float64)
        without = velocity(weights, config, floor, x, t_B, text, torch.zeros_like(mask))
        return without + guidance * (velocity(weights, config, floor, x, t_B, text, mask) - without)

    for step in range(steps):
        first = slope(x, step / steps)
        if heun and step < steps - 1:
            first = (first + slope(x + first / steps, (step + 1) / steps)) / 2
        x = x + first / steps
    return x
