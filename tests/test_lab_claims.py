"""docs/lab/README.md holds every claim that was measured, as the committed results say."""

import runpy
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


def test_the_page_holds_the_table_of_the_committed_results():
    script = runpy.run_path(str(PROJECT / "benchmarks" / "lab_claims.py"))
    table, page = script["claims"](script["studies"]()), (PROJECT / "docs" / "lab" / "README.md").read_text()
    assert script["with_table"](page, table) == page, "run python benchmarks/lab_claims.py --write"
    assert all(f"| [{study.name}](" in table for study in script["studies"]() if study.claims)
    with pytest.raises(ValueError, match="substring not found"):
        script["with_table"]("a page without marks", table)
