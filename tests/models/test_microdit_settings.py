"""The settings of later networks: joint attention, conditioning, positions, norms, captions of one length, patches through a bottleneck."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from microdit.diffusion.edm import EDM
from microdit.diffusion.flow import Flow
from microdit.diffusion.objective import denoising_loss
from microdit.models.caption import join
from microdit.models.config import SIZES, Size, resolve
from microdit.models.microdit import MicroDiT
from microdit.models.routing import METHODS
from microdit.pipelines.sampling import draw_latents, round_matrices
from microdit.pipelines.settings import SamplerSettings
from tests.conftest import busy_model, routed

SIZE = Size(dim=32, depth=7, head_dim=8, mixer_dim=16, mixer_depth=2, num_experts=4, round_ffn_to=8)
JOINT = replace(SIZE, attention="joint", positions="both", norm="rms", qk_norm="per_head", preamble_depth=1)
LIKE_MINIT2I = replace(JOINT, conditioning="none", attention_bias=True, patch_channels=6, caption_embedding="linear", caption_length=8)
CROSS = replace(SIZE, positions="rotary", norm="rms", qk_norm="per_head", conditioning="shared", preamble_depth=1)
NARROW = {"joint": JOINT, "joint, shared": replace(JOINT, conditioning="shared"), "like MiniT2I": LIKE_MINIT2I, "cross": CROSS}
VARIANTS = {**NARROW, "joint, mixer as wide": replace(JOINT, mixer_dim=32), "unread text": replace(LIKE_MINIT2I, unread_text=True)}
KEEP_IDS = torch.tensor([[5, 0, 9, 14], [3, 8, 2, 7]])


def inputs(height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, height, width, generator=generator, dtype=torch.float64)
    return latents, torch.tensor([0.3, -0.7], dtype=torch.float64), torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)


def forward(model: MicroDiT, keep_ids: Tensor | None = None, path_keep_mask: Tensor | None = None) -> Tensor:
    latents, c_noise, text = inputs()
    return model(latents, c_noise, model.embed_caption(text), keep_ids, path_keep_mask)


@pytest.mark.parametrize("routing", METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_has_a_gradient_with_and_without_a_drop(variant, routing):
    """DDP waits for all of them. Those of an unread caption are zero."""
    model = busy_model(routed(VARIANTS[variant], routing))
    latents, c_noise, text = inputs()
    for keep_ids in [None] if routing == "none" else [None, KEEP_IDS]:
        model.zero_grad()
        denoising_loss(model, EDM(), latents, model.embed_caption(text), c_noise.exp(), latents.flip(0), keep_ids).sum().backward()
        assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
        still = {name for name, weight in model.named_parameters() if weight.grad.abs().max() == 0}
        last = f"{'decoder.1' if routing == 'maskdit' else 'blocks.6'}."
        unread = {name for name in still if VARIANTS[variant].unread_text and name.startswith(last) and "text" in name}
        assert still - unread <= {"restore.mask_token"}
        assert bool(unread) == (variant == "unread text")


@pytest.mark.parametrize("routing", [name for name in METHODS if name != "none"])
@pytest.mark.parametrize("variant", NARROW)
def test_kept_tokens_have_the_positions_of_their_places(variant, routing):
    """All tokens in another order are the same picture: every token is found where `keep_ids` says."""
    model = busy_model(routed(replace(NARROW[variant], num_experts=0), routing))
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    dense, shuffled = forward(model), forward(model, order)
    if METHODS[routing].restore == "nothing":
        dense = dense.gather(1, order.unsqueeze(-1).expand_as(dense))
    assert torch.allclose(shuffled, dense, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dropped_path_leaves_image_and_caption_out_of_the_sparse_blocks(variant):
    model, path_keep_mask = busy_model(routed(VARIANTS[variant], "sprint")), torch.tensor([1.0, 0.0])
    masked = forward(model, KEEP_IDS, path_keep_mask)
    assert torch.allclose(masked[0], forward(model, KEEP_IDS)[0], atol=1e-12)
    assert torch.allclose(masked[1], forward(model, KEEP_IDS[:, :0])[1], atol=1e-12)
    assert not torch.allclose(masked[1], forward(model, KEEP_IDS)[1], atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing(variant):
    model = busy_model(VARIANTS[variant])
    latents, c_noise, text = inputs()
    padded = torch.cat([text, torch.randn(2, 2, 12, dtype=torch.float64)], dim=1)
    mask = torch.arange(7).expand(2, 7) < 5
    expected = model(latents, c_noise, model.embed_caption(text))
    assert torch.allclose(model(latents, c_noise, model.embed_caption(padded, mask)), expected, atol=1e-10)
    assert not torch.allclose(model(latents, c_noise, model.embed_caption(padded)), expected, atol=1e-3)


def test_the_mask_token_takes_the_place_of_padding_and_of_dropped_captions():
    """As if the text encoder had written it there: against a model without a length, given the filled captions."""
    model = busy_model(LIKE_MINIT2I)
    plain = busy_model(replace(LIKE_MINIT2I, caption_length=None))
    weights = model.state_dict()
    token = weights.pop("caption.mask_token")
    plain.load_state_dict(weights)
    latents, c_noise, text = inputs()
    filled = token.repeat(2, 8, 1)
    filled[0, :5], filled[1, :3] = text[0], text[1, :3]
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    expected = plain(latents, c_noise, plain.embed_caption(filled))
    assert torch.allclose(model(latents, c_noise, model.embed_caption(text, mask)), expected, atol=1e-12)
    nothing = plain(latents, c_noise, plain.embed_caption(token.repeat(2, 8, 1)))
    for dropped, seen in (
        (torch.zeros_like(text), None),
        (text, torch.zeros(2, 5, dtype=torch.bool)),
        (torch.zeros(2, 1, 12).double(), None),
    ):
        assert torch.allclose(model(latents, c_noise, model.embed_caption(dropped, seen)), nothing, atol=1e-12)
    long = torch.cat([text, text, text], dim=1)  # of 15 tokens the first 8 are read
    assert torch.equal(model.embed_caption(long).tokens_BLD, model.embed_caption(long[:, :8]).tokens_BLD)


def test_shared_modulation_is_adaln_with_equal_matrices_and_own_biases():
    for size in (replace(JOINT, conditioning="shared"), CROSS):
        shared, own = busy_model(size), busy_model(replace(size, conditioning="adaln"))
        weights = shared.state_dict()
        streams = ("modulation", "text_modulation") if size.attention == "joint" else ("modulation",)
        for stack, width in (("mixer", 16), ("blocks", 32)):
            matrix, bias = weights[f"modulations.{width}.weight"], weights[f"modulations.{width}.bias"]
            for index in range(len(getattr(shared, stack))):
                for part, name in enumerate(streams):
                    key = f"{stack}.{index}.{name}"
                    offset = weights.pop(f"{key}.offset")
                    rows = slice(part * 6 * width, part * 6 * width + len(offset))
                    weights[f"{key}.weight"], weights[f"{key}.bias"] = matrix[rows], bias[rows] + offset
        own.load_state_dict({name: weight for name, weight in weights.items() if not name.startswith("modulations.")})
        assert torch.allclose(forward(shared), forward(own), atol=1e-10)
        assert torch.allclose(forward(shared, KEEP_IDS), forward(own, KEEP_IDS), atol=1e-10)


def test_without_conditioning_the_noise_level_is_not_read():
    model = busy_model(LIKE_MINIT2I)
    latents, c_noise, text = inputs()
    caption = model.embed_caption(text)
    assert caption.pooled_BD is None
    assert torch.equal(model(latents, c_noise, caption), model(latents, c_noise + 1, caption))
    assert not any("time_embed" in name or "modulation" in name or "pool" in name for name, _ in model.named_parameters())


def test_patches_pass_the_bottleneck():
    """A matrix of low rank: equal to a model without a bottleneck that has the product of both matrices."""
    narrow, whole = busy_model(replace(SIZE, patch_channels=6)), busy_model(SIZE)
    weights = narrow.state_dict()
    weights["patch_embed.weight"] = weights["patch_embed.weight"] @ weights.pop("patch_bottleneck.weight")
    whole.load_state_dict(weights)
    assert torch.allclose(forward(narrow), forward(whole), atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_caption_embedded_once_serves_all_steps(variant):
    """With cross-attention the blocks' keys and values are computed beforehand, and in joint attention nothing is, which is as valid."""
    model = busy_model(VARIANTS[variant])
    latents, c_noise, text = inputs()
    caption = model.embed_caption(text)
    beforehand = model.precompute_kv(caption)
    assert bool(beforehand.kv_cache) == (variant == "cross")
    assert torch.allclose(model(latents, c_noise, beforehand), model(latents, c_noise, caption), atol=1e-12)
    one, other = (model.precompute_kv(model.embed_caption(text[i : i + 1])) for i in range(2))
    assert torch.allclose(model(latents, c_noise, join(one, other)), model(latents, c_noise, caption), atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pictures_of_rounded_matrices_are_nearly_the_same(variant):
    exact = busy_model(replace(VARIANTS[variant], num_experts=0)).float()
    with torch.no_grad():
        for weight in exact.parameters():
            weight.mul_(0.5)
    rounded = copy.deepcopy(exact)
    round_matrices(rounded, torch.bfloat16)
    latents, _, text = (tensor.float() for tensor in inputs())
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns where a norm's weight has another dtype than its input
        drawn = [draw_latents(model, Flow("image"), latents, text, mask, SamplerSettings(4, 3.0)).float() for model in (exact, rounded)]
    assert 0 < (drawn[1] - drawn[0]).norm() < 0.1 * drawn[0].norm()


@pytest.mark.parametrize("positions", ["sincos", "rotary", "both"])
def test_every_kind_of_positions_tells_rows_from_columns_at_any_aspect(positions):
    model = busy_model(replace(JOINT, positions=positions))
    latents, c_noise, text = inputs(4, 12)
    caption = model.embed_caption(text)
    wide, tall = (model(x, c_noise, caption) for x in (latents, latents.transpose(2, 3)))
    assert wide.shape == tall.shape == (2, 12, 16)
    assert not torch.allclose(wide, tall)


def test_at_position_scale_2_a_doubled_grid_meets_the_old_rotary_positions():
    """Four times the tokens, at half the distance: every second row and column is where the small model has it."""
    from microdit.models.positions import rotary_of_image

    old, new = (rotary_of_image(torch.device("cpu"), torch.float64, n, n, 8, scale) for n, scale in ((4, 1.0), (8, 2.0)))
    assert torch.allclose(new.sin.view(8, 8, 8)[::2, ::2], old.sin.view(4, 4, 8))


def test_fresh_models_say_nothing():
    torch.manual_seed(0)
    for size in VARIANTS.values():
        model = MicroDiT(resolve(size, caption_channels=12))
        assert model(torch.randn(2, 4, 8, 8), torch.zeros(2), model.embed_caption(torch.randn(2, 5, 12))).abs().max() == 0


def test_the_kinds_of_blocks_must_go_together():
    config = resolve(JOINT)
    with pytest.raises(ValueError, match="all of kind cross, or all joint"):
        replace(config, mixer=resolve(SIZE).mixer)
    with pytest.raises(ValueError, match="preamble of kind text"):
        replace(config, preamble=config.blocks)


@pytest.mark.parametrize(("name", "published", "dim"), [("MMJiT_B", 258, 768), ("MMJiT_L", 912, 1248)])
def test_minit2is_models_have_the_published_parameters(name, published, dim):
    """The published figures, 258 M and 912 M, are of the PyTorch copies, which also hold two embedders that no block reads."""
    with torch.device("meta"):
        model = MicroDiT(resolve(SIZES[name], patch_size=16, in_channels=3))
    time_embedder = (256 * dim + dim) + (dim * dim + dim)
    pooled_embedder = 1024 * dim
    parameters = sum(weight.numel() for weight in model.parameters())
    assert round((parameters + time_embedder + pooled_embedder) / 1e6) == published
    assert parameters / 1e6 == pytest.approx(published, rel=0.01)
