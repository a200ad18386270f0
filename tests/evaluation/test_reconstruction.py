import json
import sys

import pytest
import torch
from PIL import Image

from microdit.data.decode import fit
from microdit.data.pixels import to_tensor
from microdit.data.sources.builtin import emoji_images
from microdit.data.sources.open import open_source
from microdit.encoders.autoencoder import Pixels, load_autoencoder
from microdit.evaluation.reconstruction import PerceptualDistance, reconstruct, save_reconstructions
from microdit.io.console import PlainConsole, Reporter
from microdit.reports.run_folder import RECONSTRUCTIONS
from tests.data.pictures import photographs, write_photographs


@pytest.fixture(scope="module")
def icon():
    return load_autoencoder("icon")


def emoji(count: int) -> list[Image.Image]:
    return [row.image for number, row in enumerate(emoji_images("held_out")) if number % 5 == 0][:count]


def test_the_distance_is_zero_for_equal_images_and_grows_with_blur():
    images = torch.stack([to_tensor(image, 64) for image in photographs(4, 64)])
    distance = PerceptualDistance()
    blurred = [torch.nn.functional.avg_pool2d(images, size, 1, size // 2) for size in (3, 5, 9)]
    assert torch.equal(distance(images, images), torch.zeros(4))
    found = torch.stack([distance(images, worse) for worse in blurred])
    assert (found.diff(dim=0) > 0).all()
    assert torch.allclose(found[0], distance(blurred[0], images), atol=1e-5)


def test_the_distance_can_be_trained_on():
    image, target = (to_tensor(image, 64)[None] for image in photographs(2, 64))
    distance, moved = PerceptualDistance(), image.clone().requires_grad_(True)
    before = distance(moved, target)
    (gradient,) = torch.autograd.grad(before.sum(), moved)
    assert distance(image - 3 * gradient, target) < before


def test_icons_come_back_well_and_photographs_poorly(icon):
    icons, photos = reconstruct(icon, emoji(16), 64), reconstruct(icon, photographs(16, 64), 64)
    assert icons.warning() is None
    assert photos.poor >= 12
    assert f"{photos.poor} of 16 pictures are poor once they went through the autoencoder icon" in photos.warning()
    assert "The reconstructions are the ceiling: no training makes pictures better than these." in photos.warning()
    assert photos.figures()["psnr_db"] < 20 < icons.figures()["psnr_db"]
    assert icons.figures()["perceptual_distance"] < 0.4 < 0.6 < photos.figures()["perceptual_distance"]


def test_a_folder_of_both_kinds_is_warned_of(icon):
    assert reconstruct(icon, [*emoji(10), *photographs(6, 64)], 64).warning() is not None


def test_without_the_features_the_psnr_alone_decides_and_it_says_so(icon, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)  # as if it were not installed
    photos = reconstruct(icon, photographs(16, 64), 64)
    assert photos.distances is None
    assert photos.warning() is not None
    assert "no perceptual distance, which needs the package efficientnet-lite-pytorch" in photos.describe()
    assert reconstruct(icon, emoji(16), 64).warning() is None


def test_figures_are_those_of_the_pictures(icon):
    made = reconstruct(icon, emoji(3), 64)
    for picture, original, rebuilt, psnr in zip(emoji(3), made.originals, made.rebuilt, made.psnrs, strict=True):
        assert original.tobytes() == fit(picture, 64, 64).tobytes()
        decoded = icon.decode(icon.encode(to_tensor(picture, 64)[None]))[0].clamp(-1, 1)
        mse = ((decoded - to_tensor(picture, 64)) * 127.5).square().mean()
        assert psnr == pytest.approx(10 * (255**2 / mse).log10().item(), abs=1e-3)
        assert torch.allclose(to_tensor(rebuilt, 64), decoded, atol=1 / 127)


@pytest.mark.parametrize("count", [1, 5, 10, 16])
def test_the_drawing_holds_originals_above_reconstructions(icon, count):
    made = reconstruct(icon, emoji(count), 64)
    drawn = made.draw()
    rows = 2 * -(-count // 8)
    assert drawn.size[1] > rows * 128
    left, top = 8, 8 + 15 + 8
    assert drawn.crop((left, top, left + 128, top + 128)).tobytes() == made.originals[0].resize((128, 128), 0).tobytes()
    below = top + 128 + 3 * 15 + 8
    assert drawn.crop((left, below, left + 128, below + 128)).tobytes() == made.rebuilt[0].resize((128, 128), 0).tobytes()


def test_a_source_gets_its_picture_and_pixels_need_none(tmp_path, icon, capsys):
    source = open_source(str(write_photographs(tmp_path / "photos", 20)))
    reporter = Reporter(PlainConsole())
    save_reconstructions(source, tmp_path, Pixels(), 64, reporter)
    assert capsys.readouterr().out == ""
    save_reconstructions(source, tmp_path, icon, 64, reporter)
    said = " ".join(capsys.readouterr().out.split())
    assert "16 pictures through the autoencoder icon: PSNR 1" in said
    assert "the ceiling" in said
    with Image.open(tmp_path / RECONSTRUCTIONS) as image:
        figures = json.loads(image.text["reconstructions"])
    assert (figures["autoencoder"], figures["side"], figures["pictures"]) == ("icon", 64, 16)
    assert figures["perceptual_distance"] > 0.5
