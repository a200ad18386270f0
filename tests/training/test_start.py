"""What a run begins with: the weights of another one, and what is said of them."""

import shutil
from dataclasses import replace

import pytest
import torch

from microdit.data.latents import EncodedSet
from microdit.distributed import start_world
from microdit.errors import UserError
from microdit.model.microdit import MicroDiT
from microdit.recipe_file import load_recipe
from microdit.training.saving import Saver
from microdit.training.start import describe, first_weights, model_config
from tests.training.processes import RECIPE


@pytest.fixture(scope="module")
def made(tmp_path_factory, encoded_emoji):
    """A run whose recipe asks for 40 steps, with a checkpoint of step 20 and of step 40: weights 20 and 40, averages -20 and -40."""
    run = tmp_path_factory.mktemp("runs") / "first"
    recipe, data = load_recipe(RECIPE, [f"data.path={encoded_emoji}"]), EncodedSet(encoded_emoji, 16)
    config = model_config(recipe, data)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in MicroDiT(config).named_parameters()}
    saver = Saver(run, start_world("cpu"), keep=9, keep_every=None, warn=pytest.fail)
    for step in (20, 40):
        parts = {"model": float(step), "ema": float(-step)}
        tensors = {f"{part}/{name}": torch.full(shape, value) for part, value in parts.items() for name, shape in shapes.items()}
        saver.save(step, tensors, describe(recipe, config, data, [data]), [*parts])
    assert saver.finish()
    return run, replace(recipe, init_from="first"), config, data


def begin(made, run, warn, **changes) -> float:
    """The number that all weights are."""
    _, recipe, config, data = made
    weights = first_weights(replace(recipe, **changes), run.parent / "second", config, data, warn)
    (number,) = {weight.unique().item() for weight in weights.values()}
    return number


def test_a_run_begins_with_the_weights_or_the_averages_of_another(made):
    run, recipe, config, data = made
    assert begin(made, run, pytest.fail) == 40
    assert begin(made, run, pytest.fail, init_weights="ema") == -40
    assert begin(made, run, pytest.fail, init_from=str(run / "checkpoints" / "step-00000020"), init_weights="ema") == -20
    with pytest.raises(UserError, match=r"no weights named ema-0\.5, only ema, model"):
        begin(made, run, pytest.fail, init_weights="ema-0.5")
    with pytest.raises(UserError, match=r"no weights named ema-0\.5, only ema, model"):
        begin(made, run, pytest.fail, init_from=str(run / "checkpoints" / "step-00000020"), init_weights="ema-0.5")
    assert first_weights(replace(recipe, init_from=None), run, config, data, pytest.fail) is None


def test_a_damaged_newest_checkpoint_and_a_run_that_was_never_finished_are_said(made, tmp_path):
    run = tmp_path / "first"
    shutil.copytree(made[0], run)
    newest = run / "checkpoints" / "step-00000040" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x01")
    said: list[str] = []
    assert begin(made, run, said.append) == 20
    assert len(said) == 2
    assert "init_from: " in said[0]
    assert "step-00000040 is damaged (model.safetensors: not what was written)" in said[0]
    assert "step-00000020, step 20 of the 40 that its recipe asks for: those weights were not trained to the end" in said[1]
    with pytest.raises(UserError, match=r"step-00000040 is damaged \(model.safetensors: not what was written"):
        begin(made, run, pytest.fail, init_from=str(newest.parent))


def test_a_run_whose_machine_was_taken_away_can_be_begun_from(made, tmp_path):
    """Its newest checkpoint holds no whole weights, and is put together."""
    run, (_, recipe, config, data) = tmp_path / "first", made
    saver = Saver(run, start_world("cpu"), keep=9, keep_every=None, warn=pytest.fail)
    tensors = {f"model/{name}": torch.full(weight.shape, 3.0) for name, weight in MicroDiT(config).named_parameters()}
    saver.save(40, tensors, describe(recipe, config, data, [data]), [])
    assert saver.finish()
    assert begin(made, run, pytest.fail) == 3


def test_init_weights_without_init_from_is_refused():
    with pytest.raises(UserError, match="init_weights ema chooses among the weights of init_from, which names no run"):
        load_recipe(RECIPE, ["data.path=x", "init_weights=ema"])
