"""The code of docs/python.md runs, in order, and draws what it says."""

import re
from pathlib import Path

import pytest

from tests.python_examples import own_pictures

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own_pictures(tmp_path / "my-pictures", 12)
    text = PAGE.read_text()
    found = list(BLOCK.finditer(text))
    assert len(found) > 8
    names: dict[str, object] = {}
    for block in found:
        lines = text[: block.start(1)].count("\n")
        exec(compile("\n" * lines + block[1], str(PAGE), "exec"), names)  # a traceback names the line of the page
    assert (tmp_path / "heart.png").exists()
    assert (tmp_path / "runs" / "mine" / "evaluation" / "report.html").exists()
    printed = capsys.readouterr().out
    assert "model.dim (100) is not divisible by model.head_dim" in printed
    assert "finished" in printed  # the run that was resumed had nothing left to do


@pytest.mark.parametrize(
    "name", ["sample", "encode_dataset", "train", "evaluate", "create_model", "list_models", "denoising_loss", "load_recipe"]
)
def test_the_page_shows_every_function(name):
    assert f"microdit.{name}(" in PAGE.read_text()
