"""The page of `microdit explain`: its pictures show what was kept, taken and attended to."""

import base64
import io
import re

import pytest
import torch
from PIL import Image

from microdit.models.config import Size, resolve
from microdit.models.flops import forward_flops, parts_of_forward
from microdit.models.routing import METHODS
from microdit.pipelines.explain_page import _Canvas, _enlarged, _kept
from microdit.pipelines.pipeline import DEMO
from tests.commands import microdit


def pixels(address: str) -> torch.Tensor:
    image = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])), formats=["PNG"])
    return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def test_patches_are_as_clear_as_their_share():
    image = Image.new("RGB", (8, 8), (255, 0, 0))
    canvas = _Canvas(_enlarged(image, 2, 4), 2, 4)
    assert canvas.image.size == (256, 256)
    shown = pixels(canvas.shaded(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0.5])))
    centres = shown[64::128, 32::64]  # of 2 x 4 patches
    assert centres[0, 0].tolist() == [255, 0, 0]
    assert centres[1, 3].tolist() == [203, 52, 52]  # 128 + (255 - 128) * 0.59
    assert centres[0, 1].tolist() == [151, 105, 105]
    assert (shown[128, :, 0] == 128).all()  # the grid


@pytest.mark.parametrize(("ratio", "kept"), [(0.25, 12), (0.5, 8), (0.75, 4)])
def test_as_many_patches_are_kept_as_in_training(ratio, kept):
    share_T = _kept(16, ratio, seed=3)
    assert share_T.sum() == kept
    assert share_T.equal(_kept(16, ratio, seed=3))


@pytest.mark.parametrize("attention", ["cross", "joint"])
@pytest.mark.parametrize("routing", METHODS)
def test_the_parts_are_the_whole(routing, attention):
    method = METHODS[routing]
    dense = (1, 1) if method.drop == "blocks" else None
    decoder = 2 if method.decoder else None
    size = Size(
        32, 4, 8, 16, 1, num_experts=4, round_ffn_to=8, routing=routing, attention=attention, dense_blocks=dense, decoder_depth=decoder
    )
    config = resolve(size, caption_channels=12)
    parts = parts_of_forward(config, 64, 16, 7)
    assert sum(parts.values()) == forward_flops(config, 64, 16, 7)
    assert all(count > 0 for count in parts.values())
    assert ("decoder" in parts) == bool(method.decoder)


def test_the_page_shows_a_prompt_of_the_demo_model(tmp_path):
    prompt = "red <b>heart</b>"
    out = microdit("explain", str(DEMO), prompt, "--out", "page.html", "--device", "cpu", cwd=tmp_path).output
    assert "page.html shows what" in " ".join(out.split())
    page = (tmp_path / "page.html").read_text()
    assert "red &lt;b&gt;heart&lt;/b&gt;" in page
    assert "<b>heart" not in page
    assert len(re.findall(r"data:image/png", page)) == 2 + 4 + 4  # image and patches, ratios, (start) red heart (end)
    assert "This model has no experts" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_a_name_that_is_no_page_is_refused(tmp_path):
    result = microdit("explain", str(DEMO), "owl", "--out", "page.png", cwd=tmp_path)
    assert "and a page needs a name such as explain.html" in " ".join(result.output.split())
    assert not (tmp_path / "page.png").exists()
