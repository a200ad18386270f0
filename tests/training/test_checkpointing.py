import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from microdit.checkpoint import find_weights, open_checkpoint
from microdit.config.load import load_recipe
from microdit.data.dataset import EncodedDataset
from microdit.distributed import start_world
from microdit.errors import UserError
from microdit.training.checkpointing import CheckpointWriter, load_into, newest_intact
from microdit.training.setup import describe, finished_checkpoint, model_config
from tests.damage import ALL_BITS, flips
from tests.training.processes import RECIPE


@pytest.fixture(scope="module")
def world():
    return start_world("cpu")


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model/w": torch.full((3, 2), value), "ema/w": torch.full((3, 2), -value), "optimizer/w/step": torch.tensor(value)}


def save(saver: CheckpointWriter, step: int) -> None:
    saver.save(step, tensors(float(step)), {"note": step}, ["model", "ema"])


def steps(run) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").iterdir())


def test_what_is_saved_is_loaded_and_whole_weights_lie_beside_it(tmp_path, world):
    saver = CheckpointWriter(tmp_path, world, keep=2, keep_every=None, warn=pytest.fail)
    save(saver, 7)
    assert saver.finish()
    checkpoint = newest_intact(tmp_path, world, pytest.fail)
    into = tensors(0.0)
    load_into(checkpoint, into, world)
    assert all(into[name].equal(tensor) for name, tensor in tensors(7.0).items())
    assert checkpoint.state["note"] == 7
    assert load_file(checkpoint.folder / "ema.safetensors")["w"].tolist() == [[-7, -7]] * 3
    assert checkpoint.weights == ["ema", "model"]
    with pytest.raises(UserError, match="does not hold what this recipe's training needs"):
        load_into(checkpoint, {"model/other": torch.zeros(3)}, world)


def test_what_is_saved_is_of_the_moment_of_saving(tmp_path, world):
    """Training goes on in the same tensors while they are written."""
    saver = CheckpointWriter(tmp_path, world, keep=2, keep_every=None, warn=pytest.fail)
    live = {"model/w": torch.ones(400, 400)}
    saver.save(1, live, {}, ["model"])
    live["model/w"].fill_(2.0)
    saver.finish()
    assert load_file(tmp_path / "checkpoints" / "step-00000001" / "model.safetensors")["w"].eq(1).all()


def test_the_newest_are_kept_and_every_nth_for_ever(tmp_path, world):
    saver = CheckpointWriter(tmp_path, world, keep=2, keep_every=10, warn=pytest.fail)
    for step in range(4, 28, 4):
        save(saver, step)
    saver.finish()
    assert steps(tmp_path) == [20, 24]
    for step in (30, 31, 32):
        save(saver, step)
    saver.finish()
    assert steps(tmp_path) == [20, 30, 31, 32]


def test_one_without_whole_weights_is_put_together_from_its_shards(tmp_path, world):
    """As it is saved before a machine is taken away."""
    saver = CheckpointWriter(tmp_path, world, keep=2, keep_every=None, warn=pytest.fail)
    saver.save(7, tensors(7.0), {}, [])
    saver.finish()
    found = find_weights(tmp_path, pytest.fail)
    assert {path.name for path in found.folder.iterdir()} == {"shards", "state.json"}
    assert found.weights == ["ema", "model"]
    for part in found.weights:
        assert found.tensors(part)["w"].equal(tensors(7.0)[f"{part}/w"])


