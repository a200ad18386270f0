import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from microdit.data.images import to_image, to_tensor


@given(width=st.integers(1, 60), height=st.integers(1, 60), size=st.integers(1, 40))
def test_any_picture_becomes_a_square(width, height, size):
    pixels = to_tensor(Image.new("RGB", (width, height), (255, 0, 127)), size)
    assert pixels.shape == (3, size, size)
    assert torch.allclose(pixels[:, 0, 0], torch.tensor([1.0, -1.0, 127 / 127.5 - 1]), atol=1e-6)


def test_every_grey_level_survives_the_way_there_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels] * 3, axis=-1))
    assert np.array_equal(np.asarray(to_image(to_tensor(image, 16))), np.asarray(image))


def test_the_centre_is_kept():
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    assert to_tensor(image, 10).min() == pytest.approx(1)
