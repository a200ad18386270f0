"""The blocks against naive references: loops over samples, heads and tokens, in float64, written from the papers' formulas."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from microdit.models.blocks import BlockShape, BlockStyle, JointBlock, make_block
from microdit.models.positions import rotary_of_image, rotary_of_text

CPU, DIM, HEAD_DIM, ATTENTION, HIDDEN, EPS = torch.device("cpu"), 16, 8, 24, 20, 1e-6
T, L = 6, 4
MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])


def norm(x: Tensor, weight: Tensor | None, kind: str) -> Tensor:
    """Normalise one vector."""
    centred = x - x.mean() if kind == "layer" else x
    normed = centred / math.sqrt((centred**2).mean() + EPS)
    return normed if weight is None else normed * weight


def modulated(x_TD: Tensor, weight: Tensor, style: BlockStyle, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    normed = torch.stack([norm(x, weight, style.norm) for x in x_TD])
    return normed if shift is None else normed * (1 + scale) + shift


def linear(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def heads(x_TA: Tensor, module, part: str, angles: Tensor | None) -> Tensor:
    """Split into (T, N, H); normalise and turn queries and keys."""
    out = []
    for token, x in enumerate(x_TA):
        x = norm(x, None, "layer") if part != "v" and not module.per_head else x
        for h in x.split(HEAD_DIM):
            if part != "v" and module.per_head:
                h = norm(h, getattr(module, f"{part}_weight"), "rms")
            if part != "v" and angles is not None:
                half = HEAD_DIM // 2
                pairs = torch.complex(h[:half], h[half:]) * torch.polar(torch.ones(half).double(), angles[token, :half])
                h = torch.cat([pairs.real, pairs.imag])
            out.append(h)
    return torch.stack(out).view(len(x_TA), -1, HEAD_DIM)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    rows = []
    for token in range(len(q)):
        row = []
        for head in range(q.shape[1]):
            scores = torch.stack([q[token, head] @ k[j, head] / math.sqrt(HEAD_DIM) for j in range(len(k)) if seen[j]])
            values = torch.stack([v[j, head] for j in range(len(k)) if seen[j]])
            row.append(scores.softmax(0) @ values)
        rows.append(torch.cat(row))
    return torch.stack(rows)


def feed_forward(ffn, x: Tensor) -> Tensor:
    gate = x @ ffn.gate.weight.T
    return (gate * torch.sigmoid(gate) * (x @ ffn.up.weight.T)) @ ffn.down.weight.T


def parts_of(modulation, condition: Tensor | None, parts: int) -> list:
    if condition is None:
        return [None] * parts
    whole = condition[: len(modulation.offset)] + modulation.offset if hasattr(modulation, "offset") else linear(modulation, condition)
    return list(whole.split(DIM))


def gated(x: Tensor, gate: Tensor | None, y: Tensor) -> Tensor:
    return x + y if gate is None else x + gate * y


def naive_joint(block: JointBlock, style: BlockStyle, x: Tensor, text: Tensor, seen: Tensor, condition, angles, text_angles):
    """MM-DiT's block (2403.03206, figure 2b) for one sample."""
    mine, texts = condition, condition
    if style.conditioning == "shared":
        mine, texts = condition[: 6 * DIM], condition[6 * DIM :]
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts_of(block.modulation, mine, 6)
    t_shift_1, t_scale_1, *rest = parts_of(block.text_modulation, texts, 6 if block.updates_text else 2)
    x_in = modulated(x, block.attn_norm.weight, style, shift_1, scale_1)
    text_in = modulated(text, block.text_attn_norm.weight, style, t_shift_1, t_scale_1)
    q, k, v = (
        heads(part, block.attn.heads, name, angles)
        for name, part in zip("qkv", linear(block.attn.qkv, x_in).split(ATTENTION, dim=1), strict=True)
    )
    layer, names = (block.attn.text_qkv, "qkv") if block.updates_text else (block.attn.text_kv, "kv")
    texts_qkv = {
        name: heads(part, block.attn.heads, name, text_angles)
        for name, part in zip(names, linear(layer, text_in).split(ATTENTION, dim=1), strict=True)
    }
    k, v, seen = torch.cat([texts_qkv["k"], k]), torch.cat([texts_qkv["v"], v]), torch.cat([seen, torch.ones(len(x), dtype=torch.bool)])
    x = gated(x, gate_1, linear(block.attn.out, attend(q, k, v, seen)))
    x = gated(x, gate_2, feed_forward(block.ffn, modulated(x, block.ffn_norm.weight, style, shift_2, scale_2)))
    if block.updates_text:
        gate_1, shift_2, scale_2, gate_2 = rest
        text = gated(text, gate_1, linear(block.attn.text_out, attend(texts_qkv["q"], k, v, seen)))
        text = gated(text, gate_2, feed_forward(block.text_ffn, modulated(text, block.text_ffn_norm.weight, style, shift_2, scale_2)))
    return x, text


