import subprocess
import sys

import numpy as np
import torch
from PIL import Image

from microdit.data.pixels import to_image, to_tensor


def test_every_grey_level_survives_the_way_there_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels] * 3, axis=-1))
    assert np.array_equal(np.asarray(to_image(to_tensor(image, 16))), np.asarray(image))


def test_tensors_are_channels_first_in_minus_one_to_one():
    pixels = to_tensor(Image.new("RGB", (30, 20), (255, 0, 127)), 10, 12)
    assert pixels.shape == (3, 10, 12)
    assert torch.allclose(pixels[:, 0, 0], torch.tensor([1.0, -1.0, 127 / 127.5 - 1]), atol=1e-6)


def test_decoding_workers_start_without_torch():
    code = "import sys, microdit.data.decode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
