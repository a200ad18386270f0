import re
from dataclasses import is_dataclass
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.config.load import load_recipe, recipe_of_text, with_todays_defaults
from microdit.config.recipes import RECIPES
from microdit.config.schema import PhaseRecipe, Recipe, objective_of
from microdit.errors import UserError
from microdit.lab.study import Study
from microdit.ranges import Range

BUNDLED = [
    path
    for path in sorted(RECIPES.rglob("*.yaml"))
    if path.parent.name != "lab" or path.name.startswith("base")  # the others there are studies
]

MINIMAL = """
name: test
data: {path: somewhere}
model: {dim: 64, depth: 2, head_dim: 16, mixer_dim: 32, mixer_depth: 1}
phases:
  - {name: masked, steps: 10, batch_size: 4, learning_rate: 3e-4, mask_ratio: 0.75}
  - {name: full, steps: 5, batch_size: 8, learning_rate: 1e-4}
"""

ROUTING = ["model.routing=tread", "model.dense_blocks=[0, 1]", "phases.0.mask_pattern=grid"]


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.name)
def test_every_recipe_of_ours_loads(path):
    assert load_recipe(path).total_steps > 0


def test_numbers_are_numbers_and_defaults_are_the_papers(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.phases[0].learning_rate == 3e-4  # a string to plain YAML
    assert (recipe.diffusion.P_mean, recipe.diffusion.P_std, objective_of(recipe.diffusion).sigma_data) == (-0.6, 1.2, 0.9)
    assert recipe.optimizer.betas == (0.9, 0.999)
    assert recipe.model.attention_range == (0.5, 1.0)


def test_overrides_reach_into_phases_and_the_written_recipe_reads_back(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["phases.1.steps=7", "model.ffn_range=[1, 2]", "seed=3", "phases.0.learning_rate=1e-5", *ROUTING])
    assert (recipe.model.routing, recipe.model.dense_blocks, recipe.phases[0].mask_pattern) == ("tread", (0, 1), "grid")
    assert (recipe.phases[1].steps, recipe.seed, recipe.total_steps) == (7, 3, 17)
    assert recipe.model.ffn_range == (1.0, 2.0)
    assert recipe.phases[0].learning_rate == 1e-5
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again) == recipe


