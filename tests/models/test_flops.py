"""The formula against PyTorch's own counter, and against what is known of the paper's run."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from microdit.diffusion.edm import EDM
from microdit.diffusion.objective import denoising_loss
from microdit.models.alignment import Alignment, ProjectorShape
from microdit.models.config import SIZES, Size, resolve
from microdit.models.flops import alignment_flops, forward_flops, training_flops
from microdit.models.microdit import MicroDiT, ModelConfig
from microdit.models.routing import METHODS, kept_tokens
from tests.conftest import routed


def one_hot_flops(config: ModelConfig, tokens: int, kept: int) -> int:
    """What the authors' layers of experts need beyond ours, for one sample, forward and backward.

    E experts take K = capacity x T / E of T tokens each. A one-hot matrix of (E K) x T hands tokens of width D out, its transpose collects
    them: E K x T x D multiply-adds each way. Backward, each has one product more, for the tokens' gradient, the matrix itself being fixed.
    """
    total = 0
    for stack, dim, T in ((config.mixer, config.mixer_dim, tokens), (config.blocks, config.dim, kept)):
        for shape in stack:
            if shape.num_experts:
                chosen = shape.num_experts * int(config.expert_capacity * T / shape.num_experts)
                total += 2 * 2 * 2 * chosen * T * dim
    return total


def counted(config: ModelConfig, side: int, kept: int | None, caption_tokens: int, device: str = "meta") -> tuple[int, int]:
    """Forward alone, and forward with backward, of two samples. On the CPU small models compute, twice as fast as on "meta"."""
    B = 2
    with torch.device(device):
        model = MicroDiT(config)
        latents, sigma = torch.randn(B, config.in_channels, side, side), torch.rand(B)
        text = torch.randn(B, caption_tokens, config.caption_channels)
        keep_ids = None if kept is None else torch.zeros(B, kept, dtype=torch.long)

        def loss():
            return denoising_loss(model, EDM(), latents, model.embed_caption(text), sigma, torch.randn_like(latents), keep_ids).mean()

        # The math kernel is made of plain matrix products, which the counter knows on every device.
        with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
            value = loss()
        with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
            value.backward()
    return forward.get_total_flops() // B, (forward.get_total_flops() + backward.get_total_flops()) // B


@hypothesis_settings(max_examples=40)
@given(
    size=st.builds(
        Size,
        dim=st.sampled_from([32, 64]),
        depth=st.integers(4, 6),
        head_dim=st.sampled_from([8, 16]),
        mixer_dim=st.sampled_from([16, 32, 64]),
        mixer_depth=st.integers(0, 3),
        num_experts=st.sampled_from([0, 2, 4]),
        experts_every=st.integers(1, 3),
        round_ffn_to=st.just(8),
        gated_ffn=st.booleans(),
        attention=st.sampled_from(["cross", "joint"]),
        conditioning=st.sampled_from(["adaln", "shared", "none"]),
        positions=st.sampled_from(["sincos", "both"]),
        norm=st.sampled_from(["layer", "rms"]),
        qk_norm=st.sampled_from(["all_heads", "per_head"]),
        patch_channels=st.sampled_from([None, 12]),
        caption_embedding=st.sampled_from(["block", "linear"]),
        caption_length=st.sampled_from([None, 7]),
        preamble_depth=st.integers(0, 2),
        unread_text=st.booleans(),
    ),
    capacity=st.sampled_from([1.0, 1.3, 2.0]),
    patch_size=st.sampled_from([1, 2]),
    mask=st.sampled_from([0.0, 0.3, 0.75]),
    routing=st.sampled_from(list(METHODS)),
    dense_blocks=st.tuples(st.integers(0, 2), st.integers(0, 1)),
    caption_tokens=st.integers(1, 9),
)
def test_the_formula_is_what_pytorch_counts(size, capacity, patch_size, mask, routing, dense_blocks, caption_tokens):
    size = replace(routed(size, routing), dense_blocks=dense_blocks if METHODS[routing].drop == "blocks" else None)
    mask = 0.0 if routing == "none" else mask
    config = resolve(size, patch_size=patch_size, expert_capacity=capacity, caption_channels=12)
    tokens = (12 // patch_size) ** 2
    kept = kept_tokens(tokens, mask)
    found = counted(config, 12, kept if mask else None, caption_tokens, "cpu")
    assert found == (forward_flops(config, tokens, kept, caption_tokens), training_flops(config, tokens, kept, caption_tokens))


def test_without_the_path_sprint_costs_less_and_what_pytorch_counts():
    config = resolve(Size(dim=32, depth=8, head_dim=8, mixer_dim=32, mixer_depth=0, num_experts=0, routing="sprint"))
    whole, less = (counted(config, 12, kept, 5, "cpu")[0] for kept in (None, 0))
    assert (forward_flops(config, 36, 36, 5), forward_flops(config, 36, 0, 5)) == (whole, less)
    assert less < 0.7 * whole


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("kept", [None, 9])
@pytest.mark.parametrize("block", [1, 3])
def test_an_alignment_adds_what_pytorch_counts(kind, kept, block):
    """At a dense and at a sparse block of sprint; tokens come from layers before, so their gradient is computed."""
    config = resolve(Size(dim=32, depth=6, head_dim=8, mixer_dim=32, mixer_depth=0, num_experts=0, routing="sprint"), caption_channels=12)
    shape = ProjectorShape(kind, 32, 24, 40)
    alignment = Alignment(shape, block)
    keep_ids = None if kept is None or not config.is_sparse(block - 1) else torch.arange(kept).expand(2, -1)
    seen = 36 if keep_ids is None else kept
    tokens = torch.randn(2, seen, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (-alignment(tokens, torch.randn(2, 40, 3, 3), (6, 6), keep_ids)).sum().backward()
    assert counter.get_total_flops() // 2 == alignment_flops(shape, 36, seen)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        pytest.param(name, mask, marks=[pytest.mark.slow] if not mask and SIZES[name].routing != "none" else [])
        for name in SIZES
        for mask in (0.0, 0.75)
        if not mask or SIZES[name].routing != "none"
    ],
)
def test_the_papers_sizes_are_what_pytorch_counts(name, mask):
    config, kept = resolve(SIZES[name]), kept_tokens(256, mask)
    assert counted(config, 32, kept if mask else None, 77)[1] == training_flops(config, 256, kept, 77)


@pytest.mark.parametrize(("tokens", "mask", "gflops"), [(256, 0.75, 285), (256, 0, 731), (1024, 0.75, 1122), (1024, 0, 3265)])
def test_the_four_phases_cost_what_is_known_of_the_authors_code(tokens, mask, gflops):
    """Theirs hands tokens to experts and back by products with one-hot matrices; ours gathers and adds, so these come on top."""
    config, kept = resolve(SIZES["MicroDiT_XL_2"]), kept_tokens(tokens, mask)
    assert (training_flops(config, tokens, kept, 77) + one_hot_flops(config, tokens, kept)) / 1e9 == pytest.approx(gflops, rel=0.002)


def test_minit2is_training_costs_what_was_counted_for_it():
    """1.2 TFLOPs a sample and step, 357 EFLOPs in 250,000 and then 40,000 steps of 1,024 samples (512 px, patches of 16, 256 tokens)."""
    config = resolve(SIZES["MMJiT_B"], patch_size=16, in_channels=3)
    flops = training_flops(config, 1024, 1024, 256)
    assert flops / 1e12 == pytest.approx(1.2, rel=0.01)
    assert flops * 290_000 * 1024 / 1e18 == pytest.approx(357, rel=0.01)


def test_the_one_hot_products_are_what_pytorch_counts():
    """One layer of experts, written as the authors do it: a (tokens x experts x chosen) matrix that hands out, and collects."""
    B, T, D, E = 2, 12, 32, 4
    K = int(2.0 * T / E)
    config = replace(resolve(Size(D, 2, 8, D, 0, num_experts=E, round_ffn_to=8)), expert_capacity=2.0)
    assert [bool(shape.num_experts) for shape in config.blocks] == [False, False]  # the last has none, and 2 is the last
    config = replace(config, blocks=(replace(config.blocks[0], num_experts=E),))
    x, chosen = torch.randn(B, T, D, requires_grad=True), torch.randn(B, E, K, D, requires_grad=True)
    one_hot = torch.nn.functional.one_hot(torch.randn(B, T, E).topk(K, dim=1).indices, T).transpose(1, 2).float()  # B E K T
    with FlopCounterMode(display=False) as counter:
        handed_out = torch.einsum("bekt,btd->bekd", one_hot, x)
        collected = torch.einsum("bekt,bekd->btd", one_hot, chosen)
        (handed_out.sum() + collected.sum()).backward()
    assert counter.get_total_flops() // B == one_hot_flops(config, T, T)
