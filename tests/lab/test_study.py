from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.config.recipes import RECIPES
from microdit.config.schema import AlignmentRecipe, ModelRecipe, PhaseRecipe, Recipe
from microdit.errors import UserError
from microdit.lab.study import default_folder, is_scheduled, load_study, measurement, only_arms, stretched

MODEL = ModelRecipe(dim=32, depth=2, head_dim=8, mixer_dim=32, mixer_depth=1)
BASE = """
name: base
data: {path: data, held_out: held-out}
model: {dim: 32, depth: 2, head_dim: 8, mixer_dim: 32, mixer_depth: 1}
phases: [{name: all, steps: 1, batch_size: 4, learning_rate: 1e-3}]
"""
STUDY = """
name: small
question: which is better?
reference: {arm: none, steps: 8}
arms:
  none: [model.routing=none]
  deferred: [phases.0.mask_ratio=0.75]
claims: [{says: masking is cheaper, better: deferred, worse: none}]
"""


def load(folder: Path, study: str = STUDY, base: str = BASE):
    (folder / "base.yaml").write_text(base)
    (folder / "study.yaml").write_text(study)
    return load_study(folder / "study.yaml")


def test_arms_are_the_base_with_their_overrides(tmp_path):
    study, recipes = load(tmp_path)
    assert list(recipes) == ["none", "deferred"]
    assert recipes["none"].model.routing == "none"
    assert recipes["deferred"].phases[0].mask_ratio == 0.75
    assert {recipe.phases[0].steps for recipe in recipes.values()} == {8}
    assert study.claims[0].budget == "flops"


def test_a_measure_needs_its_judge(tmp_path):
    more = STUDY + "measures: [recognised_classifier]\n"
    with pytest.raises(UserError, match="recognised_classifier of measures or claims is given by the judge classifier: add it to judges"):
        load(tmp_path, more)
    assert measurement(load(tmp_path, more + "judges: [pixels, classifier]\n")[0])["judges"] == ["pixels", "classifier"]
    assert "judges" not in measurement(load(tmp_path)[0])  # older plans lack the key


def test_the_study_of_alignment_is_judged_by_others_than_the_teacher():
    study, recipes = load_study("lab/alignment")
    assert all(claim.measure in ("frechet_distance_classifier", "recognised_classifier") for claim in study.claims)
    assert recipes["none"].alignment is None
    assert [recipe.aligned_steps for recipe in recipes.values()] == [0, 400, 400, 200, 200, 400]


def test_maskdits_published_arm_is_their_recipe():
    """2306.09305 drops half of the patches, and its decoder has eight blocks, narrower than the backbone."""
    recipe = load_study("lab/masking")[1]["maskdit-published"]
    assert (recipe.model.routing, recipe.model.mixer_depth, recipe.model.decoder_depth) == ("maskdit", 0, 8)
    assert recipe.model.mixer_dim < recipe.model.dim
    assert [phase.mask_ratio for phase in recipe.phases] == [0.5]


