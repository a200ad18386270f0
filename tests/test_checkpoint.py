import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

from microdit.checkpoint import Checkpoint, checkpoint_folders, deal, find_weights, open_checkpoint
from microdit.errors import UserError
from microdit.io.files import sha256_of, to_checked_json
from microdit.models.config import Size, resolve
from tests.conftest import routed


def write(run, step, names=("model", "ema"), to_json=to_checked_json):
    """A checkpoint as the trainer leaves it, of one tensor."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for name in names:
        save_file({"w": torch.full((3,), float(step))}, folder / f"{name}.safetensors")
    files = {path.name: sha256_of(path) for path in folder.iterdir()}
    (folder / "state.json").write_bytes(to_json({"step": step, "files": files}))
    return folder


def test_the_newest_is_found(tmp_path):
    for step in (1, 2, 10):
        write(tmp_path, step)
    found = find_weights(tmp_path, pytest.fail)
    assert found.step == 10
    assert found.tensors("ema")["w"].tolist() == [10, 10, 10]
    assert found.weights == ["ema", "model"]
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-00000010", "step-00000002", "step-00000001"]


def test_no_run_is_no_checkpoint(tmp_path):
    assert find_weights(tmp_path / "nowhere", pytest.fail) is None


def test_a_part_that_was_never_finished_is_not_a_checkpoint(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "checkpoints" / ".step-00000002.part").mkdir()
    assert find_weights(tmp_path, pytest.fail).step == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "state"])
def test_damage_is_noticed_and_the_one_before_is_taken(tmp_path, damage):
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    weights = folder / "ema.safetensors"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "delete":
        weights.unlink()
    else:
        (folder / "state.json").write_text("{}")
    said = []
    assert find_weights(tmp_path, said.append).step == 1
    assert len(said) == 1
    assert "step-00000002 is damaged" in said[0]
    (tmp_path / "checkpoints" / "step-00000001" / "state.json").write_text("[]")
    with pytest.raises(UserError, match=r"No checkpoint in .* holds whole weights"):
        find_weights(tmp_path, said.append)


def test_other_weights_may_be_asked_for_by_name(tmp_path):
    write(tmp_path, 1, ("model", "ema", "ema-0.9999"))
    assert find_weights(tmp_path, pytest.fail, "ema-0.9999").step == 1
    with pytest.raises(UserError, match=r"no weights named ema-0.5, only ema, ema-0.9999, model"):
        find_weights(tmp_path, pytest.fail, "ema-0.5")


def write_in_haste(run, step):
    """As the trainer leaves it before the machine is taken away, by two processes that held some rows each."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    (folder / "shards").mkdir(parents=True)
    for shard, rows in enumerate((slice(0, 3), slice(3, 4)), start=1):
        parts = {f"{part}/w": (torch.arange(8.0).reshape(4, 2) + sign * step)[rows] for part, sign in (("model", 1), ("ema", -1))}
        tensors = {**parts, "optimizer/w/step": torch.tensor([float(step)])[: rows.start == 0]}
        offsets = {name: {"saved_offsets": [rows.start] + [0] * (tensor.dim() - 1)} for name, tensor in tensors.items()}
        offsets["optimizer/w/step"] = {"saved_offsets": [0]}
        metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "format": "pt"}
        save_file(tensors, folder / "shards" / f"shard-{shard:05d}-model-00001-of-00001.safetensors", metadata)
    files = {f"shards/{path.name}": sha256_of(path) for path in (folder / "shards").iterdir()}
    (folder / "state.json").write_text(json.dumps({"step": step, "files": files}))
    return folder


def test_a_hasty_checkpoint_is_assembled_from_all_shards(tmp_path):
    write(tmp_path, 1)
    write_in_haste(tmp_path, 2)
    found = find_weights(tmp_path, pytest.fail)
    assert (found.step, found.weights) == (2, ["ema", "model"])
    assert found.tensors("ema")["w"].equal(torch.arange(8.0).reshape(4, 2) - 2)
    assert find_weights(tmp_path, pytest.fail, "model").tensors("model")["w"].equal(torch.arange(8.0).reshape(4, 2) + 2)
    with pytest.raises(UserError, match=r"no weights named ema-0\.5, only ema, model"):
        find_weights(tmp_path, pytest.fail, "ema-0.5")


def test_a_hasty_checkpoint_with_a_shard_too_many_is_damaged(tmp_path):
    write(tmp_path, 1)
    shards = write_in_haste(tmp_path, 2) / "shards"
    shutil.copy(min(shards.iterdir()), shards / "shard-00003.safetensors")
    said = []
    assert find_weights(tmp_path, said.append).step == 1
    assert "step-00000002 is damaged (shards/shard-00003.safetensors: not what was written)" in said[0]


