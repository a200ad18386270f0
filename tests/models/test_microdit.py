import math

import pytest
import torch

from microdit.models.caption import join
from microdit.models.config import SIZES, Size, resolve
from microdit.models.microdit import MicroDiT
from microdit.models.moe import ExpertChoice
from microdit.models.patches import unpatchify
from tests.conftest import busy_model, routed


@pytest.mark.parametrize(("name", "parameters"), [("MicroDiT_XL_2", 1_165_442_320), ("MicroDiT_Tiny_2", 200_692_752)])
def test_named_sizes_have_the_papers_parameters(name, parameters):
    with torch.device("meta"):
        model = MicroDiT(resolve(SIZES[name]))
    assert sum(weight.numel() for weight in model.parameters()) == parameters


def test_width_grows_with_depth_and_every_second_block_has_experts():
    config = resolve(SIZES["MicroDiT_XL_2"])
    assert [shape.num_experts for shape in config.blocks] == [0, 8] * 13 + [0, 0]
    assert (config.blocks[0].attention_dim, config.blocks[-1].attention_dim) == (512, 1024)
    widths = [shape.attention_dim for shape in config.blocks]
    assert widths == sorted(widths)
    assert all(width % 128 == 0 for width in widths)
    assert config.blocks[1].ffn_dim == 768  # an expert: (0.5 + 3.5/27) * 1024 = 645, rounded up to 256s
    assert config.blocks[-1].ffn_dim == 2816  # SwiGLU: two thirds of 4 * 1024, rounded up


def test_the_ungated_feed_forward_is_a_gelu_of_equal_cost():
    gated, plain = (
        Size(dim=96, depth=3, head_dim=32, mixer_dim=96, mixer_depth=1, num_experts=0, round_ffn_to=2, gated_ffn=g) for g in (True, False)
    )
    for with_gate, without in zip(resolve(gated).blocks, resolve(plain).blocks, strict=True):
        assert 2 * without.ffn_dim == pytest.approx(3 * with_gate.ffn_dim, rel=0.03)
    ffn = busy_model(plain).blocks[0].ffn
    x = torch.randn(2, 3, 96, dtype=torch.float64)
    hidden = x @ ffn.up.weight.T
    gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    assert torch.allclose(ffn(x), gelu @ ffn.down.weight.T, atol=1e-12)


def test_a_fresh_model_says_nothing_and_its_weights_shrink_with_depth():
    torch.manual_seed(0)
    model = MicroDiT(resolve(Size(dim=128, depth=4, head_dim=32, mixer_dim=128, mixer_depth=1, num_experts=2)))
    latents = torch.randn(2, 4, 8, 8)
    caption = model.embed_caption(torch.randn(2, 3, 1024))
    assert model(latents, torch.zeros(2), caption).abs().max() == 0
    for index, block in enumerate(model.blocks):
        expected = 0.02 / math.sqrt(2 * (index + 1))
        assert block.attn.out.weight.std().item() == pytest.approx(expected, rel=0.05)
        output = block.ffn.w_out if isinstance(block.ffn, ExpertChoice) else block.ffn.down.weight
        assert output.std().item() == pytest.approx(expected, rel=0.05)
        assert block.modulation.weight.abs().max() == 0


def test_every_initial_matrix_is_as_wide_as_the_released_code_draws_it():
    """0.02 into a layer, less out of it the deeper it lies; the mixer's as the last block's; zero where a fresh part says nothing."""
    torch.manual_seed(0)
    size = Size(dim=128, depth=4, head_dim=32, mixer_dim=64, mixer_depth=2, num_experts=8, experts_every=2, ffn_range=(2.0, 4.0))
    model = MicroDiT(resolve(size, caption_channels=96))
    inside = {"qkv", "q", "kv", "gate", "router", "w_in"}
    seen = set()
    for name, weight in model.named_parameters():
        part, *path = name.removesuffix(".weight").split(".")
        depth = int(path[0]) + 1 if part == "blocks" else 4  # of the mixer: that of the whole backbone
        if weight.dim() < 2:
            continue
        if (path and path[-1] == "modulation") or part == "head" or name.startswith(("caption.attn.out", "caption.ffn.down")):
            expected = 0.0
        elif part in ("blocks", "mixer"):
            expected = 0.02 if path[-1] in inside else 0.02 / math.sqrt(2 * depth)
        elif part in ("caption", "time_embed"):
            expected = 0.02
        else:  # patch_embed and the mixer's ways in and out: Xavier's uniform
            expected = math.sqrt(2 / sum(weight.shape))
        assert weight.std().item() == pytest.approx(expected, rel=0.1), name
        seen.add(path[-1] if part in ("blocks", "mixer") else part)
    assert seen >= {*inside, "out", "up", "down", "w_out", "modulation", "caption", "time_embed", "patch_embed", "mixer_in", "head"}


@pytest.mark.parametrize(("channels", "patch_size"), [(4, 2), (8, 1)])
def test_only_the_patch_embeddings_bias_is_initialised_randomly(channels, patch_size):
    """Uniform in +-1 / sqrt(values of a patch), which is +-0.25 for the paper's: the authors leave it as PyTorch draws it."""
    torch.manual_seed(0)
    size = Size(dim=512, depth=1, head_dim=32, mixer_dim=512, mixer_depth=1, num_experts=0)
    model = MicroDiT(resolve(size, in_channels=channels, patch_size=patch_size, bias=True))
    bound = (channels * patch_size**2) ** -0.5
    bias = model.patch_embed.bias
    assert 0.98 * bound < bias.abs().max().item() <= bound
    assert bias.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    others = [weight for name, weight in model.named_parameters() if name.endswith("bias") and name != "patch_embed.bias"]
    assert len(others) > 10
    assert not any(weight.any() for weight in others)