def test_a_study_is_data_and_its_text_stays_as_written(tmp_path, monkeypatch):
    monkeypatch.setenv("API_KEY", "the-secret")
    text = STUDY.replace("which is better?", "${oc.env:API_KEY}").replace(
        "name: small", "name: no\nseeds: [010, 2]\nprompts: [12:30, ${name}]"
    )
    study, recipes = load(tmp_path, text.replace("${name}", "'${name}'").replace("model.routing=none", '"data.path=${oc.env:API_KEY}"'))
    assert (study.name, study.question, study.seeds, study.prompts) == ("no", "${oc.env:API_KEY}", [10, 2], ["12:30", "${name}"])
    assert (recipes["none"].name, recipes["none"].data.path) == ("no-none", "${oc.env:API_KEY}")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("arm: none", "arm: dense", "reference.arm dense is not one of the arms: none, deferred"),
        ("steps: 8", "steps: 0", "reference.steps is 0, and must be a whole number from 1 to"),
        ("better: deferred", "better: tread", "the claim 'masking is cheaper' names tread, which is not an arm"),
        (
            "[model.routing=none]",
            "[model.routing=none, phases.0.steps=9]",
            "none sets phases.0.steps, which would make budgets unequal",
        ),
        ("[model.routing=none]", "[phases.0.batch_size=8]", "the arm none have another batch_size than base"),
        ("[model.routing=none]", "[seed=3]", "the arm none sets seed"),
        ("[model.routing=none]", "[model.routing=nothing]", "model.routing is nothing, and must be one of"),
        ("question:", "seeds: [1, 1]\nquestion:", r"seeds \[1, 1\] must be distinct"),
        ("question:", "readings: [0.5]\nquestion:", r"readings \[0.5\] must increase from above 0 to 1.0"),
        ("name: small", "", "name is missing"),
        ("name: small", "name: [", "is not readable YAML"),
        ("name: small", "name: small\nbudgets: [seconds]", "about equal flops, which is not one of the study's budgets: seconds"),
        ("name: small", "name: small\nbudgets: []", "at least one of flops, seconds, images"),
        ("question:", "arm: 1\nquestion:", r"unknown key arm; did you mean reference\.arm\?"),
        ("question:", "readings: [.nan, 1.0]\nquestion:", "readings.0 is .nan, and must be"),
        ("question:", "pictures: 1\nquestion:", "pictures is 1, and must be a whole number from 2 to"),
        ("question:", "num_inference_steps: 0\nquestion:", "num_inference_steps is 0"),
        ("question:", "guidance_scale: .nan\nquestion:", "guidance_scale is .nan, and must be"),
        ("question:", "pictures: 10000000\nquestion:", "pictures is 10000000, and must be a whole number from 2 to 1,000,000"),
        ("question:", "seeds: [0x10]\nquestion:", "seeds.0 is 0x10, and must be"),
        ("question:", "notes: [a]\nquestion:", "notes is a list, and must be text"),
        ("question:", "notes: &a b\nquestion:", "anchors and aliases"),
        ("question:", "prompts: []\nquestion:", "prompts is empty"),
        ("question:", "measures: [kid, kid]\nquestion:", "measures must be distinct"),
        ("name: small", "name: ../small", "'../small' names a folder"),
        ("  deferred:", "  a/b: []\n  deferred:", "'a/b' names a folder"),
        ("worse: none", "worse: deferred", "compares deferred with itself"),
        ("[model.routing=none]", "[model.routng=none]", "the arm none: .*did you mean model.routing"),
        ("[model.routing=none]", "['']", "the arm none: '' is not an override"),
        (
            "name: small",
            "name: small\non_cpu: {steps: 2, seeds: [0], arms: {none: [], tread: []}}",
            "names tread, which is not an arm",
        ),
        (
            "name: small",
            "name: small\non_cpu: {steps: 2, seeds: [0], arms: {deferred: []}}",
            "must name the reference arm, none",
        ),
        ("name: small", "name: small\non_cpu: {steps: 2, seeds: [0], readings: [0.5], arms: {none: []}}", r"on_cpu: readings \[0.5\]"),
        ("name: small", "name: small\non_cpu: {steps: 2, seeds: [0], arms: {none: [ema=null]}}", "on_cpu: the arm none sets ema"),
        ("name: small", "name: small\non_cpu: {steps: 2, seeds: [1, 1], arms: {none: []}}", r"on_cpu.seeds \[1, 1\] must be distinct"),
    ],
)
def test_a_study_that_cannot_be_is_refused(tmp_path, old, new, sentence):
    with pytest.raises(UserError, match=sentence):
        load(tmp_path, STUDY.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (", held_out: held-out", "", "needs data.held_out"),
        ("name: base", "name: base\nema: []", "needs an ema"),
    ],
)
def test_a_base_that_cannot_be_measured_is_refused(tmp_path, old, new, sentence):
    with pytest.raises(UserError, match=sentence):
        load(tmp_path, base=BASE.replace(old, new))


ONE = "batch_size: 4, learning_rate: 1e-3"
PHASES = f'["phases=[{{name: a, steps: 3, mask_ratio: 0.75, {ONE}}}, {{name: b, steps: 1, {ONE}}}]"]'


def test_phases_of_an_arm_share_the_budget(tmp_path):
    _, recipes = load(tmp_path, STUDY.replace("[phases.0.mask_ratio=0.75]", PHASES))
    assert [phase.steps for phase in recipes["deferred"].phases] == [6, 2]
    assert is_scheduled(recipes["deferred"])
    assert not is_scheduled(recipes["none"])
    whole = replace(recipes["none"], alignment=AlignmentRecipe("efficientnet", 1))
    assert not is_scheduled(whole)
    assert is_scheduled(replace(whole, alignment=AlignmentRecipe("efficientnet", 1, until=0.5)))
    with pytest.raises(UserError, match="the arm deferred have another batch_size than base"):
        load(tmp_path, STUDY.replace("[phases.0.mask_ratio=0.75]", PHASES.replace("size: 4", "size: 8")))
    with pytest.raises(UserError, match=r"reference\.steps is 1, and the arm deferred has 2 phases"):
        load(tmp_path, STUDY.replace("steps: 8", "steps: 1").replace("[phases.0.mask_ratio=0.75]", PHASES))
    load(tmp_path, "budgets: [flops, seconds]" + STUDY.replace("[phases.0.mask_ratio=0.75]", PHASES.replace("size: 4", "size: 8")))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(4, 5000))
