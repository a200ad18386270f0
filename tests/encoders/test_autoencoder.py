import json

import pytest
import torch
from diffusers import AutoencoderTiny

from microdit.encoders.autoencoder import BUNDLED_ICON, load_autoencoder
from microdit.errors import UserError
from microdit.training.train_autoencoder import AutoencoderSettings, load_emoji, reconstruction_figures, train_icon_autoencoder
from tests.damage import flips


@pytest.mark.parametrize("splits", [["held_out"], pytest.param(["train", "held_out"], marks=pytest.mark.slow)])
def test_the_bundled_autoencoder_rebuilds_pictures_as_its_record_says(splits):
    model = AutoencoderTiny.from_pretrained(BUNDLED_ICON, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    figures = reconstruction_figures(model, 64, splits)
    record = json.loads((BUNDLED_ICON / "record.json").read_text())
    for name, value in figures.items():
        assert value == pytest.approx(record["figures"][name], rel=0.01), name  # the record was made before rounding to float16
    assert figures["held_out_psnr_db"] > 23
    assert sum(path.stat().st_size for path in BUNDLED_ICON.iterdir()) < 4e6


def test_latents_are_small_and_as_wide_as_sigma_data():
    autoencoder = load_autoencoder("icon")
    latents = autoencoder.encode(load_emoji("held_out", 64))
    assert latents.shape[1:] == (8, 8, 8)
    assert latents.std().item() == pytest.approx(0.9, abs=0.05)
    assert autoencoder.decode(latents).shape[1:] == (3, 64, 64)


def test_pixels_are_themselves():
    images = torch.rand(2, 3, 8, 8)
    pixels = load_autoencoder("pixels")
    assert torch.equal(pixels.decode(pixels.encode(images)), images)


def test_an_autoencoder_trained_here_is_loaded_from_its_folder(tmp_path):
    losses = []
    settings = AutoencoderSettings(width=8, latent_channels=4, image_size=32, steps=30, batch_size=8)
    figures = train_icon_autoencoder(tmp_path / "ae", settings, lambda step, metrics: losses.append(metrics["loss"]))
    assert len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5])
    assert json.loads((tmp_path / "ae" / "record.json").read_text())["figures"] == figures
    autoencoder = load_autoencoder(str(tmp_path / "ae"))
    images = load_emoji("held_out", 32)[:4]
    latents = autoencoder.encode(images)
    assert latents.shape == (4, 4, 4, 4)
    assert autoencoder.decode(latents).shape == images.shape
    assert autoencoder.fingerprint != load_autoencoder("icon").fingerprint
    config = tmp_path / "ae" / "config.json"
    for _ in flips(config, [config.read_bytes().index(b'"scaling_factor": ') + 20]):  # their fingerprint is the weights' alone
        with pytest.raises(UserError, match=r"ae is damaged \(config\.json: not what was written\)"):
            load_autoencoder(str(tmp_path / "ae"))
    for _ in flips(tmp_path / "ae" / "record.json", [500]):
        with pytest.raises(UserError, match=r"record\.json does not match"):
            load_autoencoder(str(tmp_path / "ae"))


def test_a_folder_without_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="There is no autoencoder in"):
        load_autoencoder(str(tmp_path))
