"""`microdit lab run --jobs`: processes that share a study, which are stopped together and continue."""

import re
import sys

import pytest

from microdit.errors import UserError
from microdit.io.console import QUIET
from microdit.io.locks import try_lock
from microdit.lab.run_study import read_results
from microdit.lab.side_by_side import run_side_by_side
from microdit.lab.study import load_study
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
on_cpu: {steps: 4, seeds: [0, 1], arms: {none: [], deferred: []}}
"""
EXPECTED = {(arm, seed, step) for arm in ("none", "deferred") for seed in (0, 1) for step in (2, 4)}


@pytest.fixture
def place(workplace):
    (workplace / "base.yaml").write_text(BASE)
    (workplace / "shared.yaml").write_text(STUDY)
    return workplace


@pytest.mark.slow  # two cold processes and eight measurements; test_run_study.py kills and continues a study of one process
def test_a_stopped_study_continues_and_measures_everything_once(place):
    out = place / "lab" / "shared-cpu"
    running = start(place / ".logs", ["lab", "run", "shared.yaml", "--jobs", "2"], cwd=place)
    wait_for(lambda: len(read_results(out)) >= 1, running)
    running.processes[0].terminate()  # SIGTERM, as before a machine is taken away
    assert running.wait() == [75], running.output
    assert "The same command continues it where it stopped" in running.output
    before = read_results(out)
    assert 1 <= len(before) < len(EXPECTED)
    done = microdit("lab", "run", "shared.yaml", cwd=place)  # one process goes on where two were stopped
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


@pytest.mark.parametrize("minutes", ["nan", "inf", "-1", "1e9"])
def test_a_time_that_is_none_is_refused(place, minutes):
    refused = microdit("lab", "run", "shared.yaml", "--minutes", minutes, cwd=place)
    assert refused.returncode == 1
    assert refused.output.endswith(f"Error: --minutes is {float(minutes)}: it must be from 0 to 1,000,000.")


def test_a_killed_process_is_named_with_its_signal_and_the_others_stop(tmp_path):
    """The first to start is killed; the other, which would sleep for an hour, is asked to stop."""
    script = "import os, sys, time; os.mkdir('first') if not os.path.exists('first') else time.sleep(3600); print('begun', flush=True)"
    command = [sys.executable, "-c", f"import os, signal; os.chdir({str(tmp_path)!r}); {script}; os.kill(os.getpid(), signal.SIGKILL)"]
    study, recipes = load_study("lab/masking")
    with pytest.raises(UserError) as failure:
        run_side_by_side(study, recipes, command, tmp_path / "out", 2, QUIET)
    assert re.fullmatch(
        rf"1 of 2 processes failed, killed by SIGKILL\. The end of {tmp_path}/out/logs/[01]\.txt: begun", str(failure.value)
    )


def test_processes_of_two_commands_have_logs_of_their_own(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "1.txt").write_text("of a process that has ended")
    study, recipes = load_study("lab/masking")
    with (tmp_path / "logs" / "0.txt").open("w") as of_another_command:
        of_another_command.write("kept")
        of_another_command.flush()
        assert try_lock(of_another_command, tmp_path)
        run_side_by_side(study, recipes, [sys.executable, "-c", "print('done')"], tmp_path, 2, QUIET)
    assert {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()} == {
        "0.txt": "kept",
        "1.txt": "done\n",
        "2.txt": "done\n",
    }


def test_a_process_that_fails_is_shown_by_the_end_of_its_log(tmp_path):
    command = [sys.executable, "-c", "import sys; print('begun'); sys.exit('Error: There is no set at nowhere/at-all.')"]
    study, recipes = load_study("lab/masking")
    with pytest.raises(UserError) as failure:
        run_side_by_side(study, recipes, command, tmp_path / "out", 2, QUIET)
    assert re.fullmatch(  # one may have been stopped
        rf"[12] of 2 processes failed\. The end of {tmp_path}/out/logs/[01]\.txt: (begun\s+)?Error: There is no set at nowhere/at-all\."
        r"(\s+begun)?",
        str(failure.value),
    )