def test_an_old_one_loses_its_name_before_its_files(tmp_path, world, monkeypatch):
    """Whoever looks while it is deleted sees all of its files, or no checkpoint of that name."""
    emptied: list[str] = []

    def rmtree(path, ignore_errors=False, remove=shutil.rmtree):
        emptied.extend([path.name] if path.exists() else [])
        remove(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    saver = CheckpointWriter(tmp_path, world, keep=1, keep_every=None, warn=pytest.fail)
    for step in (1, 2, 2):
        save(saver, step)
        assert saver.finish()
    assert steps(tmp_path) == [2]
    assert emptied == [".step-00000001.old.part", ".step-00000002.old.part"]


def test_a_save_that_fails_warns_leaves_nothing_and_the_next_one_works(tmp_path, world):
    said: list[str] = []
    saver = CheckpointWriter(tmp_path, world, keep=2, keep_every=None, warn=said.append)
    save(saver, 1)
    saver.finish()
    in_the_way = tmp_path / "checkpoints" / "step-00000002"
    in_the_way.write_text("not a folder")
    save(saver, 2)
    assert not saver.finish()
    assert saver.failed == 1
    assert "The checkpoint of step 2 could not be written" in said[0]
    assert "earlier checkpoints are intact: make room on the disk" in said[0]
    in_the_way.unlink()
    assert steps(tmp_path) == [1]
    save(saver, 3)
    assert saver.finish()
    assert steps(tmp_path) == [1, 3]


def test_what_a_killed_process_left_half_done_is_cleared_away(tmp_path, world):
    half = tmp_path / "checkpoints" / ".step-00000009.part"
    (half / "shards").mkdir(parents=True)
    CheckpointWriter(tmp_path, world, keep=2, keep_every=None, warn=pytest.fail)
    assert not half.exists()


def test_every_single_flipped_bit_is_noticed(tmp_path, world):
    saver = CheckpointWriter(tmp_path, world, keep=5, keep_every=None, warn=pytest.fail)
    for step in (1, 2):
        save(saver, step)
    saver.finish()
    folder = tmp_path / "checkpoints" / "step-00000002"
    generator = torch.Generator().manual_seed(0)
    for path in sorted(p for p in folder.rglob("*.safetensors")):
        content = path.read_bytes()
        for _ in range(20):
            at, bit = (int(torch.randint(n, (1,), generator=generator)) for n in (len(content), 8))
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
            said: list[str] = []
            assert newest_intact(tmp_path, world, said.append).step == 1
            assert path.name in said[0]
        path.write_bytes(content)
    assert newest_intact(tmp_path, world, pytest.fail).step == 2
    assert newest_intact(tmp_path, world, pytest.fail, skip=1).step == 1
    assert newest_intact(tmp_path, world, pytest.fail, skip=2) is None


@pytest.mark.parametrize("bits", [None, pytest.param(ALL_BITS, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_state_json_selects_the_previous_checkpoint(tmp_path, world, encoded_emoji, bits):
    recipe, data = load_recipe(RECIPE, [f"data.path={encoded_emoji}"]), EncodedDataset(encoded_emoji)
    saver = CheckpointWriter(tmp_path, world, keep=5, keep_every=None, warn=pytest.fail)
    for step in (20, recipe.total_steps):
        saver.save(step, tensors(float(step)), describe(recipe, model_config(recipe, data), data, [data]), ["model", "ema"])
    saver.finish()
    newest = tmp_path / "checkpoints" / f"step-{recipe.total_steps:08d}"
    assert finished_checkpoint(tmp_path, recipe, world)
    for _ in flips(newest / "state.json", bits=bits):
        with pytest.raises(UserError, match=f"{newest} is damaged"):
            open_checkpoint(newest)
    content = (newest / "state.json").read_bytes()
    for _ in flips(newest / "state.json", [content.index(b'"step": 40') + 8], bits=[0, 1]):  # 50 and 60
        said: list[str] = []
        assert not finished_checkpoint(tmp_path, recipe, world)
        assert newest_intact(tmp_path, world, said.append).step == 20
        assert said == [f"{newest} is damaged (its checksum differs)."]
    assert finished_checkpoint(tmp_path, recipe, world)


def test_a_shard_that_the_state_does_not_name_is_damage(tmp_path, world):
    """Such as one of a checkpoint of more processes, over which this one was copied: it would be read with the others."""
    saver = CheckpointWriter(tmp_path, world, keep=5, keep_every=None, warn=pytest.fail)
    for step in (1, 2):
        save(saver, step)
    saver.finish()
    shards = tmp_path / "checkpoints" / "step-00000002" / "shards"
    shutil.copy(next(shards.iterdir()), shards / "shard-00002-model-00001-of-00002.safetensors")
    said: list[str] = []
    assert newest_intact(tmp_path, world, said.append).step == 1
    assert "shards/shard-00002-model-00001-of-00002.safetensors" in said[0]


def test_the_manifest_names_every_file(tmp_path, world):
    saver = CheckpointWriter(tmp_path, world, keep=5, keep_every=None, warn=pytest.fail)
    save(saver, 1)
    saver.finish()
    folder = tmp_path / "checkpoints" / "step-00000001"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(json.loads((folder / "state.json").read_text())["files"]) == found - {"state.json"}
    assert all(name.endswith(".safetensors") for name in found - {"state.json"})  # nothing that could be a pickle
