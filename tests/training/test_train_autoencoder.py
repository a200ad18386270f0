"""Autoencoders trained on a source: better for its pictures, resumed exactly, and refused in sentences."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from microdit.data.pixels import normalise
from microdit.data.sources.open import open_source
from microdit.encoders.autoencoder import load_autoencoder
from microdit.errors import UserError
from microdit.evaluation.reconstruction import reconstruct
from microdit.io.console import QUIET, Reporter
from microdit.training.train_autoencoder import (
    PERCEPTUAL_WEIGHT,
    RATE_FROM_WEIGHTS,
    STATE,
    AutoencoderSettings,
    load_pictures,
    train_on_source,
)
from tests.commands import microdit
from tests.data.pictures import photographs, write_file, write_photographs

SMALL = AutoencoderSettings(width=8, latent_channels=4, image_size=32, steps=8, batch_size=4, perceptual_weight=0.1)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photos"), 24, 64)


def test_the_icon_autoencoder_trained_on_photographs_makes_them_better(photos, tmp_path):
    settings = AutoencoderSettings(steps=20, batch_size=8, learning_rate=RATE_FROM_WEIGHTS, perceptual_weight=PERCEPTUAL_WEIGHT)
    figures = train_on_source(open_source(str(photos)), tmp_path / "ae", settings, "icon")
    before, after = (reconstruct(load_autoencoder(name), photographs(24, 64), 64) for name in ("icon", str(tmp_path / "ae")))
    assert after.figures()["psnr_db"] > before.figures()["psnr_db"] + 0.2
    assert after.figures()["perceptual_distance"] < before.figures()["perceptual_distance"] - 0.02
    record = json.loads((tmp_path / "ae" / "record.json").read_text())
    assert record["from"]["name"] == "icon"
    assert record["settings"]["width"] == 32
    assert record["figures"] == figures
    assert figures["trained_pictures"] == 23
    autoencoder = load_autoencoder(str(tmp_path / "ae"))
    pixels = load_pictures(open_source(str(photos)), 64)
    latents = autoencoder.encode(normalise(pixels))
    assert latents.std().item() == pytest.approx(0.9, abs=0.05)
    with Image.open(tmp_path / "ae" / "reconstructions.png") as image:
        assert json.loads(image.text["reconstructions"]) == figures["held_out"]
    assert {path.name for path in (tmp_path / "ae").iterdir()} == {"config.json", WEIGHTS, "reconstructions.png", "record.json"}


class Interrupts(Reporter):
    """Interrupts the training at a step, as Ctrl-C does."""

    def __init__(self, at: int):
        super().__init__()
        self.at = at

    @contextmanager
    def progress(self, name, total):
        done = 0

        def advance(count, note=""):
            nonlocal done
            done += count
            if total is not None and done >= self.at:
                raise KeyboardInterrupt

        yield advance


@pytest.mark.parametrize("start", [None, "small"])
def test_an_interrupted_training_goes_on_to_the_same_weights(photos, tmp_path, monkeypatch, start):
    monkeypatch.setattr("microdit.training.train_autoencoder.STATE_EVERY", 3)
    source = open_source(str(photos))
    if start:
        train_on_source(source, tmp_path / start, SMALL)
        start = str(tmp_path / start)
    train_on_source(source, tmp_path / "whole", SMALL, start)
    with pytest.raises(KeyboardInterrupt):
        train_on_source(source, tmp_path / "broken", SMALL, start, reporter=Interrupts(5))
    assert [path.name for path in (tmp_path / "broken").iterdir()] == [STATE]
    with pytest.raises(UserError, match="There is no autoencoder in"):
        load_autoencoder(str(tmp_path / "broken"))
    other = AutoencoderSettings(**{**SMALL.__dict__, "steps": 9})
    with pytest.raises(UserError, match=r"started otherwise \(steps differ\): repeat its command"):
        train_on_source(source, tmp_path / "broken", other, start)
    train_on_source(source, tmp_path / "broken", SMALL, start)
    whole, resumed = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "broken"))
    assert all(tensor.equal(resumed[name]) for name, tensor in whole.items())
    logs = [json.loads((tmp_path / name / "record.json").read_text())["log"] for name in ("whole", "broken")]
    assert logs[0] == logs[1]


def test_what_cannot_be_trained_is_a_sentence(photos, tmp_path):
    source = open_source(str(photos))
    with pytest.raises(UserError, match="only icon and what train-autoencoder wrote can be trained on"):
        train_on_source(source, tmp_path / "ae", SMALL, "pixels")
    with pytest.raises(UserError, match="Images of 30 pixels do not divide"):
        train_on_source(source, tmp_path / "ae", AutoencoderSettings(image_size=30))
    write_file(tmp_path / "few" / "0.png", b"no picture")
    write_file(tmp_path / "few" / "0.txt", b"caption")
    with pytest.raises(UserError, match="has 0 usable pictures, and training needs two or more"):
        train_on_source(open_source(str(tmp_path / "few")), tmp_path / "ae", SMALL)
    (tmp_path / "ae").mkdir(exist_ok=True)
    (tmp_path / "ae" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an autoencoder already"):
        train_on_source(source, tmp_path / "ae", SMALL)


def test_pictures_that_cannot_be_used_are_counted(photos, tmp_path):
    folder = write_photographs(tmp_path / "set", 3)
    photographs(1, 16)[0].save(folder / "small.png")
    (folder / "small.txt").write_text("too small")
    told: list[str] = []
    reporter = Reporter()
    reporter.say = lambda sentence: told.append(str(sentence))
    assert load_pictures(open_source(str(folder)), 32, reporter).shape == (3, 32, 32, 3)
    assert "3 pictures of" in told[0]
    assert "1 rejected: a side is shorter than 32 pixels" in told[0]


def test_without_the_features_the_loss_has_no_perceptual_term(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    figures = train_on_source(open_source(str(photos)), tmp_path / "ae", SMALL, reporter=QUIET)
    assert json.loads((tmp_path / "ae" / "record.json").read_text())["settings"]["perceptual_weight"] == 0.0
    assert figures["held_out"]["perceptual_distance"] is None


def test_the_command_makes_what_encode_takes(tmp_path):
    write_photographs(tmp_path / "photos", 6, 32)
    options = ["--steps", 2, "--latent-channels", 4, "--resolution", 32, "--device", "cpu"]
    trained = microdit("train-autoencoder", "photos", *options, "--out", "ae", cwd=tmp_path)
    assert trained.returncode == 0, trained.output
    encoding = ["--autoencoder", "ae", "--resolutions", 32, "--device", "cpu", "--workers", 0]
    encoded = microdit("data", "encode", "photos", "--out", "set", *encoding, cwd=tmp_path)
    assert encoded.returncode == 0, encoded.output
    assert "6 of 6 records kept" in encoded.output
    refused = microdit("train-autoencoder", "--from", "icon", "--out", "other", cwd=tmp_path)
    assert refused.returncode == 1
    assert "--from is for training on a source" in " ".join(refused.output.split())
