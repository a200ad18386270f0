"""Photographs without an autoencoder: encoded as pixels, trained by the bundled recipe, sampled."""

from pathlib import Path

from microdit.api import encode_dataset, sample, train
from microdit.config.load import load_recipe
from microdit.diffusion.flow import Flow
from microdit.pipelines.settings import SamplerSettings
from microdit.reports.run_folder import RunFolder
from tests.data.pictures import write_photographs


def test_the_recipe_for_photographs_trains_on_pixels_and_samples(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photographs(tmp_path / "photos", 8)
    encoded = encode_dataset("photos", "data/photographs", autoencoder="pixels", device="cpu")
    assert encoded.latent_shape() == (3, 64, 64)
    assert not (tmp_path / "data" / "photographs" / "reconstructions.png").exists()  # pixels lose nothing
    short = ["phases.0.steps=3", "phases.0.batch_size=4", "phases.1.steps=3", "phases.1.batch_size=4", "phases.0.warmup_steps=0"]
    recipe = load_recipe("photographs", [*short, "model.depth=2", "record.metrics_every=1", "engine.device=cpu"])
    run = train(recipe)
    losses = [line["loss"] for line in RunFolder(run).read_metrics()[0]]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    [image] = sample(run, "a portrait", SamplerSettings(num_inference_steps=2), device="cpu")
    assert image.size == (64, 64)
    recorded = load_recipe(run / "recipe.yaml").diffusion
    assert (recorded.objective, recorded.sigma_data) == (Flow.__name__.lower(), None)
