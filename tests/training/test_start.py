"""What a run begins with: the weights of another one, and what is said of them."""

import shutil
from dataclasses import replace

import pytest
import torch

from microdit.data.latents import EncodedSet
from microdit.errors import UserError
from microdit.recipe_file import load_recipe
from microdit.training.start import first_weights, model_config
from tests.training.processes import RECIPE
from tests.training.untrained import save_untrained


def all_of(number: float):
    return lambda weight: torch.full_like(weight, number)


@pytest.fixture(scope="module")
def made(tmp_path_factory, encoded_emoji):
    """A run whose recipe asks for 40 steps, with a checkpoint of step 20 and of step 40: weights 20 and 40, averages -20 and -40."""
    run = tmp_path_factory.mktemp("runs") / "first"
    for step in (20, 40):
        save_untrained(run, encoded_emoji, step, all_of(step))
    return run


@pytest.fixture
def begin(encoded_emoji):
    """The number that all weights are with which a run beside `run` begins."""
    recipe, data = load_recipe(RECIPE, [f"data.path={encoded_emoji}", "init_from=first"]), EncodedSet(encoded_emoji, 16)

    def begin(run, warn, **changes) -> float:
        weights = first_weights(replace(recipe, **changes), run.parent / "second", model_config(recipe, data), data, warn)
        (number,) = {weight.unique().item() for weight in weights.values()}
        return number

    return begin


def test_a_run_begins_with_the_weights_or_the_averages_of_another(made, begin):
    step_20 = str(made / "checkpoints" / "step-00000020")
    assert begin(made, pytest.fail) == 40
    assert begin(made, pytest.fail, init_weights="ema") == -40
    assert begin(made, pytest.fail, init_from=step_20, init_weights="ema") == -20
    for place in ("first", step_20):
        with pytest.raises(UserError, match=r"no weights named ema-0\.5, only ema, model"):
            begin(made, pytest.fail, init_from=place, init_weights="ema-0.5")


def test_a_damaged_newest_checkpoint_and_a_run_that_was_never_finished_are_said(made, begin, tmp_path):
    run = tmp_path / "first"
    shutil.copytree(made, run)
    newest = run / "checkpoints" / "step-00000040" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x01")
    said: list[str] = []
    assert begin(run, said.append) == 20
    assert len(said) == 2
    assert "init_from: " in said[0]
    assert "step-00000040 is damaged (model.safetensors: not what was written)" in said[0]
    assert "step-00000020, step 20 of the 40 that its recipe asks for: those weights were not trained to the end" in said[1]
    with pytest.raises(UserError, match=r"step-00000040 is damaged \(model.safetensors: not what was written"):
        begin(run, pytest.fail, init_from=str(newest.parent))


def test_a_run_whose_machine_was_taken_away_can_be_begun_from(encoded_emoji, begin, tmp_path):
    """Its newest checkpoint holds no whole weights, and is put together."""
    run = save_untrained(tmp_path / "first", encoded_emoji, 40, all_of(3), in_haste=True)
    assert begin(run, pytest.fail) == 3
    assert begin(run, pytest.fail, init_weights="ema") == -3


def test_init_weights_without_init_from_is_refused():
    with pytest.raises(UserError, match="init_weights ema chooses among the weights of init_from, which names no run"):
        load_recipe(RECIPE, ["data.path=x", "init_weights=ema"])
