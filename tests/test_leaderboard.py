"""The README's leaderboard is what the committed results say."""

import json
import runpy
from pathlib import Path

import pytest

from microdit.config.load import load_recipe
from microdit.errors import UserError

PROJECT = Path(__file__).parents[1]


def test_the_readme_holds_the_table_of_the_committed_results():
    script = runpy.run_path(str(PROJECT / "benchmarks" / "leaderboard.py"))
    table = script["leaderboard"](PROJECT / "docs" / "results")
    readme = (PROJECT / "README.md").read_text()
    assert script["with_table"](readme, table) == readme, "run python benchmarks/leaderboard.py --write"
    assert table.count("\n") == 2 + len(list((PROJECT / "docs" / "results").glob("*.json")))
    shares = [float(line.split("|")[8].split("%")[0]) for line in table.splitlines()[2:]]
    assert shares == sorted(shares, reverse=True)
    with pytest.raises(ValueError, match="substring not found"):
        script["with_table"]("a README without marks", table)


def test_a_run_that_is_not_finished_is_not_recorded(tmp_path):
    script = runpy.run_path(str(PROJECT / "benchmarks" / "leaderboard.py"))
    with pytest.raises(Exception, match="is not finished: train it to its end first"):
        script["record"]([tmp_path])


def test_several_seeds_of_a_recipe_are_one_line_with_their_spread(tmp_path):
    script = runpy.run_path(str(PROJECT / "benchmarks" / "leaderboard.py"))
    run = json.loads((PROJECT / "docs" / "results" / "emoji.json").read_text())[0]
    runs = [{**run, "seconds": seconds, "retrieval": {**run["retrieval"], "top_10": top_10}} for seconds, top_10 in ((60, 0.4), (120, 0.6))]
    (tmp_path / "emoji.json").write_text(json.dumps(runs))
    line = script["leaderboard"](tmp_path).splitlines()[2]
    assert "| 1 min 30 s | – | 2 | 50.0% ± 14.1% (" in line  # sqrt(0.1^2 + 0.1^2)


def test_different_recipes_or_equal_seeds_are_not_recorded_together(tmp_path, monkeypatch):
    script = runpy.run_path(str(PROJECT / "benchmarks" / "leaderboard.py"))
    monkeypatch.setitem(script["record"].__globals__, "record_one", lambda run: {"name": "emoji"})  # training two runs takes minutes
    for name, override in (("a", "seed=0"), ("b", "seed=1"), ("c", "optimizer.eps=1e-6")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(load_recipe("emoji", [override]).to_yaml())
    assert len(script["record"]([tmp_path / "a", tmp_path / "b"])) == 2
    with pytest.raises(UserError, match="are not of one recipe"):
        script["record"]([tmp_path / "b", tmp_path / "c"])
    with pytest.raises(UserError, match="each needs its own"):
        script["record"]([tmp_path / "a", tmp_path / "a"])
