"""All runs at a glance, the dead ones as dead."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from microdit.errors import UserError
from microdit.io.console import PlainConsole
from microdit.reports.run_folder import RunFolder, state_of
from microdit.reports.run_table import list_runs, runs_table


def write_run(run: Path, **status: object) -> Path:
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: try\n")
    content = {
        "state": "running", "reason": None, "name": "try", "step": 50, "total_steps": 200, "phase": "masked", "loss": 0.5,
        "images_per_second": 12.5, "gpu_hours": 1.25, "dollars": None, "seconds_left": 90.0, "host": socket.gethostname(),
        "pid": os.getpid(), "time": time.time(), **status,
    }  # fmt: skip
    (run / "status.json").write_text(json.dumps(content))
    return run


def printed(runs, width=140) -> str:
    console = PlainConsole(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(runs_table(runs))
    return console.export_text()


def test_runs_are_found_three_folders_down_newest_first(tmp_path):
    now = time.time()
    write_run(tmp_path / "old", time=now - 100)
    write_run(tmp_path / "a" / "b" / "new", time=now)
    write_run(tmp_path / "a" / "b" / "c" / "too-deep")
    write_run(tmp_path / "old" / "samples" / "inside-a-run")
    write_run(tmp_path / ".trash" / "hidden")
    assert [str(run.path) for run in list_runs(tmp_path)] == ["a/b/new", "old"]
    assert [run.path for run in list_runs(tmp_path / "old")] == [Path()]


def test_a_run_says_how_far_it_is(tmp_path):
    write_run(tmp_path / "one")
    (run,) = list_runs(tmp_path)
    assert (run.name, run.state, run.step, run.total_steps, run.loss) == ("try", "running", 50, 200, 0.5)
    assert (run.images_per_second, run.gpu_hours, run.dollars, run.seconds_left) == (12.5, 1.25, None, 90.0)
    text = printed([run])
    for said in ("one", "running", "50", "25%", "0.5", "12.5", "1.25", "1 min 30 s", "0 s ago"):
        assert said in text


def test_a_process_that_was_killed_is_shown_as_killed(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        write_run(tmp_path / "run", pid=child.pid)
        assert list_runs(tmp_path)[0].state == "running"
    finally:
        child.kill()
        child.wait()
    (run,) = list_runs(tmp_path)
    assert run.state == "killed"
    assert run.seconds_left is None
    assert "killed" in printed([run])


def test_on_another_host_silence_decides(tmp_path):
    write_run(tmp_path / "fresh", host="elsewhere", pid=1, time=time.time() - 60)
    write_run(tmp_path / "silent", host="elsewhere", pid=1, time=time.time() - 16 * 60)
    assert {run.path.name: run.state for run in list_runs(tmp_path)} == {"fresh": "running", "silent": "killed"}


def test_only_a_running_state_is_doubted():
    dead = {"host": socket.gethostname(), "pid": 2**40, "time": 0}
    assert state_of({"state": "running", **dead}) == "killed"
    for state in ("finished", "stopped", "failed"):
        assert state_of({"state": state, **dead}) == state
    assert state_of({}) == "unknown"


def test_somebody_elses_process_is_alive(monkeypatch):
    def refuse(pid, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert state_of({"state": "running", "host": socket.gethostname(), "pid": 1, "time": 0}) == "running"


def test_runs_that_have_said_little_are_listed(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "recipe.yaml").write_text("name: new\n")
    write_run(tmp_path / "half")
    (tmp_path / "half" / "status.json").write_text('{"state": "runn')
    write_run(tmp_path / "lost", state="failed", loss=math.nan, total_steps=None)
    runs = {run.path.name: run for run in list_runs(tmp_path)}
    assert [runs[name].state for name in ("new", "half", "lost")] == ["unknown", "unknown", "failed"]
    assert "not finite" in printed(list(runs.values()))


def test_names_are_no_markup(tmp_path):
    write_run(tmp_path / "[red]run[" / "x", state="[bold]odd")
    text = printed(list_runs(tmp_path))
    assert "[red]run[/x" in text
    assert "[bold]odd" in text


def test_what_others_wrote_commands_no_terminal_and_fills_no_screen(tmp_path):
    write_run(tmp_path / "a\x1b[2J\u202eb", state="\x1b]0;title\x07\n" + "x" * 100_000, name="\x1b[31m")
    text = printed(list_runs(tmp_path))
    assert len(text.splitlines()) == 2
    assert r"a\u001b[2J\u202eb" in text
    assert r"\u001b]0;ti" in text


def test_a_table_of_eighty_columns_keeps_its_numbers(tmp_path):
    write_run(tmp_path / "emoji", step=20000, total_steps=20000, dollars=75.85, state="finished")
    text = printed(list_runs(tmp_path), width=80)
    for said in ("emoji", "finished", "20,000 100%", "$75.85", "ago"):
        assert said in text


def test_a_folder_that_is_missing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        list_runs(tmp_path / "missing")


def test_steps_that_were_trained_again_count_as_they_were_last(tmp_path):
    run = write_run(tmp_path / "run")
    lines = [{"step": 1, "loss": 1}, {"step": 2, "loss": 2}, {"step": 3, "loss": 3}, {"step": 2, "loss": 20}]
    text = "\n".join(json.dumps(line) for line in lines)
    (run / "metrics.jsonl").write_text(f'{text}\n[1]\n{{"step": 4, "lo{{"step": 4}}\n')
    metrics, damaged = RunFolder(run).read_metrics()
    assert [(line["step"], line["loss"]) for line in metrics] == [(1, 1), (2, 20)]
    assert damaged == 2
