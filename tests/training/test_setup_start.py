"""Several processes look at the runs and data that are there: one looks, all are told, each file is read by one of them."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest

from microdit.config.load import load_recipe
from microdit.data.manifest import MANIFEST, open_manifest
from microdit.distributed import World
from microdit.errors import UserError
from microdit.io import locks as folder_lock
from microdit.io.files import to_checked_json
from microdit.io.locks import sole_writer
from microdit.training.checkpointing import newest_intact
from microdit.training.parallel import keep_compiled
from microdit.training.setup import finished_checkpoint
from tests.training.processes import RECIPE, bytes_read, together
from tests.training.untrained import save_untrained


def resumed(world: World, encoded: Path, runs: list[Path]) -> list[tuple[int | None, int | None, int, list[str]]]:
    """Of each run: the step of its finished checkpoint, of its newest whole one, the bytes that each of both looks read, what was said."""
    recipe, found = load_recipe(RECIPE, [f"data.path={encoded}"]), []
    for run in runs:
        said: list[str] = []
        begin = bytes_read()
        finished = finished_checkpoint(run, recipe, world)
        between = bytes_read()
        newest = newest_intact(run, world, said.append)
        steps = (None if checkpoint is None else checkpoint.step for checkpoint in (finished, newest))
        found.append((*steps, (between - begin, bytes_read() - between), said))
    return found


def test_resuming_processes_read_each_byte_once_and_agree_on_damage(tmp_path, encoded_emoji):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    for step in (20, 40):
        save_untrained(whole, encoded_emoji, step)
    shutil.copytree(whole, damaged)
    model = damaged / "checkpoints" / "step-00000040" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"\x01")
    size = sum(path.stat().st_size for path in (whole / "checkpoints" / "step-00000040").rglob("*.safetensors"))
    ranks = together(2, resumed, encoded_emoji, [whole, damaged])
    for rank, results in enumerate(ranks):
        assert [steps for *steps, _, _ in results] == [[40, 40], [None, 20]], rank
        assert results[0][3] == []
        assert results[1][3] == [f"{model.parent} is damaged (model.safetensors: not what was written)."]
    for look in (0, 1):
        read = [results[0][2][look] for results in ranks]
        assert size <= sum(read) < 1.1 * size
        assert max(read) < 0.8 * size


def strangers(world: World, places: list[Path]) -> list[str]:
    """What this process, which sees another folder by the same names, is told of each."""
    os.chdir(places[world.rank])
    folder_lock.VISIBLE = 0.1
    said = []
    for name in ("same", "other", "gone", "cut"):
        try:
            open_manifest(Path(name), world)
            said.append("")
        except UserError as error:
            said.append(str(error))
    try:
        with sole_writer(Path("run"), world):
            said.append("")
    except UserError as error:
        said.append(str(error))
    return said


def test_processes_that_see_different_folders_are_told_which_and_where(tmp_path, encoded_emoji):
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        for name in ("same", "other", "gone", "cut"):
            shutil.copytree(encoded_emoji, place / name)
    card = json.loads((places[1] / "other" / MANIFEST).read_text())
    (places[1] / "other" / MANIFEST).write_bytes(
        to_checked_json({**{key: card[key] for key in card if key not in ("checked_by", "self_sha256")}, "rows": 39})
    )
    (places[1] / "gone" / MANIFEST).unlink()
    shard = next((places[0] / "cut").glob("*.arrow"))  # the first process looks
    shard.write_bytes(shard.read_bytes()[:-1])
    first, second = together(2, strangers, places)
    assert first == second
    same, other, gone, cut, run = first
    assert same == ""
    for what, said in (("other", other), ("run", run)):
        assert said.startswith(f"{what} is another folder to process 1 on ")
        assert " than to process 0 on " in said
        assert "Use a file system that all machines share" in said
    assert gone.startswith("process 1 on ")
    assert "There is no encoded data set in gone" in gone
    assert cut.startswith(f"cut/{shard.name} has {shard.stat().st_size} bytes, not ")
    assert not any((place / "run").exists() for place in places)


def test_a_shard_of_another_size_is_refused_alone_too(tmp_path, encoded_emoji):
    shutil.copytree(encoded_emoji, tmp_path / "set")
    next((tmp_path / "set").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match=r"\.arrow is missing: the data set is damaged; encode it again"):
        open_manifest(tmp_path / "set")


def test_a_folder_for_compiled_code_that_is_full_or_no_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    keep_compiled(tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    sentence = r"cache, where nothing can be written \(.*\): name another folder in TORCHINDUCTOR_CACHE_DIR"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # names can still be made there, as on a full disk
        with pytest.raises(UserError, match=sentence):
            keep_compiled(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=sentence):
        keep_compiled(tmp_path / "run")
