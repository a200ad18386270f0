import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from microdit.data.images import fit
from microdit.distributed import World, start_world
from microdit.evaluation import extraction
from microdit.evaluation.extraction import Features, extract


class MeanColours:
    """A network as simple as they come: its features can be computed by hand. Counts what it sees."""

    resize = "none"

    def __init__(self, fingerprint: str = "1"):
        self.name, self.fingerprint, self.seen = "mean colours", fingerprint, 0

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        self.seen += len(images)
        return torch.stack([torch.from_numpy(np.asarray(image, dtype=np.float32)).mean(dim=(0, 1)) for image in images])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(extraction, "BLOCK", 4)


@pytest.fixture(scope="module")
def world() -> World:
    return start_world("cpu")


def picture(seed: int, width: int = 20, height: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def extracted(network: MeanColours, contents: list[bytes], folder: Path, world: World, side: int | None = None) -> tuple[Features, list]:
    warnings: list[str] = []
    return extract(network, iter(contents), side, folder, world, warnings.append), warnings


def test_features_come_in_the_order_of_the_pictures_cut_to_squares(tmp_path, world):
    images = [picture(seed) for seed in range(10)]
    found, _ = extracted(MeanColours(), [png(image) for image in images], tmp_path, world, side=8)
    expected = torch.stack([torch.from_numpy(fit(image, 8, 8).astype(np.float32)).mean(dim=(0, 1)) for image in images])
    assert torch.equal(found.features_ND, expected)
    assert found.numbers_N.tolist() == list(range(10))
    assert (found.total, found.left_out, found.enlarged) == (10, 0, 0)


def test_what_cannot_be_read_is_left_out_and_counted_and_what_is_small_is_counted(tmp_path, world):
    contents = [png(picture(0)), b"", png(picture(1, 5, 5)), b"no picture", png(picture(2)), png(picture(3))]
    found, _ = extracted(MeanColours(), contents, tmp_path, world, side=8)
    assert found.numbers_N.tolist() == [0, 2, 4, 5]
    assert (found.total, found.left_out, found.enlarged) == (6, 2, 1)
    nothing, _ = extracted(MeanColours(), [b"", b"x"] * 3, tmp_path, world)
    assert (len(nothing.features_ND), nothing.left_out) == (0, 6)


def test_nothing_is_seen_twice_and_nothing_changed_is_taken_for_the_same(tmp_path, world):
    contents = [png(picture(seed)) for seed in range(10)]
    first = MeanColours()
    found, _ = extracted(first, contents, tmp_path, world)
    assert first.seen == 10
    again = MeanColours()
    assert torch.equal(extracted(again, contents, tmp_path, world)[0].features_ND, found.features_ND)
    assert again.seen == 0
    changed = MeanColours()
    other, _ = extracted(changed, [*contents[:9], png(picture(99))], tmp_path, world)
    assert changed.seen == 2  # its block alone: 9 and 10 of 10 pictures
    assert other.fingerprint != found.fingerprint
    for network, side in ((MeanColours("2"), None), (MeanColours(), 8)):
        extracted(network, contents, tmp_path, world, side)
        assert network.seen == 10


def test_who_was_stopped_goes_on(tmp_path, world):
    """After two blocks the third cannot be computed; the next call computes that one only."""

    class Dying(MeanColours):
        def __call__(self, images: list[Image.Image]) -> torch.Tensor:
            if self.seen == 8:
                raise KeyboardInterrupt
            return super().__call__(images)

    contents = [png(picture(seed)) for seed in range(12)]
    with pytest.raises(KeyboardInterrupt):
        extracted(Dying(), contents, tmp_path, world)
    rest = MeanColours()
    assert len(extracted(rest, contents, tmp_path, world)[0].features_ND) == 12
    assert rest.seen == 4


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-3] + b"abc", lambda content: b""])
def test_a_damaged_block_is_said_to_be_and_computed_again(tmp_path, world, damage):
    contents = [png(picture(seed)) for seed in range(8)]
    found, _ = extracted(MeanColours(), contents, tmp_path, world)
    block = sorted(tmp_path.iterdir())[0]
    block.write_bytes(damage(block.read_bytes()))
    network = MeanColours()
    again, warnings = extracted(network, contents, tmp_path, world)
    assert torch.equal(again.features_ND, found.features_ND)
    assert network.seen == 4
    assert len(warnings) == 1
    assert "is damaged" in warnings[0]
    assert "computed again" in warnings[0]
