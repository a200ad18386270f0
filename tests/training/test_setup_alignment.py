"""Whole runs with representation alignment: spread over processes, killed and resumed, ended early, refused."""

import json
from pathlib import Path
from shutil import rmtree

import pytest
from safetensors import safe_open

from microdit.config.load import load_recipe
from microdit.data.dataset import EncodedDataset
from microdit.data.manifest import MANIFEST
from microdit.errors import UserError
from microdit.io.files import from_checked_json, to_checked_json
from microdit.planning.workload import shapes_of
from microdit.training.setup import open_dataset
from tests.commands import microdit
from tests.python_examples import own_pictures
from tests.training.processes import RECIPE, losses, recorded, start, tensors, train, wait_for

ALIGNED = ("alignment={encoder: efficientnet, block: 1, width: 16}", "record.metrics_every=1", "record.checkpoint_every=6")
SHORT = ("phases.0.steps=8", "phases.1.steps=4", "phases.1.batch_size=8", "phases.0.warmup_steps=0")


def trained(run: Path, data: Path, *more: object, ranks: int = 1) -> Path:
    running = train(run, data, *ALIGNED, *SHORT, *more, ranks=ranks)
    assert running.wait() == [0] * ranks, running.output
    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory, aligned_emoji) -> Path:
    return trained(tmp_path_factory.mktemp("plain") / "run", aligned_emoji)


def test_the_similarity_grows_and_is_recorded(plain):
    """Masked in the first phase, on all patches in the second."""
    found = recorded(plain, "alignment")
    assert sorted(found) == list(range(1, 13))
    assert found[12] > found[1] + 0.04
    assert all(-1 < value < 1 for value in found.values())


@pytest.mark.parametrize("engine", [["engine.micro_batch=2", "engine.sharding=ddp"], ["engine.micro_batch=2", "engine.sharding=fsdp"]])
def test_two_processes_with_micro_batches_align_as_one_does(tmp_path, aligned_emoji, plain, engine):
    run = trained(tmp_path / "run", aligned_emoji, *engine, ranks=2)
    for key in ("alignment", "loss", "grad_norm"):
        ours, theirs = recorded(run, key), recorded(plain, key)
        assert ours[1] == pytest.approx(theirs[1], rel=1e-5, abs=1e-6)
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-3)
    ours, theirs = tensors(run, 12), tensors(plain, 12)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).abs().max() < 5e-3 for name in theirs if name.startswith("alignment/"))
    before = recorded(run, "alignment")
    rmtree(run / "checkpoints" / "step-00000012")
    trained(run, aligned_emoji, *engine, "--resume", ranks=2)
    assert recorded(run, "alignment") == pytest.approx(before, rel=1e-5, abs=1e-6)


