"""microdit compare, as a person runs it."""

from pathlib import Path

from tests.cli.test_main import microdit
from tests.evaluation.run_folders import evaluated, trained


def test_a_run_is_laid_beside_what_is_published(tmp_path: Path):
    evaluated(trained(tmp_path / "runs" / "try"))
    done = microdit("compare", "runs/try", cwd=tmp_path)
    assert done.returncode == 0, done.output
    assert "FID 14.2 is comparable with coco-30k" in done.output
    assert "12.66, the run is 1.54 above" in done.output


def test_mistakes_end_in_a_sentence(tmp_path: Path):
    trained(tmp_path / "run")
    nowhere = microdit("compare", "nowhere", cwd=tmp_path)
    assert nowhere.returncode == 1
    assert "nowhere is not a run folder" in nowhere.output
    uneven = microdit("compare", "run", "run", "--geneval", "geneval", cwd=tmp_path)
    assert uneven.returncode == 1
    assert "--geneval was given 1 times for 2 runs" in uneven.output
