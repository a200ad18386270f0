"""EDM's sigma_data, which follows from the data unless the recipe or an earlier run says otherwise."""

from pathlib import Path
from shutil import copytree

import pytest

from microdit.checkpoint import open_checkpoint
from microdit.config.load import load_recipe
from microdit.config.schema import objective_of
from microdit.data.dataset import EncodedDataset
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.manifest import MANIFEST
from microdit.distributed import start_world
from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError
from microdit.io.console import QUIET
from microdit.io.files import from_checked_json, to_checked_json
from microdit.training.multi_phase import RunSettings, train_one
from microdit.training.setup import open_dataset, with_sigma_data
from tests.data.test_latent_statistics import records, source_of

RECIPE = Path(__file__).parent / "recipe.yaml"
SHORT = ["phases.0.steps=2", "phases.1.steps=1", "record.checkpoint_every=2"]


def filled_in(*overrides: str) -> tuple[float | None, list[str]]:
    recipe = load_recipe(RECIPE, list(overrides))
    told: list[str] = []
    found = with_sigma_data(recipe, open_dataset(recipe, told.append).sets, None, told.append)
    return found.diffusion.sigma_data, told


def forget_statistics(folder: Path) -> None:
    """Make the manifest that of an earlier version."""
    manifest = from_checked_json((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(to_checked_json({key: value for key, value in manifest.items() if key != "latents"}))


def latents_of(folder: Path):
    data = EncodedDataset(folder)
    return data.latents([data.read(0, row)[0] for row in range(len(data))], 0)


def test_it_is_the_deviation_of_the_latents(encoded_emoji):
    sigma_data, told = filled_in(f"data.path={encoded_emoji}")
    assert sigma_data == pytest.approx(latents_of(encoded_emoji).std(correction=0).item(), abs=1e-3)
    assert told == []


def test_the_recipe_has_the_last_word_and_a_mismatch_is_said_once(encoded_emoji):
    sigma_data, told = filled_in(f"data.path={encoded_emoji}", "diffusion.sigma_data=2.5")
    assert sigma_data == 2.5
    [sentence] = told
    assert "sigma_data is 2.5, and the latents of" in sentence
    near = filled_in(f"data.path={encoded_emoji}")[0] * 1.19
    assert filled_in(f"data.path={encoded_emoji}", f"diffusion.sigma_data={near}") == (near, [])
    assert filled_in(f"data.path={encoded_emoji}", "diffusion={objective: flow}") == (None, [])


def test_sets_of_earlier_versions_take_the_papers(encoded_emoji, tmp_path):
    forget_statistics(copytree(encoded_emoji, tmp_path / "set"))
    assert filled_in(f"data.path={tmp_path / 'set'}") == (0.9, [])


def test_sets_of_a_mixture_count_by_their_weights(encoded_emoji, tmp_path, text_encoder):
    settings = EncodeSettings((16,), "fp16", "fp16", min_side=8)
    encode_source(source_of(records(*range(20))), tmp_path / "plain", settings, Pixels(), text_encoder)
    sets = ["data.path=null", f"data.sets.a.path={encoded_emoji}", f"data.sets.b.path={tmp_path / 'plain'}"]
    a, b = latents_of(encoded_emoji).double(), latents_of(tmp_path / "plain").double()

    def together(share: float) -> float:
        mean = (1 - share) * a.mean() + share * b.mean()
        return ((1 - share) * a.square().mean() + share * b.square().mean() - mean**2).sqrt().item()

    only_a, even = "phases.0.weights={a: 1}", "phases.1.weights={a: 1, b: 1}"  # 25 steps of 8 samples, 15 of 6
    assert filled_in(*sets, only_a, even)[0] == pytest.approx(together(45 / 290), abs=1e-3)
    assert filled_in(*sets)[0] == pytest.approx(together(20 / 60), abs=1e-3)  # by their sizes
    assert filled_in(*sets, "data.sets.b.repeat=4")[0] == pytest.approx(together(80 / 120), abs=1e-3)
    forget_statistics(tmp_path / "plain")
    assert filled_in(*sets)[0] == 0.9
    assert filled_in(*sets, only_a, "phases.1.weights={a: 1}")[0] == pytest.approx(together(0), abs=1e-3)


def train(data: Path, run: Path, *overrides: str, resume: bool = False) -> None:
    recipe = load_recipe(RECIPE, [f"data.path={data}", *SHORT, *overrides])
    train_one(recipe, run, RunSettings(resume), QUIET, start_world("cpu"))


def test_a_run_records_it_and_keeps_it_when_it_goes_on(encoded_emoji, tmp_path):
    train(encoded_emoji, tmp_path / "run")
    checkpoint = open_checkpoint(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    sigma_data = filled_in(f"data.path={encoded_emoji}")[0]
    assert checkpoint.state["edm"]["sigma_data"] == checkpoint.state["recipe"]["diffusion"]["sigma_data"] == sigma_data
    assert objective_of(load_recipe(tmp_path / "run" / "recipe.yaml").diffusion).sigma_data == sigma_data
    train(encoded_emoji, tmp_path / "run", resume=True)  # it is finished, and nothing has changed
    with pytest.raises(UserError, match=r"diffusion\.sigma_data: .* then, 0\.5 now"):
        train(encoded_emoji, tmp_path / "run", "diffusion.sigma_data=0.5", resume=True)


def test_a_run_of_an_earlier_version_goes_on_with_its_own(encoded_emoji, tmp_path):
    train(encoded_emoji, tmp_path / "run", "diffusion.sigma_data=0.9")  # the default until then
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    for path in last.iterdir():
        if path.is_file():
            path.unlink()  # as if killed while it was being written
    train(encoded_emoji, tmp_path / "run", resume=True)
    assert open_checkpoint(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]).state["edm"]["sigma_data"] == 0.9


def test_weights_of_another_run_bring_theirs(encoded_emoji, tmp_path):
    train(encoded_emoji, tmp_path / "first", "diffusion.sigma_data=0.8")
    train(encoded_emoji, tmp_path / "second", "init_from=first")
    assert open_checkpoint(sorted((tmp_path / "second" / "checkpoints").iterdir())[-1]).state["edm"]["sigma_data"] == 0.8