def naive_cross(block, style: BlockStyle, x: Tensor, text: Tensor, seen: Tensor, condition, angles) -> Tensor:
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts_of(block.modulation, condition, 6)
    x_in = modulated(x, block.attn_norm.weight, style, shift_1, scale_1)
    split = linear(block.attn.qkv, x_in).split(ATTENTION, dim=1)
    q, k, v = (heads(part, block.attn.heads, name, angles) for name, part in zip("qkv", split, strict=True))
    x = gated(x, gate_1, linear(block.attn.out, attend(q, k, v, torch.ones(len(x), dtype=torch.bool))))
    crossed = modulated(x, block.cross_norm.weight, style, None, None)
    q = heads(linear(block.cross_attn.q, crossed), block.cross_attn.heads, "q", None)
    split = linear(block.cross_attn.kv, text).split(DIM, dim=1)
    k, v = (heads(part, block.cross_attn.heads, name, None) for name, part in zip("kv", split, strict=True))
    x = x + linear(block.cross_attn.out, attend(q, k, v, seen))
    return gated(x, gate_2, feed_forward(block.ffn, modulated(x, block.ffn_norm.weight, style, shift_2, scale_2)))


def naive_text(block, style: BlockStyle, text: Tensor, seen: Tensor, angles) -> Tensor:
    split = linear(block.attn.qkv, modulated(text, block.attn_norm.weight, style, None, None)).split(ATTENTION, dim=1)
    q, k, v = (heads(part, block.attn.heads, name, angles) for name, part in zip("qkv", split, strict=True))
    text = text + linear(block.attn.out, attend(q, k, v, seen))
    return text + feed_forward(block.ffn, modulated(text, block.ffn_norm.weight, style, None, None))


STYLES = [
    BlockStyle(HEAD_DIM, DIM, conditioning, norm_kind, qk_norm, attention_bias=bias)
    for conditioning, (norm_kind, qk_norm, bias) in product(
        ("adaln", "shared", "none"), (("layer", "all_heads", False), ("rms", "per_head", True), ("rms", "all_heads", True))
    )
]


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("style", STYLES, ids=lambda style: f"{style.conditioning}-{style.norm}-{style.qk_norm}")
@pytest.mark.parametrize("kind", ["cross", "joint", "joint_last", "text"])
def test_a_block_equals_its_naive_reference(kind, style, rotary):
    torch.manual_seed(0)
    block = make_block(BlockShape(ATTENTION, HIDDEN, kind=kind), DIM, style).double()
    with torch.no_grad():
        for weight in block.parameters():
            weight.normal_(std=0.3)
    x, text = torch.randn(2, T, DIM).double(), torch.randn(2, L, DIM).double()
    parts = 12 if kind.startswith("joint") else 6
    condition = {"adaln": torch.randn(2, DIM).double(), "shared": torch.randn(2, parts * DIM).double(), "none": None}[style.conditioning]
    image = rotary_of_image(CPU, torch.float64, 2, 3, HEAD_DIM) if rotary else None
    line = rotary_of_text(CPU, torch.float64, L, HEAD_DIM) if rotary else None
    angles, text_angles = (None if r is None else torch.atan2(r.sin, r.cos)[0, :, 0] for r in (image, line))
    for sample in range(2):
        of_sample = None if condition is None else condition[sample]
        one_x, one_text, seen = x[sample], text[sample], MASK[sample]
        if kind == "text":
            found = (block(text, MASK, line)[sample],)
            expected: tuple = (naive_text(block, style, one_text, seen, text_angles),)
        elif kind == "cross":
            found = (block(x, text, MASK, condition, image)[sample],)
            expected = (naive_cross(block, style, one_x, one_text, seen, of_sample, angles),)
        else:
            found = tuple(stream[sample] for stream in block(x, text, MASK, condition, image, line))
            expected = naive_joint(block, style, one_x, one_text, seen, of_sample, angles, text_angles)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-9)


def test_the_last_joint_block_has_no_weights_for_an_unread_caption():
    style = BlockStyle(HEAD_DIM, DIM)
    whole, last = (make_block(BlockShape(ATTENTION, HIDDEN, kind=kind), DIM, style) for kind in ("joint", "joint_last"))
    fewer = sum(w.numel() for w in whole.parameters()) - sum(w.numel() for w in last.parameters())
    # queries and output of its attention, the feed-forward with its norm, and four of six parts of adaLN
    assert fewer == 2 * DIM * ATTENTION + 3 * DIM * HIDDEN + DIM + 4 * DIM * (DIM + 1)