def test_flipped_bytes_of_shards_are_noticed_before_assembly(tmp_path):
    write(tmp_path, 1)
    shards = sorted((write_in_haste(tmp_path, 2) / "shards").iterdir())
    for weights in (None, "ema", "model"):
        for path in shards:
            content = path.read_bytes()
            for at in range(0, len(content), 7):
                path.write_bytes(content[:at] + bytes([content[at] ^ 0x11]) + content[at + 1 :])
                said = []
                assert find_weights(tmp_path, said.append, weights).step == 1
                assert "step-00000002 is damaged" in said[0]
            path.write_bytes(content)
    shards[0].unlink()
    assert find_weights(tmp_path, lambda _: None).step == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    folder = write(tmp_path, 1)
    save_file({"w": torch.tensor([1.0, value]), "v": torch.ones(2)}, folder / "ema.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": 1, "files": {"ema.safetensors": sha256_of(folder / "ema.safetensors")}}))
    with pytest.raises(UserError, match=r"weights ema of .*step-00000001 are not finite in 1 of 2 tensors \(w\)"):
        find_weights(tmp_path, pytest.fail).tensors("ema")


def test_a_checkpoint_that_vanishes_while_it_is_looked_at_is_a_sentence(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path, 1))
    (checkpoint.folder / "ema.safetensors").unlink()
    assert checkpoint.damage_of("ema") == ["ema.safetensors"]
    with pytest.raises(UserError, match=r"is damaged .ema\.safetensors: not what was written, or gone"):
        checkpoint.tensors("ema")


def test_a_state_of_another_kind_is_damage(tmp_path):
    folder = write(tmp_path, 3)
    for content in ("", "{", "[1]", '{"step": 3}'):
        (folder / "state.json").write_text(content)
        with pytest.raises(UserError, match="damaged"):
            open_checkpoint(folder)


def without_checksum(state):
    """As earlier versions wrote it."""
    return json.dumps(state, indent=1).encode()


@pytest.mark.parametrize("to_json", [to_checked_json, without_checksum])
def test_a_folder_whose_state_is_of_another_step_is_damage(tmp_path, to_json):
    folder = write(tmp_path, 60, to_json=to_json)
    folder.rename(folder.with_name("step-00000020"))
    with pytest.raises(UserError, match=r"step-00000020 is damaged \(its state is of step 60\)"):
        open_checkpoint(folder.with_name("step-00000020"))
    copied = folder.with_name("step-00000020").rename(tmp_path / "my copy")
    assert open_checkpoint(copied).step == 60


def test_a_state_of_an_earlier_version_is_read_as_it_is(tmp_path):
    write(tmp_path, 3, to_json=without_checksum)
    assert find_weights(tmp_path, pytest.fail).tensors("model")["w"].tolist() == [3, 3, 3]


def test_tensors_are_compared_before_they_are_used(tmp_path):
    """Also by whoever names a checkpoint's own folder, where nothing has looked for damage before."""
    folder = write(tmp_path, 3)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors("ema")["w"].tolist() == [3, 3, 3]
    with pytest.raises(UserError, match=r"step-00000003 is damaged \(model\.safetensors: not what was written"):
        checkpoint.tensors("model")


@pytest.mark.parametrize("routing", ["deferred", "maskdit", "sprint"])
def test_architectures_round_trip_and_old_ones_are_deferred_and_gated(tmp_path, routing):
    config = resolve(routed(Size(dim=32, depth=5, head_dim=8, mixer_dim=16, mixer_depth=1, num_experts=2, gated_ffn=False), routing))
    model = json.loads(json.dumps(asdict(config)))
    assert Checkpoint(tmp_path, 1, {"model": model}).model_config == config
    for key in ("routing", "dense_blocks", "decoder"):
        del model[key]
    for shape in model["blocks"] + model["mixer"]:
        del shape["gated"]
    old = Checkpoint(tmp_path, 1, {"model": model}).model_config
    stacks = {name: tuple(replace(shape, gated=True) for shape in getattr(config, name)) for name in ("blocks", "mixer")}
    assert old == replace(config, routing="deferred", dense_blocks=(0, 0), decoder=(), **stacks)


def test_architectures_of_later_networks_round_trip(tmp_path):
    size = Size(32, 5, 8, 32, 1, attention="joint", conditioning="none", positions="both", norm="rms", qk_norm="per_head", patch_channels=6)
    config = resolve(replace(size, caption_embedding="linear", caption_length=7, preamble_depth=2, attention_bias=True))
    assert Checkpoint(tmp_path, 1, {"model": json.loads(json.dumps(asdict(config)))}).model_config == config


def test_files_are_dealt_by_their_bytes():
    """As of a run of eight processes: whole weights, their average, and shards of all of it."""
    sizes = {"model": 4_660, "ema": 4_660, **{f"shard-{n}": 2_330 for n in range(8)}}
    for ranks in (1, 2, 3, 8, 64):
        hands = deal(sizes, ranks)
        assert sorted(name for hand in hands for name in hand) == sorted(sizes)
        assert max(sum(sizes[name] for name in hand) for hand in hands) <= max(4_660, 1.2 * sum(sizes.values()) / ranks)
    assert deal({}, 2) == [[], []]
