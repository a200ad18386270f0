"""Quality measured against an encoded set alone, without the images and the text encoder."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from microdit.data.dataset import EncodedDataset
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.pixels import to_image
from microdit.data.sources.builtin import emoji_source
from microdit.distributed import start_world
from microdit.encoders.autoencoder import load_autoencoder
from microdit.evaluation.features import EfficientNetFeatures, PixelFeatures
from microdit.evaluation.metrics.frechet import fit_gaussian, sample_distance
from microdit.evaluation.picture_classifier import trained_classifier
from microdit.evaluation.recognition import retrieval
from microdit.io.console import QUIET
from microdit.lab.quality import QualityEvaluator, _SourceReferences
from microdit.lab.study import ReferenceArm, Study
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.settings import SamplerSettings
from tests.commands import microdit
from tests.conftest import first_of

STUDY = Study("s", "?", source="encoded", reference=ReferenceArm("a", 1), arms={"a": []}, pictures=12, num_inference_steps=3)


@pytest.fixture(scope="module")
def measured(workplace, text_encoder):
    """A short run on a set in 16 bits, what the lab measures of it, and the folder of both."""
    source = first_of(emoji_source("held_out"), 40)
    settings = EncodeSettings((64,), "fp16", "fp16")
    encode_source(source, workplace / "data/exact", settings, load_autoencoder("icon"), text_encoder)
    recipe = "name: r\ndata: {path: data/exact}\nmodel: {dim: 32, depth: 2, head_dim: 8, mixer_dim: 32, mixer_depth: 1, num_experts: 0}\n"
    (workplace / "exact.yaml").write_text(
        recipe + "phases: [{name: all, steps: 3, batch_size: 4, learning_rate: 1e-3}]\nema: [{decay: 0.9}]"
    )
    trained = microdit("train", "exact.yaml", "--out", "runs/exact", cwd=workplace)
    assert trained.returncode == 0, trained.output
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
        patch.setattr("microdit.encoders.text.MiniLM.__init__", lambda *_: pytest.fail("the text encoder is not needed"))
        data = EncodedDataset(workplace / "data/exact")
        evaluator = QualityEvaluator(STUDY, data, start_world("cpu"), QUIET)
        found = evaluator.measure(workplace / "runs/exact", str(workplace / "data/exact"))
        again = QualityEvaluator(STUDY, data, start_world("cpu"), QUIET).measure(workplace / "runs/exact", str(workplace / "data/exact"))
    assert len(list((workplace / "cache/microdit/features").glob("encoded-*.safetensors"))) == 1
    assert again[0] == found[0]  # from the cache
    return workplace, data, *found


def test_images_of_stored_captions_are_those_of_their_text(measured):
    workplace, data, _, strip, captions = measured
    rows = torch.linspace(0, len(data) - 1, 12, dtype=torch.float64).round().long().tolist()
    texts = [data.column("captions")[row][0] for row in rows]
    images = MicroDiTPipeline.from_pretrained(workplace / "runs/exact").generate(texts, SamplerSettings(3, 2.0))
    shown = [texts.index(caption) for caption in captions]
    assert shown == sorted(set(shown))
    assert len(shown) == 8
    for index, image in zip(shown, strip, strict=True):
        apart = np.abs(np.asarray(image, dtype=float) - np.asarray(images[index], dtype=float))
        assert apart.max() <= 3  # captions were rounded to 16 bits
    assert len({image.tobytes() for image in strip}) == 8


def test_the_distance_is_to_the_decoded_rows(measured):
    workplace, data, metrics, _, _ = measured
    autoencoder, network = load_autoencoder("icon"), EfficientNetFeatures()
    latents = data.latents([data.read(0, row)[0] for row in range(len(data))], 0)
    pixels = ((autoencoder.decode(latents).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    real = network([Image.fromarray(image) for image in pixels])
    rows = torch.linspace(0, len(data) - 1, 12, dtype=torch.float64).round().long().tolist()
    texts = [data.column("captions")[row][0] for row in rows]
    drawn = network(MicroDiTPipeline.from_pretrained(workplace / "runs/exact").generate(texts, SamplerSettings(3, 2.0)))
    assert metrics.frechet_distance == pytest.approx(sample_distance(drawn, fit_gaussian(real)), rel=0.01)
    assert metrics.held_out_loss > 0


def test_further_judges_measure_the_same_images_against_the_same_rows(measured, monkeypatch):
    """Beside the judges called directly on the decoded rows and the images of the same captions and noise."""
    workplace, data, metrics, _, _ = measured
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    study = replace(STUDY, judges=["pixels", "classifier"])
    found, _, _ = QualityEvaluator(study, data, start_world("cpu"), QUIET).measure(workplace / "runs/exact", str(workplace / "data/exact"))
    assert {name: value for name, value in found.by_name().items() if name in metrics.by_name()} == metrics.by_name()
    assert list(found.judged) == ["recognised_pixels", "frechet_distance_classifier", "recognised_classifier"]
    autoencoder = load_autoencoder("icon")
    latents = data.latents([data.read(0, row)[0] for row in range(len(data))], 0)
    real = [to_image(pixels) for pixels in autoencoder.decode(latents)]
    rows = torch.linspace(0, len(data) - 1, 12, dtype=torch.float64).round().long()
    texts = [data.column("captions")[row][0] for row in rows.tolist()]
    drawn = MicroDiTPipeline.from_pretrained(workplace / "runs/exact").generate(texts, SamplerSettings(3, 2.0))
    classifier = trained_classifier(real)
    assert found.judged["recognised_pixels"] == retrieval(PixelFeatures()(drawn), PixelFeatures()(real), rows).top_10
    assert found.judged["recognised_classifier"] == pytest.approx(retrieval(classifier(drawn), classifier(real), rows).top_10, abs=0.1)
    distance = sample_distance(classifier(drawn), fit_gaussian(classifier(real)))
    assert found.judged["frechet_distance_classifier"] == pytest.approx(distance, rel=0.02)


def test_captions_are_those_of_the_images_that_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "green"), ("c", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{colour} square")
    (folder / "b.png").write_bytes(b"no image")
    study = Study("s", "?", source=str(folder), reference=ReferenceArm("a", 1), arms={"a": []}, pictures=3)
    references = _SourceReferences(study, 64, EfficientNetFeatures(), start_world("cpu"), QUIET)
    assert references._captions == ["red square", "blue square"]
    assert references.right_N.tolist() == [0, 1]
    assert len(references.features_MD) == 2
    assert [image.getpixel((32, 32)) for image in references.images()] == [(255, 0, 0), (0, 0, 255)]
    assert references.features(PixelFeatures()).equal(PixelFeatures()(references.images()))
