"""Encoders' FLOPs against PyTorch's counter on the real architectures; bytes against docs/storage.md."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from microdit.config.load import load_recipe, load_recipes
from microdit.config.recipes import RECIPES
from microdit.planning.estimate import clip_h_text_flops, encoding_cost, sdxl_encoder_flops
from microdit.planning.hardware import named_chip
from microdit.planning.workload import KnownShapes, shapes_of
from tests.planning.test_workload_bill import PUBLISHED, machine


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (256, 256), (512, 256)])
def test_the_autoencoders_formula_is_what_pytorch_counts(height, width):
    with torch.device("meta"):
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
        found = counted(lambda: model.encode(torch.zeros(1, 3, height, width)))
    assert found == sdxl_encoder_flops(height // 8, width // 8)


def test_the_text_towers_formula_is_what_pytorch_counts():
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16))
        found = counted(lambda: model(torch.zeros(1, 77, dtype=torch.long)))
    assert found == clip_h_text_flops(77)


def test_bytes_are_those_that_were_measured():
    """docs/storage.md, at 25 tokens."""
    found = encoding_cost([shapes_of(recipe) for recipe in load_recipes(PUBLISHED, None).values()], machine(), 37_000_000)
    assert found.bytes_per_sample == {"fp16": 92_184, "int8": 46_170}
    assert found.images == 37_000_000
    assert not found.encoded


def test_each_resolution_is_encoded_once_and_captions_too():
    recipes = list(load_recipes(PUBLISHED, None).values())
    both, low = (encoding_cost([shapes_of(recipe) for recipe in some], machine(), 1000) for some in (recipes, recipes[:2]))
    assert low.flops_per_sample == sdxl_encoder_flops(32, 32) + clip_h_text_flops(77)
    assert both.flops_per_sample == low.flops_per_sample + sdxl_encoder_flops(64, 64)
    assert both.dollars == pytest.approx(1000 * both.flops_per_sample / (989.4e12 * 0.25) / 3600 * 2.5)


def test_float32_costs_what_it_costs_on_the_chip():
    shapes = [shapes_of(recipe) for recipe in load_recipes(PUBLISHED, None).values()]
    h100 = encoding_cost(shapes, machine(), 1000)
    assert list(h100.hours_by_dtype) == ["bfloat16", "float32"]
    assert h100.gpu_hours == h100.hours_by_dtype["bfloat16"] == pytest.approx(h100.hours_by_dtype["float32"] / 2)
    old = encoding_cost(shapes, replace(machine(), chip=named_chip("t4")), 1000)
    assert old.gpu_hours == old.hours_by_dtype["float32"] == pytest.approx(1000 * old.flops_per_sample / (8.1e12 * 0.25) / 3600)


def test_other_encoders_are_not_guessed():
    recipe = load_recipe(RECIPES / "microdit-tiny" / "1-256-masked.yaml", ["data.autoencoder=16ch"])
    shapes = shapes_of(recipe, KnownShapes(caption_tokens=100))
    assert (shapes.latent_channels, shapes.caption_tokens) == (16, 100)
    assert encoding_cost([shapes], machine(), None).gpu_hours is None
