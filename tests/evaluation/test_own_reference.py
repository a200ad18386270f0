"""A run's own pictures as the reference of its evaluation."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from microdit.config.load import load_recipe
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.pixels import to_image, to_tensor
from microdit.data.sources.builtin import emoji_images, emoji_source
from microdit.distributed import start_world
from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError
from microdit.evaluation.own_reference import own_count, own_reference, trained_on_emoji
from microdit.io.files import from_checked_json, to_checked_json
from microdit.pipelines.pipeline import DEMO
from tests.commands import microdit
from tests.conftest import first_of
from tests.data.pictures import records_of
from tests.training.untrained import save_untrained


def hold_out(run, folder):
    recipe = load_recipe(run / "recipe.yaml", [f"data.held_out={folder}"])
    (run / "recipe.yaml").write_text(recipe.to_yaml())


def test_its_pictures_are_those_that_were_encoded_with_their_captions(tmp_path, encoded_emoji):
    run = save_untrained(tmp_path / "run", encoded_emoji, 2, torch.clone)
    source = own_reference(run, tmp_path / "out", start_world("cpu"))
    assert source.name == f"{encoded_emoji} (training set, as decoded)"
    rows = list(emoji_images("train"))[:40]
    (folder,) = (tmp_path / "out").glob("reference-*")
    assert [record.captions["caption"] for record in records_of(source)] == [row.caption for row in rows]
    for number in (0, 17, 39):
        expected = np.asarray(to_image(to_tensor(rows[number].image, 16)), np.int16)
        assert np.abs(np.asarray(Image.open(folder / f"{number:04}.png"), np.int16) - expected).max() <= 1
    before = (folder / "0000.png").stat().st_mtime_ns
    assert own_count(own_reference(run, tmp_path / "out", start_world("cpu"))) == 40
    assert (folder / "0000.png").stat().st_mtime_ns == before  # decoded once


def test_a_held_out_set_comes_first_unless_it_is_small(tmp_path, encoded_emoji, text_encoder):
    for count in (31, 32):
        encode_source(first_of(emoji_source("held_out"), count), tmp_path / str(count), EncodeSettings((16,)), Pixels(), text_encoder)
    run = save_untrained(tmp_path / "run", encoded_emoji, 2, torch.clone)
    hold_out(run, tmp_path / "31")
    assert "training set" in own_reference(run, tmp_path / "out", start_world("cpu")).name
    hold_out(run, tmp_path / "32")
    source = own_reference(run, tmp_path / "out", start_world("cpu"))
    assert source.name == f"{tmp_path / '32'} (held out, as decoded)"
    assert len(records_of(source)) == 32


def test_what_has_no_data_any_more_is_a_sentence(tmp_path, encoded_emoji):
    with pytest.raises(UserError, match=r"is no run folder\. Without one its data is unknown: name a set of pictures with --reference"):
        own_reference(tmp_path, tmp_path / "out", start_world("cpu"))
    copied = shutil.copytree(encoded_emoji, tmp_path / "set")
    run = save_untrained(tmp_path / "run", copied, 2, torch.clone)
    shutil.rmtree(copied)
    with pytest.raises(UserError, match=r"cannot be read. There is no encoded data set in .* Or name a set of pictures with --reference"):
        own_reference(run, tmp_path / "out", start_world("cpu"))


def test_runs_of_emoji_are_told_from_others(tmp_path, encoded_emoji):
    run = save_untrained(tmp_path / "run", encoded_emoji, 2, torch.clone)
    assert trained_on_emoji(str(run))
    assert trained_on_emoji(str(DEMO))
    assert not trained_on_emoji(str(tmp_path / "nowhere"))
    state = run / "checkpoints" / "step-00000002" / "state.json"
    content = from_checked_json(state.read_bytes())
    content["data"]["source"] = "emojis of mine"
    state.write_bytes(to_checked_json(content))
    assert not trained_on_emoji(str(run))


def test_the_command_measures_against_the_own_set(workplace, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = microdit("evaluate", "runs/tiny", "--metrics", "kid", "-n", 12, "--steps", 2, "--out", "own", cwd=workplace)
    assert done.returncode == 0, done.output
    assert "Compared with 106 pictures of data/emoji (training set, as decoded)." in done.output
    assert json.loads((workplace / "own" / "metrics.json").read_text())["pictures"] == 12
