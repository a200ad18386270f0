"""A recipe's names of encoders, beside those that the encoded set records."""

from pathlib import Path
from shutil import copytree

import pytest

from microdit.config.load import load_recipe
from microdit.data.manifest import MANIFEST
from microdit.errors import UserError
from microdit.io.files import from_checked_json, to_checked_json
from microdit.training.setup import open_dataset
from tests.training.processes import RECIPE


@pytest.mark.parametrize(("key", "options"), [("autoencoder", ""), ("text_encoder", "?layer=-2&tokens=64")])
def test_a_relative_folder_is_the_one_that_was_encoded_with(tmp_path, monkeypatch, encoded_emoji, key, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "other").mkdir()
    data = Path(copytree(encoded_emoji, tmp_path / "data"))
    manifest = from_checked_json((data / MANIFEST).read_bytes())
    manifest[key]["name"] = str(tmp_path / "models" / "mine") + options  # as encoding records it
    (data / MANIFEST).write_bytes(to_checked_json(manifest))
    for name in ("models/mine", "./models/mine", str(tmp_path / "models/mine")):
        recipe = load_recipe(RECIPE, ["data.path=data", f"data.{key}={name}{options}"])
        assert len(open_dataset(recipe, pytest.fail).sets[0]) == 40
    for name in ("models/other", "elsewhere", f"models/mine{'' if options else '?layer=1'}"):
        with pytest.raises(UserError, match=f"data.{key} is {name.replace('?', chr(92) + '?')}, but data was encoded with .*mine"):
            open_dataset(load_recipe(RECIPE, ["data.path=data", f"data.{key}={name}"]), pytest.fail)
