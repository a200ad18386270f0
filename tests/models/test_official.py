import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from microdit.errors import UserError
from microdit.models.config import Size
from microdit.models.official import convert_from_official, export_official, load_official
from tests.conftest import busy_model
from tests.models.parity import run_parity


def test_outputs_losses_gradients_and_samples_equal_the_authors(official_fixture):
    result = run_parity("official_parity.py", official_fixture)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("out.full", "out.cfg3", "out.masked75", "loss.masked75", "grad.blocks.1.mlp.w1", "sample.heun8_cfg3"):
        assert name in result.stdout


def test_the_parity_check_can_fail(official_fixture, tmp_path):
    from safetensors import safe_open

    with safe_open(official_fixture, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(official_fixture)
    tensors["out.full"] = tensors["out.full"] * 1.001
    save_file(tensors, tmp_path / "wrong.safetensors", metadata)
    result = run_parity("official_parity.py", tmp_path / "wrong.safetensors")
    assert result.returncode == 1
    assert "ABOVE" in result.stdout


@settings(deadline=None, max_examples=25)
@given(
    depth=st.integers(1, 4),
    mixer_depth=st.integers(0, 3),
    mixer_dim=st.sampled_from([16, 32]),
    channels=st.sampled_from([4, 16]),
    patch_size=st.integers(1, 2),
    experts=st.sampled_from([0, 2, 4]),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 1.5, 2.0]),
)
def test_any_architecture_goes_to_the_official_layout_and_back_bit_for_bit(
    depth, mixer_depth, mixer_dim, channels, patch_size, experts, bias, scale
):
    size = Size(dim=32, depth=depth, head_dim=8, mixer_dim=mixer_dim, mixer_depth=mixer_depth, num_experts=experts, round_ffn_to=8)
    model = busy_model(size, in_channels=channels, patch_size=patch_size, bias=bias, position_scale=scale, expert_capacity=1.5).float()
    official = export_official(model, grid_size=6)
    again = load_official(official, head_dim=8, expert_capacity=1.5)
    if mixer_depth == 0:  # without a mixer its width leaves no trace, and has no meaning
        assert again.config.mixer == ()
    else:
        assert again.config == model.config
    weights, weights_again = model.state_dict(), again.state_dict()
    assert weights.keys() == weights_again.keys()
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    exported = export_official(again, grid_size=6)
    assert exported.keys() == official.keys()
    assert all(torch.equal(exported[name], official[name]) for name in official)


@pytest.mark.parametrize("routing", ["maskdit", "sprint"])
def test_weights_without_an_official_name_are_not_exported(routing):
    model = busy_model(Size(dim=32, depth=5, head_dim=8, mixer_dim=16, mixer_depth=1, num_experts=0, round_ffn_to=8, routing=routing))
    with pytest.raises(UserError, match=f"no place for the weights of routing {routing}"):
        export_official(model, grid_size=4)


def test_feed_forwards_without_a_gate_are_not_exported():
    model = busy_model(Size(dim=32, depth=2, head_dim=8, mixer_dim=16, mixer_depth=1, num_experts=0, round_ffn_to=8, gated_ffn=False))
    with pytest.raises(UserError, match="without a gate"):
        export_official(model, grid_size=4)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention": "joint"},
        {"conditioning": "shared"},
        {"positions": "both"},
        {"norm": "rms"},
        {"qk_norm": "per_head"},
        {"attention_bias": True},
        {"patch_channels": 4},
        {"caption_embedding": "linear"},
        {"caption_length": 7},
        {"preamble_depth": 1},
    ],
)
def test_networks_of_another_kind_are_not_exported(settings):
    model = busy_model(Size(dim=32, depth=2, head_dim=8, mixer_dim=16, mixer_depth=1, num_experts=0, round_ffn_to=8, **settings))
    with pytest.raises(UserError, match="no place for joint attention, nor for another conditioning"):
        export_official(model, grid_size=4)


def test_what_does_not_fit_is_listed(official_fixture):
    state = {n.removeprefix("state."): t for n, t in load_file(official_fixture).items() if n.startswith("state.")}
    del state["blocks.2.norm2.weight"]
    state["blocks.0.attn.proj.weight"] = torch.zeros(3, 3)
    state["blocks.0.extra"] = torch.zeros(1)
    state["mask_token"] = torch.ones(1, 1, 16)
    state["pos_embed"] = state["pos_embed"] + 0.1
    with pytest.raises(UserError) as caught:
        load_official(state, head_dim=16)
    message = str(caught.value)
    assert "blocks.2.norm2.weight is missing" in message
    assert "blocks.0.attn.proj.weight has shape (3, 3), expected (64, 32)" in message
    assert "blocks.0.extra is not a part of this architecture" in message
    assert "mask_token is not zero" in message
    assert "pos_embed is not the sine-cosine table" in message


@pytest.mark.parametrize("state", [{}, {"weight": torch.zeros(2)}, {"x_embedder.proj.weight": torch.zeros(3)}])
def test_something_else_altogether_is_refused(state):
    with pytest.raises(UserError, match="not a MicroDiT checkpoint"):
        load_official(state)


def test_a_head_width_that_cannot_be_known_is_asked_for(official_fixture):
    state = {n.removeprefix("state."): t for n, t in load_file(official_fixture).items() if n.startswith("state.")}
    with pytest.raises(UserError, match="pass head_dim, a divisor of 64"):
        load_official(state)


def test_the_patch_embedding_is_the_official_convolution():
    """A convolution with the patch size as its stride, and our matrix on patches, are the same map."""
    from microdit.models.patches import patchify

    kernel, latents = torch.randn(8, 3, 2, 2, dtype=torch.float64), torch.randn(2, 3, 6, 4, dtype=torch.float64)
    convolved = torch.nn.functional.conv2d(latents, kernel, stride=2).flatten(2).transpose(1, 2)
    matrix = convert_from_official({"x_embedder.proj.weight": kernel})["patch_embed.weight"]
    assert torch.allclose(patchify(latents, 2) @ matrix.T, convolved)