def test_phases_follow_each_other(recipe_file):
    recipe = load_recipe(recipe_file)
    places = [(phase.name, inside) for phase, inside in map(recipe.phase_at, (0, 9, 10, 14))]
    assert places == [("masked", 0), ("masked", 9), ("full", 0), ("full", 4)]
    with pytest.raises(IndexError):
        recipe.phase_at(15)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("phases.0.mask_ratoi=0.5", "unknown key phases.0.mask_ratoi; did you mean phases.0.mask_ratio"),
        ("modle.dim=3", "unknown key modle"),
        ("phases.0.mask_ratio=1.0", "phases.0.mask_ratio is 1.0, and must be a number from 0 to less than 1"),
        ("phases.0.steps=many", "phases.0.steps is many, and must be a whole number from 1 to 1,000,000,000"),
        ("phases.0.steps=1.5", "phases.0.steps is 1.5, and must be a whole number"),
        ("phases.0.steps=0", "phases.0.steps is 0"),
        ("phases.9.steps=1", "override 'phases.9.steps=1' does not fit"),
        ("model.dim=100", "model.dim \\(100\\) is not divisible by model.head_dim \\(16\\): try 96"),
        ("model.head_dim=0", "model.head_dim is 0"),
        ("engine.device=gpu", "engine.device is gpu, and must be one of auto, cpu, cuda, cuda:N"),
        ("engine.precision=float16", "engine.precision: float16 needs losses that are scaled, .*: take bfloat16, or float32"),
        ("engine.precision=float64", "engine.precision is float64, and must be one of auto, float32, bfloat16"),
        ("model.init_scale=-1", "model.init_scale is -1, and must be a number from above 0 to 1,000"),
        (
            "model={dim: 60, depth: 2, head_dim: 6, mixer_dim: 60, mixer_depth: 1, positions: rotary}",
            r"model.head_dim \(6\) must be divisible by 4, for rotary",
        ),
        (
            "model={dim: 64, depth: 2, head_dim: 16, mixer_dim: 32, mixer_depth: 1, caption_length: 77, mask_padding: false}",
            "model.caption_length puts a learnt token in the place of padding",
        ),
        ("model.unread_text=true", "model.unread_text is for model.attention joint"),
        ("model.conditioning=adaLN", "model.conditioning is adaLN, and must be one of adaln, shared, none"),
        ("model.attention=both", "model.attention is both, and must be one of cross, joint"),
        ("model.caption_length=0", "model.caption_length is 0, and must be"),
        ("model.routing=none", "phases.0.mask_ratio must be 0, since model.routing is none"),
        ("model.routing=deffered", "model.routing is deffered, and must be one of none, naive, deferred"),
        ("phases.0.routing=naive", "unknown key phases.0.routing; did you mean model.routing"),
        (
            "model.routing=sprint",
            r"depth is 2, and routing sprint has 2 dense blocks .* and 2 after them: it needs at least 5, or .* \[0, 0\]",
        ),
        ("model={dim: 64, depth: 5, head_dim: 16, mixer_dim: 32, mixer_depth: 1, routing: tread}", "it needs at least 6"),
        ("model.decoder_depth=2", "model.decoder_depth is for model.routing maskdit, and not for deferred"),
        ("model.dense_blocks=[1, 1]", "model.dense_blocks is for model.routing tread and sprint, and not for deferred"),
        (
            "model={dim: 64, depth: 9, head_dim: 16, mixer_dim: 32, mixer_depth: 1, routing: tread, dense_blocks: [-1, 1]}",
            "model.dense_blocks.0 is -1, and must be a whole number from 0 to 256",
        ),
        (
            "model={dim: 64, depth: 2, head_dim: 16, mixer_dim: 32, mixer_depth: 1, routing: maskdit, decoder_depth: 0}",
            "model.decoder_depth is 0",
        ),
        (
            "phases.0={name: a, steps: 1, batch_size: 1, learning_rate: 1, mask_ratio: 0.6, mask_pattern: grid}",
            "must be one of 0.25, 0.5, 0.75",
        ),
        (
            "phases.0={name: a, steps: 1, batch_size: 1, learning_rate: 1, mask_schedule: [[0, 0.75], [1, 0]], mask_pattern: grid}",
            "without a mask_schedule",
        ),
        ("phases.0.learning_rate=-1", "learning_rate is -1, and must be"),
        ("phases.0.learning_rate=.nan", "learning_rate is .nan, and must be"),
        ("ema=[{decay: 1.0}]", "ema.0.decay is 1.0"),
        ("ema=[{decya: 0.9}]", "unknown key ema.0.decya; did you mean ema.0.decay"),
        ("ema=[{decay: 0.9}, {decay: 0.9}]", "ema names a decay twice"),
        ("engine.micro_batch=0", "engine.micro_batch is 0, and must be"),
        ("engine.sharding=zero", "engine.sharding is zero, and must be one of auto, ddp, fsdp, hybrid"),
        ("record.quality_every=0", "record.quality_every is 0, and must be"),
        ("record.quality_samples=15", "record.quality_samples is 15, and must be a whole number from 16 to"),
        ("guard.loss_jump=1", "guard.loss_jump is 1, and must be a number from above 1 to"),
        ("phases.0.mask_schedule=[[0, 0.5], [1, 0]]", "phases.0.mask_schedule takes the place of mask_ratio"),
        ("phases.1.mask_schedule=[[0.1, 0.5], [1, 0]]", "phases.1.mask_schedule must be points"),
        ("phases.1.mask_schedule=[[0, 0.5], [1, 1]]", "phases.1.mask_schedule.1.1 is 1, and must be a number from 0 to less than 1"),
        ("phases.1.mask_schedule=[0, 1]", "phases.1.mask_schedule.0 is 0, and must be a list"),
        ("optimizer.betas=[0.9]", "optimizer.betas is a list, and must be a list of 2"),
        ("phases=[]", "phases has 0 entries, and may have from 1 to 100"),
        ("seed", "'seed' is not an override"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(recipe_file, override, sentence):
    with pytest.raises(UserError, match=sentence):
        load_recipe(recipe_file, [override])


@pytest.mark.parametrize(
    ("override", "range_"),
    [
        ("model.depth=1000000000", "from 1 to 256"),
        ("model.mixer_depth=1000000000", "from 0 to 256"),
        ("model.decoder_depth=257", "from 1 to 256"),
        ("model.dense_blocks=[0, 1000000]", "from 0 to 256"),
        ("model.dim=1000000000", "from 1 to 32,768"),
        ("model.mixer_dim=32769", "from 1 to 32,768"),
        ("model.ffn_range=[1, 1e9]", "from above 0 to 64"),
        ("model.num_experts=100000", "from 0 to 1,024"),
        ("model.experts_every=0", "from 1 to 256"),
        ("model.round_ffn_to=1000000000000", "from 1 to 32,768"),
        ("model.expert_capacity=1e300", "from above 0 to 1,000"),
        ("data.resolution=1000000", "from 1 to 16,384"),
        ("phases.0.steps=10000000000", "from 1 to 1,000,000,000"),
        ("phases.0.batch_size=1000000", "from 1 to 65,536"),
        ("engine.micro_batch=65537", "from 1 to 65,536"),
        ("seed=-1", "from 0 to 9,007,199,254,740,991"),
        ("record.sample_steps=1001", "from 2 to 1,000"),
        (f"phases=[{'{name: a, steps: 1, batch_size: 1, learning_rate: 1}, ' * 101}]", "has 101 entries, and may have from 1 to 100"),
        (f"ema=[{'{decay: 0.9}, ' * 17}]", "has 17 entries, and may have from 0 to 16"),
        (f"phases.1.mask_schedule=[{'[0, 0], ' * 1001}]", "has 1,001 entries, and may have from 1 to 1,000"),
        (f"record.sample_prompts=[{'a, ' * 1001}]", "has 1,001 entries, and may have from 0 to 1,000"),
        (f"record.sample_prompts=[{'a' * 2001}]", "has 2,001 letters, and may have from 0 to 2,000"),
    ],
)
def test_what_sizes_something_is_bounded_and_its_key_and_range_are_named(recipe_file, override, range_):
    with pytest.raises(UserError, match=f"{override.partition('=')[0]}.*{range_}"):
        load_recipe(recipe_file, [override])


def numbers_without_a_range(kind: type, within: bool = False) -> list[str]:
    """Keys of a dataclass, in its lists and mappings too."""
    if get_origin(kind) is Annotated:
        inner, range_ = get_args(kind)
        most = 2**53 if inner is int else 1e39  # what float64 holds exactly, and about what float32 holds at all
        within = isinstance(range_, Range) and max(abs(range_.low), abs(range_.high)) < most
        return numbers_without_a_range(inner, within) if inner in (int, float) else numbers_without_a_range(inner)
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        return [f"{name}.{key}" for name, hint in hints.items() for key in numbers_without_a_range(hint)]
    if kind in (int, float):
        return [] if within else [kind.__name__]
    return [key for item in get_args(kind) if not isinstance(item, str) for key in numbers_without_a_range(item)]


@pytest.mark.parametrize("kind", [Recipe, Study])
def test_no_number_is_without_a_range(kind):
    assert numbers_without_a_range(kind) == []


@pytest.mark.parametrize("asked", ["${oc.env:API_KEY}", "${API_KEY}", "$API_KEY"])
def test_nothing_in_a_recipe_is_resolved(tmp_path, monkeypatch, asked):
    monkeypatch.setenv("API_KEY", "the-secret")
    text = MINIMAL.replace("name: test", f"name: {asked}").replace("path: somewhere", f"path: '{asked}'")
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{text}record:\n  sample_prompts: ['{asked}', '${{name}}']\n")
    recipe = load_recipe(path, [f"data.text_encoder={asked}", "data.autoencoder=${data.path}"])
    assert (recipe.name, recipe.data.path, recipe.data.text_encoder, recipe.data.autoencoder) == (asked, asked, asked, "${data.path}")
    assert recipe.record.sample_prompts == [asked, "${name}"]
    saved = recipe.to_yaml()
    assert recipe_of_text(saved, "saved") == recipe
    assert with_todays_defaults(yaml.safe_load(saved)) == yaml.safe_load(saved)
    for override in (f"phases.0.steps={asked}", f"engine.device={asked}", f"{asked}=1", f"phases.0.{asked}=1"):
        with pytest.raises(UserError, match=re.escape(asked.partition(".")[0])) as refused:
            load_recipe(path, [override])
        assert "the-secret" not in str(refused.value)
    assert "the-secret" not in saved


def test_text_is_what_was_written_and_numbers_are_decimal(tmp_path):
    path = tmp_path / "recipe.yaml"
    text = MINIMAL.replace("name: test", "name: no").replace("steps: 10,", "steps: 010,")
    path.write_text(f"{text}record: {{sample_prompts: [12:30, 2026-11-26, yes, 1e3, null]}}\n")
    recipe = load_recipe(path, ["data.path=2024_01"])
    assert (recipe.name, recipe.phases[0].steps, recipe.data.path) == ("no", 10, "2024_01")
    assert recipe.record.sample_prompts == ["12:30", "2026-11-26", "yes", "1e3", "null"]
    path.write_text(f"{text}record:\n  sample_prompts:\n  - a sign: red heart\n")
    with pytest.raises(UserError, match=r"record\.sample_prompts\.0 is a mapping, and must be text: put it in quotes"):
        load_recipe(path)


WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")) | st.sampled_from("\n\t"), max_size=20)
ODD = st.sampled_from(["no", "12:30", "2024_01", "010", "null", "~", "", "&a", "a: b", "'", "\\", "\ufeff", " a ", "a\n"])


@settings(max_examples=50)
@given(st.lists(WORDS | ODD, max_size=4), st.floats(1e-6, 900))
def test_a_saved_recipe_reads_back_whatever_its_words_and_numbers(words, rate):
    recipe = recipe_of_text(MINIMAL.replace("1e-4", repr(rate)), "minimal")
    recipe.record.sample_prompts.extend(words)
    assert recipe_of_text(recipe.to_yaml(), "saved") == recipe


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:1", "mps"])
def test_a_recipe_may_name_any_device(recipe_file, name):
    assert load_recipe(recipe_file, [f"engine.device={name}"]).engine.device == name


@pytest.mark.parametrize(("step", "ratio"), [(0, 0.75), (25, 0.75), (50, 0.75), (75, 0.375), (100, 0.0)])
def test_the_mask_may_fall_as_training_goes_on(step, ratio):
    phase = PhaseRecipe("p", 101, 1, 1e-3, mask_schedule=[[0, 0.75], [0.5, 0.75], [1, 0]])
    assert phase.mask_ratio_at(step) == pytest.approx(ratio)
    assert PhaseRecipe("p", 101, 1, 1e-3, mask_ratio=0.5).mask_ratio_at(step) == 0.5


@pytest.mark.parametrize("missing", ["name", "model", "phases"])
def test_what_is_missing_is_named(tmp_path, missing):
    content = yaml.safe_load(MINIMAL)
    del content[missing]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=f"{missing} is missing"):
        load_recipe(path)


