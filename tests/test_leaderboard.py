"""The README's leaderboard is what the committed results say."""

import runpy
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


def test_the_readme_holds_the_table_of_the_committed_results():
    script = runpy.run_path(str(PROJECT / "benchmarks" / "leaderboard.py"))
    table = script["leaderboard"](PROJECT / "docs" / "results")
    readme = (PROJECT / "README.md").read_text()
    assert script["with_table"](readme, table) == readme, "run python benchmarks/leaderboard.py --write"
    assert table.count("\n") == 2 + len(list((PROJECT / "docs" / "results").glob("*.json")))
    shares = [float(line.split("|")[7].split("%")[0]) for line in table.splitlines()[2:]]
    assert shares == sorted(shares, reverse=True)
    with pytest.raises(ValueError, match="substring not found"):
        script["with_table"]("a README without marks", table)


def test_a_run_that_is_not_finished_is_not_recorded(tmp_path):
    script = runpy.run_path(str(PROJECT / "benchmarks" / "leaderboard.py"))
    with pytest.raises(Exception, match="is not finished: train it to its end first"):
        script["record"](tmp_path)
