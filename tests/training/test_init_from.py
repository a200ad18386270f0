"""What a run begins with: the weights of another one, and what is said of them; on several processes, each its share."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from microdit.checkpoint import open_checkpoint
from microdit.config.load import load_recipe
from microdit.config.schema import DiffusionRecipe
from microdit.data.dataset import EncodedDataset
from microdit.distributed import World, start_world
from microdit.errors import UserError
from microdit.models.microdit import MicroDiT
from microdit.models.official import export_official
from microdit.pipelines.export import export_run
from microdit.pipelines.import_official import ImportSettings, import_official
from microdit.pipelines.pipeline import DEMO
from microdit.training.init_from import find_initial_weights
from microdit.training.parallel import shards_of
from microdit.training.setup import model_config
from microdit.training.state import TrainingState
from tests.pipelines.official_layouts import save_bare
from tests.training.processes import RECIPE, bytes_read, together
from tests.training.untrained import save_untrained

MINIT2I = Path(__file__).parents[1] / "fixtures" / "minit2i_a.safetensors"


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
    recipe, data = load_recipe(RECIPE, [f"data.path={encoded_emoji}", "init_from=first"]), EncodedDataset(encoded_emoji, 16)

    def begin(run, warn, **changes) -> float:
        config, world = model_config(recipe, data), start_world("cpu")
        model = MicroDiT(config)
        find_initial_weights(replace(recipe, **changes), run.parent / "second", config, data, world, warn, None).fill(model, world)
        (number,) = {weight.unique().item() for weight in model.parameters()}
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


def test_damaged_checkpoints_and_unfinished_runs_are_reported(made, begin, tmp_path):
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


def test_an_exported_run_can_be_begun_from(made, begin, tmp_path):
    for dtype in ("float32", "float16"):
        export_run(made, tmp_path / dtype, pytest.fail, dtype=dtype)
        assert begin(made, pytest.fail, init_from=str(tmp_path / dtype)) == -40  # the averages, as exported
    with pytest.raises(UserError, match=r"float16 holds one set of weights: leave out init_weights ema"):
        begin(made, pytest.fail, init_from=str(tmp_path / "float16"), init_weights="ema")
    (tmp_path / "float16" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights \(diffusion_pytorch_model\.safetensors\): export or import it again"):
        begin(made, pytest.fail, init_from=str(tmp_path / "float16"))


def test_imported_official_weights_can_be_begun_from(encoded_emoji, tmp_path):
    recipe, data = load_recipe(RECIPE, [f"data.path={encoded_emoji}", "init_from=official"]), EncodedDataset(encoded_emoji, 16)
    config, world = model_config(recipe, data), start_world("cpu")
    torch.manual_seed(3)
    official = MicroDiT(config)
    save_bare(export_official(official, grid_size=4), tmp_path / "official.pt")
    import_official(tmp_path / "official.pt", tmp_path / "official", ImportSettings("minilm", "pixels", head_dim=8))
    model = MicroDiT(config)
    find_initial_weights(recipe, tmp_path / "run", config, data, world, pytest.fail, None).fill(model, world)
    assert all(weight.equal(official.state_dict()[name]) for name, weight in model.state_dict().items())
    said: list[str] = []
    import_official(tmp_path / "official.pt", tmp_path / "other", ImportSettings("minilm", "sdxl", head_dim=8))
    find_initial_weights(replace(recipe, init_from="other"), tmp_path / "run", config, data, world, said.append, None)
    assert len(said) == 1
    assert "was trained with the autoencoder sdxl, and" in said[0]


def test_the_demo_model_is_an_origin_by_name_and_says_its_lines(workplace, tmp_path):
    data, world = EncodedDataset(workplace / "data" / "emoji"), start_world("cpu")
    recipe = load_recipe(RECIPE, [f"data.path={data.folder}", "init_from=demo"])
    with pytest.raises(UserError, match=r"model\.dim: 128 there, 32 in the recipe") as refused:
        find_initial_weights(recipe, tmp_path / "run", model_config(recipe, data), data, world, pytest.fail, None)
    _, found, lines = str(refused.value).partition("\nmodel:\n")
    assert found
    tree = yaml.safe_load(RECIPE.read_text()) | {"init_from": "demo", "data": {"path": str(data.folder)}} | yaml.safe_load(found + lines)
    (tmp_path / "pasted.yaml").write_text(yaml.safe_dump(tree | {"phases": [{**tree["phases"][1]}]}))
    pasted = load_recipe(tmp_path / "pasted.yaml")
    config = model_config(pasted, data)
    model = MicroDiT(config)
    find_initial_weights(pasted, tmp_path / "run", config, data, world, pytest.fail, None).fill(model, world)
    demo = load_file(DEMO / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(weight.equal(demo[f"denoiser.{name}"].float()) for name, weight in model.state_dict().items())


def test_an_origin_of_another_objective_is_refused(made, begin):
    flow = DiffusionRecipe(objective="flow")
    with pytest.raises(UserError, match="was trained with objective edm, and the recipe asks for objective flow, prediction velocity"):
        begin(made, pytest.fail, diffusion=flow)
    said: list[str] = []
    assert begin(made, said.append, diffusion=DiffusionRecipe(sigma_data=0.5, P_mean=1.0)) == 40
    assert len(said) == 1
    assert "diffusion.sigma_data is 0.5, and was 0.9 in" in said[0]


def test_an_origin_of_other_encoders_is_refused(made, workplace, tmp_path):
    data, world = EncodedDataset(workplace / "data" / "emoji"), start_world("cpu")
    recipe = load_recipe(RECIPE, [f"data.path={data.folder}", f"init_from={made}"])
    with pytest.raises(UserError, match=r"is of icon \(\w+\): encode the data with --autoencoder pixels"):
        find_initial_weights(recipe, tmp_path / "run", model_config(recipe, data), data, world, pytest.fail, None)


def test_weights_that_are_not_finite_are_not_begun_with(encoded_emoji, begin, tmp_path):
    run = save_untrained(tmp_path / "first", encoded_emoji, 40, lambda weight: torch.full_like(weight, torch.nan))
    with pytest.raises(UserError, match=r"The weights model of .*step-00000040 are not finite in (\d+) of \1 tensors"):
        begin(run, pytest.fail)


def test_a_checkpoint_that_was_found_whole_is_not_read_again(made, encoded_emoji):
    recipe, data = load_recipe(RECIPE, [f"data.path={encoded_emoji}", "init_from=first"]), EncodedDataset(encoded_emoji, 16)
    config, world = model_config(recipe, data), start_world("cpu")
    known = open_checkpoint(made / "checkpoints" / "step-00000040")
    assert known.damage(list(known.state["files"])) == []
    before = bytes_read()
    assert find_initial_weights(recipe, made.parent / "second", config, data, world, pytest.fail, known).checkpoint is known
    assert bytes_read() - before < 10_000
    assert find_initial_weights(recipe, made.parent / "second", config, data, world, pytest.fail, None).checkpoint.folder == known.folder
    assert bytes_read() - before > (known.folder / "model.safetensors").stat().st_size


@pytest.fixture(scope="module")
def scattered(tmp_path_factory, encoded_emoji):
    """Runs whose weights are all different: `whole`, and `hasty`, which was saved before a machine was taken away."""
    place = tmp_path_factory.mktemp("scattered")
    for name, in_haste in (("whole", False), ("hasty", True)):
        save_untrained(place / name, encoded_emoji, 40, lambda weight: torch.randn(weight.shape), in_haste)
    return place


def begun(world: World, place, encoded, *cases) -> list[tuple[bool, bool, int]]:
    """For each way: are weights and averages the same to the last bit; how many bytes of the weights this process holds."""
    data, found = EncodedDataset(encoded, 16), []
    for init_from, name, sharding in cases:
        overrides = [f"data.path={encoded}", f"init_from={init_from}", f"init_weights={name}", f"engine.sharding={sharding}"]
        recipe = load_recipe(RECIPE, overrides)
        config = model_config(recipe, data)
        origin = find_initial_weights(recipe, place / "new", config, data, world, pytest.fail, None)
        state = TrainingState(recipe, config, world, partial(origin.fill, world=world), fresh=True)
        there = place / init_from / "checkpoints" / "step-00000040"
        whole = load_file(there / f"{name}.safetensors") if init_from == "whole" else open_checkpoint(there).tensors(name)
        shards = shards_of(state.model)
        assert state.averages
        for average in state.averages.values():
            held = {shard.name: shard.own(whole[shard.name]) for shard in shards}
            same = all(shard.leaf.equal(held[shard.name]) for shard in shards)
            parts = {key: value.to_local() if sharding == "fsdp" else value for key, value in average.averages.items()}
            found.append((same, all(parts[key].equal(held[key]) for key in held), sum(shard.leaf.numel() for shard in shards)))
    return found


def test_each_process_begins_with_its_share(scattered, encoded_emoji):
    cases = [(run, name, sharding) for run in ("whole", "hasty") for name in ("model", "ema") for sharding in ("fsdp", "ddp")]
    ranks = together(2, begun, scattered, encoded_emoji, *cases)
    for results in zip(*ranks, strict=True):
        assert all(same and averages for same, averages, _ in results)
    sizes = [[held for _, _, held in results] for results in ranks]
    every = sizes[0][1]  # ddp
    assert sizes[0][1::2] == sizes[1][1::2] == [every] * 4
    assert [a + b for a, b in zip(sizes[0][::2], sizes[1][::2], strict=True)] == [every] * 4
    assert max(sizes[0][0], sizes[1][0]) < 0.6 * every


def test_a_run_begins_with_the_weights_of_a_pipelines_folder(made, begin, tmp_path, encoded_emoji):
    """Of one that `microdit export` wrote."""
    from microdit.pipelines.export import export_run

    export_run(made, tmp_path / "exported", pytest.fail, "model")
    assert begin(tmp_path / "run", pytest.fail, init_from="exported") == 40
    assert begin(made, pytest.fail, init_from=str(tmp_path / "exported")) == 40
    with pytest.raises(UserError, match="holds one set of weights: leave out init_weights ema"):
        begin(tmp_path / "run", pytest.fail, init_from="exported", init_weights="ema")


def test_a_folder_of_another_architecture_is_no_beginning(begin, tmp_path):
    from microdit.pipelines.import_minit2i import MiniT2ISettings, import_minit2i

    import_minit2i(MINIT2I, tmp_path / "minit2i", MiniT2ISettings(resolution=32))
    with pytest.raises(UserError, match="minit2i was trained with objective flow, prediction image, and the recipe asks for objective edm"):
        begin(tmp_path / "run", pytest.fail, init_from="minit2i")
    flow = DiffusionRecipe(objective="flow", prediction="image", noise_scale=2)
    with pytest.raises(UserError, match="minit2i is of another architecture than the recipe asks for"):
        begin(tmp_path / "run", lambda sentence: None, init_from="minit2i", diffusion=flow)