def test_init_scale_scales_inner_matrices_and_keeps_the_output_zero():
    torch.manual_seed(0)
    model = MicroDiT(resolve(Size(dim=128, depth=4, head_dim=32, mixer_dim=128, mixer_depth=1, num_experts=2)))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model.scale_init(3)
    for name, weight in model.named_parameters():
        inside = name.startswith(("caption.", "mixer.", "blocks.")) and weight.dim() >= 2
        assert torch.equal(weight, before[name] * (3 if inside else 1)), name
    assert model(torch.randn(2, 4, 8, 8), torch.zeros(2), model.embed_caption(torch.randn(2, 3, 1024))).abs().max() == 0


def test_caption_padding_matters_only_without_a_mask(tiny_model):
    latents, c_noise = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    text = torch.randn(2, 3, 12, dtype=torch.float64)
    padded = torch.cat([text, torch.randn(2, 4, 12, dtype=torch.float64)], dim=1)
    mask = torch.arange(7).expand(2, 7) < 3
    expected = tiny_model(latents, c_noise, tiny_model.embed_caption(text))
    assert torch.allclose(tiny_model(latents, c_noise, tiny_model.embed_caption(padded, mask)), expected, atol=1e-10)
    assert not torch.allclose(tiny_model(latents, c_noise, tiny_model.embed_caption(padded)), expected, atol=1e-3)


def test_an_empty_caption_is_the_same_whatever_its_length(tiny_model):
    """Guidance and caption dropout rely on it: zero tokens are all alike."""
    short, long = (tiny_model.embed_caption(torch.zeros(1, n, 12, dtype=torch.float64)) for n in (1, 9))
    latents = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    c_noise = torch.zeros(1, dtype=torch.float64)
    assert torch.allclose(tiny_model(latents, c_noise, short), tiny_model(latents, c_noise, long), atol=1e-10)


def test_pictures_need_not_be_square(tiny_model):
    latents = torch.randn(1, 4, 4, 12, dtype=torch.float64)
    caption = tiny_model.embed_caption(torch.randn(1, 3, 12, dtype=torch.float64))
    patches = tiny_model(latents, torch.zeros(1, dtype=torch.float64), caption)
    assert unpatchify(patches, 2, 4, 12).shape == latents.shape
    turned = tiny_model(latents.transpose(2, 3), torch.zeros(1, dtype=torch.float64), caption)
    assert not torch.allclose(turned, patches)  # rows and columns have positions of their own


def test_samples_of_a_batch_do_not_meet(tiny_model):
    latents, c_noise = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    text = torch.randn(3, 3, 12, dtype=torch.float64)
    together = tiny_model(latents, c_noise, tiny_model.embed_caption(text))
    alone = [tiny_model(latents[i : i + 1], c_noise[i : i + 1], tiny_model.embed_caption(text[i : i + 1])) for i in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-10)


@pytest.mark.parametrize("mixer_depth", [0, 1, 3])
@pytest.mark.parametrize("mixer_dim", [16, 32])
@pytest.mark.parametrize("gated", [True, False])
def test_every_weight_learns(mixer_depth, mixer_dim, gated):
    size = Size(dim=32, depth=3, head_dim=8, mixer_dim=mixer_dim, mixer_depth=mixer_depth, num_experts=2, round_ffn_to=8, gated_ffn=gated)
    model = busy_model(size, bias=True)
    caption = model.embed_caption(torch.randn(2, 3, 12, dtype=torch.float64))
    keep_ids = torch.tensor([[0, 1, 2, 3], [4, 9, 10, 15]])
    model(torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.ones(2, dtype=torch.float64), caption, keep_ids).square().sum().backward()
    silent = [name for name, weight in model.named_parameters() if weight.grad is None or weight.grad.abs().max() == 0]
    # A bias of the keys moves all scores of a query alike; after the query-key norm it still matters, so none may be silent.
    assert silent == []


@pytest.mark.parametrize("routing", ["deferred", "maskdit", "sprint"])
def test_a_captions_keys_and_values_may_be_computed_beforehand(routing):
    """For one caption and for a caption of the whole batch, with padding masked or not."""
    size = Size(dim=32, depth=5, head_dim=8, mixer_dim=32 if routing == "sprint" else 16, mixer_depth=2, num_experts=2, round_ffn_to=8)
    model = busy_model(routed(size, routing))
    latents, c_noise = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    text, mask = torch.randn(2, 3, 12, dtype=torch.float64), torch.tensor([[True, True, True], [True, False, False]])
    for caption in (model.embed_caption(text), model.embed_caption(text, mask)):
        assert torch.allclose(model(latents, c_noise, model.precompute_kv(caption)), model(latents, c_noise, caption), atol=1e-12)
    one = model.embed_caption(text[:1])
    for_both = model.precompute_kv(one).map(lambda x: x.expand(2, *x.shape[1:]))
    repeated = model.embed_caption(text[:1].repeat(2, 1, 1))
    assert torch.allclose(model(latents, c_noise, for_both), model(latents, c_noise, repeated), atol=1e-12)
    joined = join(model.precompute_kv(one), model.precompute_kv(model.embed_caption(text[1:])))
    assert torch.allclose(model(latents, c_noise, joined), model(latents, c_noise, model.embed_caption(text)), atol=1e-12)
