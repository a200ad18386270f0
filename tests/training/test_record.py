import json
import shlex
import sys

from microdit.recipe_file import load_recipe
from microdit.training.record import RunRecord
from tests.training.processes import RECIPE


def test_the_command_that_is_recorded_can_be_typed_again_and_holds_no_secret(tmp_path, monkeypatch):
    typed = ["microdit", "train", "my recipe.yaml", "data.path=https://me:hidden@host/a?token=hidden", "hub.token=hidden", "--resume"]
    monkeypatch.setattr(sys, "argv", typed)
    record = RunRecord(tmp_path, load_recipe(RECIPE), print, 0)
    record.started({}, {})
    record.close()
    text = (tmp_path / "run.json").read_text()
    assert "hidden" not in text
    command = json.loads(text)["starts"][0]["command"]
    assert shlex.split(command) == [*typed[:3], "data.path=https://***@host/a?***", "hub.token=***", "--resume"]
