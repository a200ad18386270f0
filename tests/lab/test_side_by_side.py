"""`microdit lab run --jobs`: processes that share a study, which are stopped together and continue."""

import re

import pytest

from microdit.lab.run_study import read_results
from tests.commands import microdit
from tests.lab.test_run_study import BASE
from tests.training.processes import start, wait_for

STUDY = """
name: shared
question: which?
source: encoded
reference: {arm: none, steps: 8}
seeds: [0, 1]
readings: [0.5, 1.0]
budgets: [images]
measures: [held_out_loss]
pictures: 4
num_inference_steps: 2
arms:
  none: [model.routing=none]
  deferred: [phases.0.mask_ratio=0.75]
  naive: [model.routing=naive, phases.0.mask_ratio=0.75]
on_cpu: {steps: 4, seeds: [0, 1], arms: [none, deferred]}
"""
EXPECTED = {(arm, seed, step) for arm in ("none", "deferred") for seed in (0, 1) for step in (2, 4)}


@pytest.fixture
def place(workplace):
    (workplace / "base.yaml").write_text(BASE)
    (workplace / "shared.yaml").write_text(STUDY)
    return workplace


def test_a_stopped_study_continues_and_measures_everything_once(place):
    out = place / "lab" / "shared-cpu"
    running = start(place / ".logs", ["lab", "run", "shared.yaml", "--jobs", "2"], cwd=place)
    wait_for(lambda: len(read_results(out)) >= 1, running)
    running.processes[0].terminate()  # SIGTERM, as before a machine is taken away
    assert running.wait() == [75], running.output
    assert "The same command continues it where it stopped" in running.output
    before = read_results(out)
    assert 1 <= len(before) < len(EXPECTED)
    done = microdit("lab", "run", "shared.yaml", "--jobs", "2", cwd=place)
    assert done.returncode == 0, done.output
    results = read_results(out)
    assert results[: len(before)] == before
    assert sorted((line["arm"], line["seed"], line["step"]) for line in results) == sorted(EXPECTED)
    reported = microdit("lab", "report", "shared.yaml", "--to", "docs-shared", cwd=place)
    assert reported.returncode == 0, reported.output
    page = (place / "docs-shared" / "README.md").read_text()
    assert "takes for 4 steps on a CPU. 2 seeds" in page
    assert "microdit lab run recipes/lab/shared.yaml --device cpu" in page
    assert "naive" not in page


def test_time_that_is_up_stops_a_study_cleanly(place):
    stopped = microdit("lab", "run", "shared.yaml", "--minutes", "0", "--arms", "none", "--out", "lab/short", cwd=place)
    assert stopped.returncode == 75, stopped.output
    assert "The same command continues it" in stopped.output


def test_a_process_that_fails_is_shown_by_the_end_of_its_log(place):
    (place / "shared.yaml").write_text(STUDY.replace("source: encoded", "source: nowhere/at-all"))
    failed = microdit("lab", "run", "shared.yaml", "--jobs", "2", "--out", "lab/failed", cwd=place)
    assert failed.returncode == 1, failed.output
    assert re.search(r"[12] of 2 processes failed. The end of lab/failed/logs/[01].txt", failed.output)  # the first stops the second
    assert "nowhere/at-all" in failed.output
