"""The study faithful in its full form, all arms and budgets, at smoke size: it starts, stops and goes on."""

from dataclasses import replace

import pytest

from microdit.config.schema import DataRecipe
from microdit.distributed import start_world
from microdit.lab.run_study import RESULTS, read_results, run_study
from microdit.lab.study import load_study, only_arms


@pytest.mark.slow
def test_all_arms_run_with_256_patches_and_go_on_after_a_stop(tmp_path, encoded_emoji):
    """On emoji of 16 x 16 pixels, which in patches of one are 256, with the study's own networks."""
    study, recipes = load_study("lab/faithful")
    assert len(study.arms) == 9
    study = replace(study, reference=replace(study.reference, steps=2), seeds=[0], readings=[1.0], pictures=4, num_inference_steps=2)
    data = DataRecipe(str(encoded_emoji), held_out=str(encoded_emoji))
    recipes = {
        arm: replace(recipe, data=data, phases=[replace(recipe.phases[0], steps=2, batch_size=4, warmup_steps=0)])
        for arm, recipe in recipes.items()
    }
    world, out = start_world("cpu"), tmp_path / "study"
    first = only_arms(study, ["none", "naive", "deferred"])
    run_study(first, recipes, out, world)
    before = (out / RESULTS).read_bytes()
    run_study(study, recipes, out, world)
    assert (out / RESULTS).read_bytes().startswith(before)  # nothing was trained twice
    results = read_results(out)
    assert {line["arm"] for line in results} == set(study.arms)
    assert all(line["frechet_distance"] > 0 and line["held_out_loss"] > 0 for line in results)
    assert not any(line.get("diverged") for line in results)