def test_killed_and_resumed_aligns_as_uninterrupted_bit_for_bit(tmp_path, aligned_emoji, plain):
    run = tmp_path / "run"
    running = train(run, aligned_emoji, *ALIGNED, *SHORT)
    wait_for(lambda: (run / "checkpoints" / "step-00000006").is_dir() and 7 in losses(run), running)
    running.kill()
    running = train(run, aligned_emoji, *ALIGNED, *SHORT, "--resume")
    assert running.wait() == [0], running.output
    for key in ("alignment", "loss"):
        assert recorded(run, key) == recorded(plain, key)
    ours, theirs = tensors(run, 12), tensors(plain, 12)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_it_ends_after_its_share_of_the_steps_and_leaves_the_model_alone(tmp_path, aligned_emoji, plain):
    run = trained(tmp_path / "run", aligned_emoji, "alignment={encoder: efficientnet, block: 1, width: 16, until: 0.5}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "alignment" in line] == list(range(1, 7))
    assert [line["loss"] for line in lines[:7]] == [loss for step, loss in losses(plain).items() if step < 8]
    assert lines[11]["loss"] != losses(plain)[12]
    end, middle = tensors(run, 12), tensors(run, 6)
    projector = [name for name in end if name.startswith("alignment/")]
    assert all(end[name].equal(middle[name]) for name in projector)
    names = {name for name in end if name.startswith("model/")}
    with safe_open(run / "checkpoints" / "step-00000012" / "model.safetensors", "pt") as exported:
        assert {f"model/{name}" for name in exported.keys()} == names  # noqa: SIM118
    assert not list((run / "checkpoints" / "step-00000012").glob("alignment*"))
    drawn = microdit("sample", run, "owl", "--steps", 2, "--out", tmp_path / "x.png", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.output


def test_flops_and_memory_are_counted_with_it(aligned_emoji):
    recipe = load_recipe(RECIPE, [f"data.path={aligned_emoji}", *ALIGNED])
    assert shapes_of(recipe).feature_channels == 1280
    assert shapes_of(load_recipe(RECIPE, ["data.path=nowhere", "alignment={encoder: some/dino, block: 1}"])).feature_channels == 768


def test_what_the_data_lack_is_a_sentence_with_the_command(tmp_path, aligned_emoji, encoded_emoji):
    recipe = load_recipe(RECIPE, [f"data.path={encoded_emoji}", *ALIGNED])
    command = r"microdit data encode .* --out .*/emoji-features --resolutions 16 --autoencoder pixels --text-encoder minilm --features eff"
    with pytest.raises(UserError, match=rf"alignment.encoder is efficientnet, and .*/emoji holds no features of images: .*: {command}"):
        open_dataset(recipe, pytest.fail)
    recipe = load_recipe(RECIPE, [f"data.path={aligned_emoji}", "alignment={encoder: facebook/dinov2-base, block: 1}"])
    with pytest.raises(UserError, match=r"alignment.encoder is facebook/dinov2-base, and .* holds features of efficientnet: leave out"):
        open_dataset(recipe, pytest.fail)


def test_sets_of_other_features_are_not_mixed(tmp_path, aligned_emoji):
    other = tmp_path / "other"
    other.mkdir()
    for path in aligned_emoji.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    card = from_checked_json((other / MANIFEST).read_bytes())
    card["features"]["fingerprint"] = "0" * 16
    (other / MANIFEST).write_bytes(to_checked_json(card))
    sets = f"data={{sets: {{a: {{path: {aligned_emoji}}}, b: {{path: {other}}}}}}}"
    with pytest.raises(UserError, match="hold features of efficientnet of different weights or grids"):
        open_dataset(load_recipe(RECIPE, [sets, *ALIGNED]), pytest.fail)
    assert len(open_dataset(load_recipe(RECIPE, [sets]), pytest.fail).sets) == 2


def test_a_block_that_does_not_exist_is_a_sentence():
    with pytest.raises(UserError, match=r"alignment.block is 3, and the backbone has 2 blocks \(model.depth\): take one of 1 to 2"):
        load_recipe(RECIPE, ["alignment={encoder: efficientnet, block: 3}"])


def test_other_weights_to_start_from_are_the_models_alone(tmp_path, aligned_emoji, plain):
    run = tmp_path / "run"
    running = train(run, aligned_emoji, *ALIGNED, *SHORT, f"init_from={plain}")
    assert running.wait() == [0], running.output
    assert "gives the model its weights; the projector of alignment starts from random ones" in running.output
    assert recorded(run, "alignment")[1] < recorded(plain, "alignment")[12] - 0.03


def test_adding_an_alignment_to_a_run_that_has_none_is_a_sentence(tmp_path, aligned_emoji):
    run = tmp_path / "run"
    running = train(run, aligned_emoji, *SHORT, "phases.1.steps=1")
    assert running.wait() == [0], running.output
    more = train(run, aligned_emoji, *SHORT, *ALIGNED, "--resume", "--accept-changes")
    assert more.wait() == [1]
    assert "has no projector, since it was trained without alignment: leave alignment out, or start another run" in more.output
    assert "(init_from)" in more.output


def test_a_source_of_a_recipe_is_encoded_with_the_features(tmp_path):
    own_pictures(tmp_path / "pictures", 12)
    recipe = RECIPE.read_text().replace("data: {path: set-by-the-test}", "data: {sets: {mine: {source: pictures}}}")
    (tmp_path / "recipe.yaml").write_text(recipe)
    settings = ("data.resolution=32", "data.autoencoder=pixels", "phases.0.steps=1", "phases.1.steps=1", *ALIGNED)
    running = start(tmp_path / ".logs", ["train", "recipe.yaml", "--out", "run", *settings], cwd=tmp_path)
    assert running.wait() == [0], running.output
    (folder,) = (tmp_path / ".logs" / "cache" / "microdit" / "encoded").glob("[0-9a-f]*")
    assert EncodedDataset(folder).feature_shape() == (1280, 2, 2)
    assert sorted(recorded(tmp_path / "run", "alignment")) == [1, 2]
