"""The features that a denoiser is aligned with, beside those of the encoder called directly."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from efficientnet_lite_pytorch import EfficientNet

from microdit.data.pixels import to_tensor
from microdit.data.sources.builtin import emoji_images
from microdit.encoders.vision import CELL, efficientnet_file, feature_grid, load_vision_encoder
from microdit.errors import UserError

MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY = {
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, image_size=56, patch_size=14)),
    "dinov2-registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SIZES, image_size=56, patch_size=14, num_register_tokens=4)
    ),
    "dinov3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**SIZES, image_size=64, patch_size=16, num_register_tokens=4)
    ),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, image_size=64, patch_size=16)),
}


def save(folder, kind: str):
    torch.manual_seed(0)
    model = TINY[kind]().eval()
    with torch.no_grad():
        for weight in model.parameters():  # fresh embeddings of positions and registers are nearly zero
            weight.add_(torch.randn_like(weight) * 0.05)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def emoji() -> torch.Tensor:
    return torch.stack([to_tensor(row.image, 64) for row, _ in zip(emoji_images("held_out"), range(3), strict=False)])


def enlarged(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True)


@torch.no_grad()
def test_efficientnets_are_its_last_map_averaged_to_the_grid(emoji):
    """At 64 px the grid is 4 x 4; eight of its own cells a side are the next multiple from the seven of 224 px on."""
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(efficientnet_file(), weights_only=True))
    maps = model.eval().extract_features(((enlarged(emoji, 256, 256) + 1) / 2 - MEAN) / DEVIATION)
    assert maps.shape == (3, 1280, 8, 8)
    found = load_vision_encoder("efficientnet").encode(emoji)
    assert found.shape == (3, 1280, 4, 4)
    assert torch.allclose(found, maps.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean(dim=(3, 5)), atol=1e-4)
    assert found.std(dim=(2, 3)).mean() > 0.1  # places differ


@torch.no_grad()
@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 64), (256, 256)])
def test_a_transformers_are_its_patch_tokens_averaged_to_the_grid(tmp_path, kind, height, width):
    model = save(tmp_path, kind)
    patch, images = model.config.patch_size, torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    rows, columns = height // CELL, width // CELL
    times = {(64, 64): 4, (32, 64): 8, (256, 256): 1}[height, width]  # so that the shorter side has 16 patches
    inputs = enlarged(images, rows * times * patch, columns * times * patch)
    inputs = inputs if kind == "siglip" else ((inputs + 1) / 2 - MEAN) / DEVIATION
    more = {"interpolate_pos_encoding": True} if kind == "siglip" else {}
    tokens = model(inputs, **more).last_hidden_state
    first = {"dinov2": 1, "dinov2-registers": 5, "dinov3": 5, "siglip": 0}[kind]
    maps = tokens[:, first:].transpose(1, 2).reshape(2, 32, rows, times, columns, times).mean(dim=(3, 5))
    found = load_vision_encoder(str(tmp_path)).encode(images)
    assert torch.allclose(found, maps, atol=1e-4)
    assert found.shape == (2, 32, *feature_grid(height, width))


def test_a_place_of_the_grid_tells_of_that_place_of_the_image(emoji):
    """Where the right half of an image changes, its features do more than those of the left one, and those farthest from it least."""
    encoder = load_vision_encoder("efficientnet")
    other = emoji.clone()
    other[:, :, :, 32:] = emoji.roll(1, dims=0)[:, :, :, 32:]
    left, right = (encoder.encode(emoji) - encoder.encode(other)).square().sum(dim=(0, 1, 2)).split(2)
    assert right.sum() > 1.5 * left.sum()
    assert right.min() > 3 * left[0]


def test_names_and_fingerprints_are_those_of_the_weights(tmp_path):
    save(tmp_path / "one", "dinov2")
    first = load_vision_encoder(str(tmp_path / "one"))
    assert (first.name, first.channels) == (str(tmp_path / "one"), 32)
    model = save(tmp_path / "two", "dinov2")
    assert load_vision_encoder(str(tmp_path / "two")).fingerprint == first.fingerprint
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path / "two")
    assert load_vision_encoder(str(tmp_path / "two")).fingerprint != first.fingerprint


def test_an_encoder_computes_in_its_dtype_and_returns_float32(tmp_path, emoji):
    save(tmp_path, "dinov2")
    for name in ("efficientnet", str(tmp_path)):
        exact, rough = load_vision_encoder(name).encode(emoji), load_vision_encoder(name).to("cpu", torch.bfloat16).encode(emoji)
        assert rough.dtype == torch.float32
        assert 0 < (exact - rough).norm() < 0.2 * exact.norm()
        assert load_vision_encoder(name).to("cpu", torch.float16).encode(emoji).equal(exact)  # it would overflow


def test_what_is_no_vision_encoder_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"There is no vision encoder in dino: no such folder. Take efficientnet, a folder, or a hub id"):
        load_vision_encoder("dino")
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config.json has model_type bert, and a vision encoder is one of dinov2, .*siglip"):
        load_vision_encoder(str(tmp_path))


def test_a_grid_has_a_cell_for_16_pixels_and_at_least_one():
    assert feature_grid(256, 512) == (16, 32)
    assert feature_grid(40, 8) == (2, 1)
