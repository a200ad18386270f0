"""Small real things that many tests share."""

from pathlib import Path

import pytest
import torch

from microdit.data.encode import encode_rows
from microdit.data.sources import emoji_rows
from microdit.encoders.autoencoder import Pixels
from microdit.encoders.text import MiniLM
from microdit.model.microdit import MicroDiT
from microdit.model.sizes import Size, resolve

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def official_fixture() -> Path:
    """Numbers made by the authors' own code."""
    return FIXTURES / "official_a.safetensors"


@pytest.fixture
def tiny_model() -> MicroDiT:
    """A whole MicroDiT (mixer narrower than the backbone, experts, width scaling) with weights that are nowhere zero, in float64."""
    return busy_model(Size(dim=32, depth=4, head_dim=8, mixer_dim=16, mixer_depth=2, num_experts=4, round_ffn_to=8))


def busy_model(size: Size, **settings: int | float | bool) -> MicroDiT:
    """Fresh weights start at zero in places; these do not, so that every part does something."""
    settings = {"caption_channels": 12, "patch_size": 2, **settings}
    generator = torch.Generator().manual_seed(0)
    model = MicroDiT(resolve(size, **settings)).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model


@pytest.fixture(scope="session")
def text_encoder() -> MiniLM:
    return MiniLM()


@pytest.fixture(scope="session")
def encoded_emoji(tmp_path_factory: pytest.TempPathFactory, text_encoder: MiniLM) -> Path:
    """40 emoji as 16 x 16 pixels with their MiniLM captions, encoded by the real code."""
    out = tmp_path_factory.mktemp("encoded") / "emoji"
    rows = [row for row, _ in zip(emoji_rows("train"), range(40), strict=False)]
    encode_rows(rows, out, "emoji/train", 16, Pixels(), text_encoder)
    return out