def test_stretched_phases_keep_their_shares_to_within_a_step(steps, total):
    phases = [PhaseRecipe(name=str(n), steps=count, batch_size=1, learning_rate=1.0) for n, count in enumerate(steps)]
    long = stretched(Recipe(name="r", model=MODEL, phases=phases), total)
    assert long.total_steps == total
    for before, after in zip(phases, long.phases, strict=True):
        assert after.steps >= 1
        assert abs(after.steps - before.steps / sum(steps) * total) <= len(steps)


def test_the_studies_that_come_with_the_project_are_whole():
    for path in sorted((RECIPES / "lab").glob("*.yaml")):
        if not path.name.startswith("base"):
            study, recipes = load_study(path)
            assert path.stem == study.name
            assert len(recipes) >= 2
            assert len(study.seeds) >= 2 or not study.claims  # one seed may look for settings, and says nothing of claims


REDUCED = """
on_cpu:
  steps: 3
  seeds: [4]
  arms: {none: [], deferred: [phases.0.mask_ratio=0.5]}
  pictures: 16
  readings: [1.0]
  notes: small
  overrides: [phases.0.batch_size=2, phases.0.learning_rate=1e-4]
"""
THIRD = STUDY.replace("claims:", "  naive: [model.routing=naive, phases.0.learning_rate=1e-5]\nclaims:").replace(
    "}]", "}, {says: so, better: deferred, worse: naive}]"
)


def test_a_study_has_a_reduced_form_for_a_cpu(tmp_path):
    whole, recipes = load(tmp_path, THIRD + REDUCED)
    assert (list(whole.arms), whole.seeds, whole.reference.steps) == (["none", "deferred", "naive"], [0, 1, 2], 8)
    assert recipes["none"].phases[0].batch_size == 4
    reduced, recipes = load_study(tmp_path / "study.yaml", on_cpu=True)
    assert (list(reduced.arms), list(recipes), reduced.seeds) == (["none", "deferred"], ["none", "deferred"], [4])
    assert reduced.reference.steps == recipes["deferred"].phases[0].steps == 3
    assert [claim.worse for claim in reduced.claims] == ["none"]  # naive is not run
    assert (whole.pictures, reduced.pictures, reduced.readings, reduced.notes) == (256, 16, [1.0], "small")
    assert (recipes["none"].phases[0].mask_ratio, recipes["deferred"].phases[0].mask_ratio) == (0, 0.5)  # after the arm's own
    assert {(recipe.phases[0].batch_size, recipe.phases[0].learning_rate) for recipe in recipes.values()} == {(2, 1e-4)}
    assert default_folder(whole, on_cpu=False) != default_folder(whole, on_cpu=True)  # their results never mix
    assert default_folder(load(tmp_path)[0], on_cpu=True) == Path("lab/small")


def test_an_arm_overrides_what_the_reduced_form_sets(tmp_path):
    load(tmp_path, (THIRD + REDUCED).replace("deferred: [phases.0.mask_ratio=0.5]}", "naive: []}"))
    _, recipes = load_study(tmp_path / "study.yaml", on_cpu=True)
    assert (recipes["none"].phases[0].learning_rate, recipes["naive"].phases[0].learning_rate) == (1e-4, 1e-5)


def test_a_study_is_restricted_to_some_arms_and_claims_about_them(tmp_path):
    study, _ = load(tmp_path, THIRD)
    chosen = only_arms(study, ["naive", "none"])
    assert (list(chosen.arms), chosen.claims) == (["none", "naive"], [])
    with pytest.raises(UserError, match=r"has no arm tread\. Its arms: none, deferred, naive"):
        only_arms(study, ["none", "tread"])
    with pytest.raises(UserError, match="The arm none defines the budgets of the study small"):
        only_arms(study, ["deferred"])


def test_arms_measured_against_the_encoded_set_share_it(tmp_path):
    encoded = STUDY.replace("name: small", "name: small\nsource: encoded")
    assert load(tmp_path, encoded)[0].source == "encoded"
    with pytest.raises(UserError, match=r"source: encoded needs one data\.path for all arms"):
        load(tmp_path, encoded.replace("[model.routing=none]", "[data.path=other]"))
