import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from microdit.errors import UserError
from microdit.models.config import SIZES, resolve
from microdit.models.microdit import MicroDiT
from microdit.models.minit2i import convert_from_minit2i, convert_to_minit2i, load_minit2i
from tests.models.naive_minit2i import Config, Weights, loss, network, sample, velocity
from tests.models.parity import run_parity

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "minit2i_a.safetensors"


def state_of(path: Path = FIXTURE) -> dict[str, Tensor]:
    return {name.removeprefix("state."): tensor for name, tensor in load_file(path).items() if name.startswith("state.")}


def changed(tmp_path: Path, name: str, tensor: Tensor | None) -> Path:
    """The fixture with one tensor replaced, or left out."""
    with safe_open(FIXTURE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(FIXTURE)
    tensors.pop(name, None)
    save_file({**tensors, **({} if tensor is None else {name: tensor})}, tmp_path / "changed.safetensors", metadata)
    return tmp_path / "changed.safetensors"


def test_outputs_losses_gradients_and_samples_equal_the_authors():
    result = run_parity("minit2i_parity.py", FIXTURE)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("bit for bit", "out.x ", "out.x_no_caption", "out.velocity", "loss.value", "sample.euler8", "sample.heun8"):
        assert name in result.stdout
    assert result.stdout.count("grad.") == 8


@pytest.mark.parametrize("name", ["out.velocity", "loss.value", "grad.mask_token._flax_param.param_tensor", "sample.heun8_guidance3"])
def test_the_parity_check_can_fail(name, tmp_path):
    result = run_parity("minit2i_parity.py", changed(tmp_path, name, load_file(FIXTURE)[name] * 1.002))
    assert result.returncode == 1
    assert result.stdout.count("ABOVE") == 1


def test_a_number_that_is_not_compared_is_a_failure(tmp_path):
    result = run_parity("minit2i_parity.py", changed(tmp_path, "out.something", torch.ones(2)))
    assert result.returncode == 1
    assert "NOT COMPARED" in result.stdout


def test_a_damaged_state_is_named(tmp_path):
    result = run_parity("minit2i_parity.py", changed(tmp_path, "state.double_blocks.layers_1.k_norm._flax_rmsnorm.kernel", None))
    assert result.returncode == 1
    assert "double_blocks.1.k_norm is missing" in result.stderr


def as_torch(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the PyTorch copies: (out, in), `weight` for `kernel`, and two embedders that no block reads."""
    renamed = {}
    for name, tensor in theirs.items():
        for flax, short in (
            (".layers_", "."),
            ("._flax_linear", ""),
            ("._flax_rmsnorm", ""),
            ("._flax_param.param_tensor", ""),
            (".kernel", ".weight"),
        ):
            name = name.replace(flax, short)
        renamed[name] = {2: lambda t: t.T, 4: lambda t: t.permute(3, 2, 0, 1)}.get(tensor.dim(), lambda t: t)(tensor)
    return {**renamed, "t_embedder.mlp.0.weight": torch.ones(48, 256), "pooled_embedder.weight": torch.ones(48, 24)}


@settings(deadline=None, max_examples=20)
@given(
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 12]),
    depth=st.integers(1, 3),
    preamble=st.integers(0, 2),
    patch_size=st.integers(1, 5),
    channels=st.integers(1, 4),
    patch_channels=st.integers(1, 9),
    caption_channels=st.integers(1, 7),
)
def test_any_network_goes_to_both_layouts_and_back_bit_for_bit(
    heads, head_dim, depth, preamble, patch_size, channels, patch_channels, caption_channels
):
    dim = heads * head_dim
    size = replace(SIZES["MMJiT_B"], dim=dim, depth=depth, head_dim=head_dim, mixer_dim=dim, preamble_depth=preamble)
    size = replace(size, patch_channels=patch_channels, caption_length=11)
    model = MicroDiT(resolve(size, in_channels=channels, patch_size=patch_size, caption_channels=caption_channels))
    theirs = convert_to_minit2i(model.state_dict(), model.config)
    for layout in (theirs, as_torch(theirs)):
        again = load_minit2i(layout, caption_length=11)
        assert again.config == model.config
        weights, weights_again = model.state_dict(), again.state_dict()
        assert weights.keys() == weights_again.keys()
        assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_the_names_are_those_of_the_authors():
    model = load_minit2i(state_of(), caption_length=10)
    assert convert_to_minit2i(model.state_dict(), model.config).keys() == state_of().keys()


def test_what_does_not_fit_is_listed():
    state = state_of()
    state["double_blocks.layers_0.img_qkv._flax_linear.kernel"] = torch.zeros(48, 147)
    state["double_blocks.layers_1.txt_qkv._flax_linear.kernel"] = torch.zeros(3, 3)
    del state["final_layer.norm_final._flax_rmsnorm.kernel"]
    state["double_blocks.layers_2.extra._flax_linear.kernel"] = torch.zeros(1, 1)
    state["double_blocks.layers_2.q_norm._flax_rmsnorm.kernel"] = torch.zeros(16, dtype=torch.int32)
    with pytest.raises(UserError) as caught:
        load_minit2i(state)
    message = str(caught.value)
    assert "double_blocks.1.txt_qkv has shape (3, 3), expected (144, 48)" in message
    assert "final_layer.norm_final is missing" in message
    assert "double_blocks.2.extra is not a part of this architecture" in message
    assert "double_blocks.2.q_norm holds torch.int32" in message


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"weight": torch.zeros(2)},
        {"img_embedder.proj1.kernel": torch.zeros(3)},
        {"img_embedder.proj1.kernel": torch.zeros(4, 4, 3, 2), "img_embedder.proj2.kernel": torch.zeros(1, 1, 2, 8)},
    ],
)
def test_something_else_altogether_is_refused(state):
    with pytest.raises(UserError, match="not a checkpoint of MiniT2I: missing or misshapen"):
        load_minit2i(state)


def test_the_patch_embedding_is_their_convolution():
    from microdit.models.patches import patchify

    kernel, images = torch.randn(2, 2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 6, 4, dtype=torch.float64)
    convolved = torch.nn.functional.conv2d(images, kernel.permute(3, 2, 0, 1), stride=2).flatten(2).transpose(1, 2)
    matrix = convert_from_minit2i({"img_embedder.proj1.kernel": kernel})["patch_bottleneck.weight"]
    assert torch.allclose(patchify(images, 2) @ matrix.T, convolved)


OUTPUTS = ("out.x", "out.x_no_caption", "out.velocity", "loss.value", "sample.euler8_guidance3", "sample.heun8_guidance3")


def naive_numbers(weights: Weights, config: Config, floor: float, tensors: Weights) -> dict[str, Tensor]:
    """All numbers of a fixture, by the naive reference."""
    weights = {name: tensor.double().requires_grad_() for name, tensor in weights.items()}
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    images, t, text, mask = (tensors[name] for name in ("in.images_BHWC", "in.t", "in.context_BLE", "in.mask_BL"))
    with torch.no_grad():
        found = {
            "out.x": network(weights, config, images, text, mask),
            "out.x_no_caption": network(weights, config, images, text, torch.zeros_like(mask)),
            "out.velocity": velocity(weights, config, floor, images, t, text, mask),
            "sample.euler8_guidance3": sample(weights, config, floor, tensors, 8, 3.0, heun=False),
            "sample.heun8_guidance3": sample(weights, config, floor, tensors, 8, 3.0, heun=True),
        }
    value = loss(weights, config, floor, tensors)
    value.backward()
    gradients = {f"grad.{name}": weight.grad for name, weight in weights.items() if weight.grad is not None}
    return {**found, **gradients, "loss.value": value.detach().reshape(1)}


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def test_the_naive_reference_gives_the_authors_numbers():
    with safe_open(FIXTURE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(FIXTURE)
    found = naive_numbers(state_of(), json.loads(metadata["config"]), json.loads(metadata["objective"])["a_min"], tensors)
    compared = [name for name in tensors if name in OUTPUTS or name.startswith("grad.")]
    assert len(compared) == 14
    assert max(relative_error(found[name], tensors[name]) for name in compared) < 1e-5


@pytest.mark.parametrize(
    ("changes", "noise_scale", "floor"),
    [
        ({"txt_preamble_depth": 0, "patch_size": 8, "in_channels": 1, "head_dim": 20, "num_heads": 2}, 1.5, 0.02),
        ({"txt_preamble_depth": 3, "depth_double": 1, "head_dim": 52, "num_heads": 1, "patch_size": 2, "in_channels": 4}, 2.0, 0.05),
        ({"depth_double": 11, "txt_preamble_depth": 10, "pca_channels": 64, "mlp_ratio": 4.0, "txt_input_length": 33}, 1.0, 0.01),
    ],
)
def test_networks_of_other_sizes_agree_with_the_naive_reference(changes, noise_scale, floor, tmp_path):
    config = {
        "img_input_size": 16,
        "txt_input_length": 7,
        "txt_input_size": 10,
        "patch_size": 4,
        "in_channels": 3,
        "depth_double": 2,
        "txt_preamble_depth": 2,
        "num_heads": 3,
        "head_dim": 8,
        "mlp_ratio": 2.7,
        "pca_channels": 5,
        **changes,
    }
    generator = torch.Generator().manual_seed(0)
    weights = random_weights(config, generator)
    side, channels, length = config["img_input_size"], config["in_channels"], config["txt_input_length"]
    pictures = [torch.randn(2, side, side, channels, generator=generator) for _ in range(4)]
    tensors = {
        "in.context_BLE": torch.randn(2, length, config["txt_input_size"], generator=generator),
        "in.mask_BL": (torch.rand(2, length, generator=generator) > 0.4).float(),
        "in.images_BHWC": pictures[0],
        "in.t": torch.tensor([0.2, 0.995]),
        "loss.clean": pictures[1],
        "loss.noise": pictures[2] * noise_scale,
        "loss.t": torch.tensor([0.3, 0.97]),
        "sample.noise": pictures[3] * noise_scale,
    }
    numbers = {name: tensor.float() for name, tensor in naive_numbers(weights, config, floor, tensors).items()}
    state = {f"state.{name}": tensor for name, tensor in weights.items()}
    about = {"config": json.dumps(config), "objective": json.dumps({"prediction": "x", "noise_scale": noise_scale, "a_min": floor})}
    save_file({name: tensor.contiguous() for name, tensor in {**state, **tensors, **numbers}.items()}, tmp_path / "b.safetensors", about)
    result = run_parity("minit2i_parity.py", tmp_path / "b.safetensors")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" ok\n") == len(numbers)


def random_weights(config: Config, generator: torch.Generator) -> dict[str, Tensor]:
    """In the names and shapes of the authors' tree: those of the fixture's layers, in other sizes."""
    dim, head_dim, patch = config["num_heads"] * config["head_dim"], config["head_dim"], config["patch_size"]
    hidden = (int(dim * config["mlp_ratio"]) + 7) // 8 * 8
    sizes = {"qkv": (dim, 3 * dim), "attn_proj": (dim, dim), "w1": (dim, hidden), "w2": (hidden, dim), "w3": (dim, hidden)}
    values, channels = patch * patch * config["in_channels"], config["pca_channels"]
    shapes: dict[str, tuple[int, ...]] = {
        "img_embedder.proj1.kernel": (patch, patch, config["in_channels"], channels),
        "img_embedder.proj2.kernel": (1, 1, channels, dim),
        "img_embedder.proj2.bias": (dim,),
        "mask_token._flax_param.param_tensor": (1, 1, config["txt_input_size"]),
        "txt_embedder._flax_linear.kernel": (config["txt_input_size"], dim),
        "final_layer.norm_final._flax_rmsnorm.kernel": (dim,),
        "final_layer.linear._flax_linear.kernel": (dim, values),
        "final_layer.linear._flax_linear.bias": (values,),
    }
    for stack, depth in (("txt_preamble_blocks", config["txt_preamble_depth"]), ("double_blocks", config["depth_double"])):
        like = {name.split(".", 2)[2] for name in state_of() if name.startswith(f"{stack}.layers_0.")}
        for number, part in ((number, part) for number in range(depth) for part in like):
            layer = part.removesuffix(".kernel").removesuffix(".bias")
            size = next((size for name, size in sizes.items() if f"{name}._flax" in layer), None)
            norm = (head_dim,) if layer.startswith(("q_norm", "k_norm")) else (dim,)
            shapes[f"{stack}.layers_{number}.{part}"] = norm if size is None else size[1:] if part.endswith(".bias") else size
    found = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        found[name] = 1 + 0.1 * drawn if "rmsnorm" in name else drawn * (shape[-2] ** -0.5 if len(shape) > 1 else 0.1)
    return found