@pytest.mark.parametrize("content", ["a: [", "- 1", "just words", "\x00"])
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        load_recipe(path)
    with pytest.raises(UserError, match="no recipe at"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_several_sets_and_their_weights(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: mix\ndata: {sets: {real: {path: a}, synthetic: {path: b, repeat: 2}}}\n"
        "model: {dim: 32, depth: 2, head_dim: 8, mixer_dim: 16, mixer_depth: 1}\n"
        "phases: [{name: p, steps: 1, batch_size: 2, learning_rate: 1e-3, weights: {real: 0.8, synthetic: 0.2}}]\n"
    )
    recipe = load_recipe(path)
    assert recipe.data.named_sets["synthetic"].repeat == 2
    assert recipe.phases[0].weights == {"real": 0.8, "synthetic": 0.2}
    replaced = load_recipe(path, ["data.sets={}", "data.path=c", "phases.0.weights=null"])
    assert list(replaced.data.named_sets) == ["data"]
    for override, sentence in [
        ("phases.0.weights={other: 1}", "weights names other"),
        ("phases.0.weights={real: 0}", "phases.0.weights are all 0"),
        ("phases.0.weights={real: -1}", "phases.0.weights.real is -1, and must be"),
        ("data.sets.real.repeat=-1", "data.sets.real.repeat is -1, and must be"),
        ("data.path=c", "either a path or sets"),
        ("data.sets.real.wieght=1", "data.sets.real.wieght"),
        ("data.on_damage=ignore", "on_damage"),
    ]:
        with pytest.raises(UserError, match=sentence):
            load_recipe(path, [override])


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["engine.activation_checkpointing=1.5"], r"activation_checkpointing is 1.5, and must be a number from 0 to 1"),
        (["engine.release_gradients=true", "engine.sharding=fsdp"], r"holds the model whole, and engine.sharding is fsdp"),
        (["engine.release_gradients=true", "engine.sharding=hybrid"], r"holds the model whole, and engine.sharding is hybrid"),
        (["optimizer.moments=int8", "optimizer.method=muon"], r"int8 is for optimizer.method adamw"),
    ],
)
def test_savings_that_cannot_be_are_refused(overrides, problem):
    with pytest.raises(UserError, match=problem):
        load_recipe("emoji", overrides)


@pytest.mark.parametrize(("written", "share"), [("true", 1.0), ("false", 0.0), ("0.25", 0.25), ("1", 1.0), ("0", 0.0)])
def test_blocks_are_recomputed_all_or_none_or_a_share(written, share):
    assert float(load_recipe("emoji", [f"engine.activation_checkpointing={written}"]).engine.activation_checkpointing) == share
