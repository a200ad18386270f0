"""What a run says of itself, damaged: what cannot be read is dropped, said once, and kept aside; nothing gives a traceback."""

import json
import shlex
import sys

import pytest

from microdit.config.load import load_recipe
from microdit.errors import UserError
from microdit.reports.run_folder import RunFolder
from microdit.reports.run_page import report_page
from microdit.reports.run_table import list_runs, runs_table
from microdit.training.logging import RunRecord, last_cost
from tests.damage import flips
from tests.training.processes import RECIPE

LINES = [json.dumps({"step": step, "loss": 0.5, "phase": "all", "gpu_hours": step / 10, "time": 1.8e9}) for step in (1, 2, 3, 4, 5, 6)]


@pytest.fixture
def recipe():
    return load_recipe(RECIPE)


def steps(run) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_lines_that_cannot_be_read_are_dropped_said_once_and_kept_aside(tmp_path, recipe):
    joined, cut, flipped = LINES[1] + LINES[2], LINES[3][:20], LINES[4].replace("loss", "l\udcffss")
    content = "\n".join([LINES[0], joined, cut, flipped, LINES[5], '{"step": tru', '{"step": "7"}', '{"step": -1}']) + "\n" + LINES[5][:9]
    raw = content.encode("utf-8", "surrogateescape")
    (tmp_path / "metrics.jsonl").write_bytes(raw)
    assert last_cost(tmp_path) == (0.6, 0.0)
    said: list[str] = []
    RunRecord(tmp_path, recipe, said.append, forget_after=6).close()
    assert len(said) == 1
    assert "6 lines of" in said[0]
    assert "metrics.jsonl are damaged, and dropped (2, 3, 4, 6, 7, 8). As it was it is kept in" in said[0]
    assert steps(tmp_path) == [1, 6]
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == raw
    RunRecord(tmp_path, recipe, pytest.fail, forget_after=6).close()
    assert steps(tmp_path) == [1, 6]


def test_half_a_last_line_is_no_damage(tmp_path, recipe):
    """Every kill may leave one, and its step is done again."""
    (tmp_path / "metrics.jsonl").write_text(f"{LINES[0]}\n{LINES[1][:-3]}")
    RunRecord(tmp_path, recipe, pytest.fail, forget_after=9).close()
    assert steps(tmp_path) == [1]
    assert [path.name for path in tmp_path.glob("metrics*")] == ["metrics.jsonl"]


def test_a_whole_last_line_that_is_damaged_is_reported(tmp_path, recipe):
    content = f"{LINES[0]}\n{LINES[1][:-3]}\n"
    (tmp_path / "metrics.jsonl").write_text(content)
    said: list[str] = []
    RunRecord(tmp_path, recipe, said.append, forget_after=9).close()
    assert len(said) == 1
    assert "metrics.jsonl are damaged, and dropped (2)" in said[0]
    assert (tmp_path / "metrics.jsonl.damaged-1").read_text() == content


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"starts": 3}', b'{"starts": [[]]}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_run_json_is_begun_anew_and_kept_aside(tmp_path, recipe, content):
    (tmp_path / "run.json").write_bytes(content)
    said: list[str] = []
    record = RunRecord(tmp_path, recipe, said.append, 0)
    for _ in range(2):
        record.started({}, {"device": "cpu"})
    record.close()
    assert len(said) == 1
    assert "run.json is damaged, and begun anew" in said[0]
    assert (tmp_path / "run.json.damaged-1").read_bytes() == content
    assert [start["device"] for start in RunFolder(tmp_path).starts] == ["cpu", "cpu"]


def test_no_flipped_byte_of_any_log_stops_a_run_or_its_readers(tmp_path, recipe):
    """One bit of each byte in turn: whoever reads goes on, and run.json and status.json are never wrong unnoticed."""
    record = RunRecord(tmp_path, recipe, pytest.fail, 0)
    record.started({"data": {"path": "data", "rows": 3}}, {"device": "cpu"})
    record.status("running", step=4, total_steps=9, loss=0.5, gpu_hours=0.1, seconds_left=9.5)
    record.close()
    healthy = RunFolder(tmp_path).starts
    for _ in flips(tmp_path / "run.json"):
        assert RunFolder(tmp_path).starts in ([], healthy)
    standing = RunFolder(tmp_path).status
    for at in flips(tmp_path / "status.json"):
        assert RunFolder(tmp_path).status == {} != standing
        runs_table(list_runs(tmp_path))
        if at % 20 == 0:  # slow
            report_page(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in LINES))
    for _ in flips(tmp_path / "metrics.jsonl"):
        lines, damaged = RunFolder(tmp_path).read_metrics()
        assert len(lines) + damaged <= len(LINES)
        assert all(isinstance(number, float) for number in last_cost(tmp_path))


def test_a_record_that_cannot_be_begun_is_a_sentence(tmp_path, recipe):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").mkdir()  # nobody can write a file of this name, root included
    record = RunRecord(tmp_path / "run", recipe, pytest.fail, 0)
    with pytest.raises(UserError, match=r"The record in .*run cannot be written: .*Make room on the disk, or choose another --out"):
        record.started({}, {})
    record.close()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"The record in .*file/run cannot be written"):
        RunRecord(tmp_path / "file" / "run", recipe, pytest.fail, 0)


def test_the_recorded_command_can_be_repeated_and_holds_no_secret(tmp_path, monkeypatch):
    typed = ["microdit", "train", "my recipe.yaml", "data.path=https://me:hidden@host/a?token=hidden", "hub.token=hidden", "--resume"]
    monkeypatch.setattr(sys, "argv", typed)
    record = RunRecord(tmp_path, load_recipe(RECIPE), print, 0)
    record.started({}, {})
    record.close()
    text = (tmp_path / "run.json").read_text()
    assert "hidden" not in text
    command = json.loads(text)["starts"][0]["command"]
    assert shlex.split(command) == [*typed[:3], "data.path=https://***@host/a?***", "hub.token=***", "--resume"]
