import pytest
import torch

from microdit.data.pixels import to_image, to_tensor
from microdit.data.sources.builtin import emoji_images
from microdit.evaluation.features import EfficientNetFeatures
from microdit.evaluation.recognition import retrieval, spread_ids


def test_the_right_picture_itself_is_found_and_noise_is_at_chance():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(1000, 32, generator=generator)
    right = torch.arange(500)
    assert retrieval(pictures[:500] * 3, pictures, right).top_1 == 1.0
    noise = retrieval(torch.randn(500, 32, generator=generator), pictures, right)
    assert noise.chance_top_10 == 0.01
    assert noise.top_10 == pytest.approx(0.01, abs=0.015)


def test_ranks_are_counted():
    pictures = torch.eye(12)
    generated = torch.stack([pictures[3] + 2 * pictures[7], pictures[:11].sum(dim=0) - pictures[0] * 0.5])
    found = retrieval(generated, pictures, torch.tensor([3, 0]))
    assert (found.top_1, found.top_10) == (0.0, 0.5)  # second of 12; and eleventh of 12


def test_captions_are_spread_over_all():
    ids = spread_ids(100, 5).tolist()
    assert ids == [0, 25, 50, 74, 99]
    assert spread_ids(3, 10).tolist() == [0, 1, 2]
    assert spread_ids(37_000_000, 3).tolist() == [0, 18_500_000, 36_999_999]  # more than float32 can count


def test_features_see_what_a_picture_shows():
    """A picture made smaller and larger again is still nearest to itself."""
    network = EfficientNetFeatures()
    images = [row.image for row, _ in zip(emoji_images("held_out"), range(24), strict=False)]
    blurred = [to_image(to_tensor(image, 40)) for image in images]
    features = network(images)
    assert features.shape == (24, 1280)
    assert retrieval(network(blurred), features, torch.arange(24)).top_1 > 0.9
