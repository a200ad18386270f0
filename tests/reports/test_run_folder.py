import json
import os
from functools import partial

import pytest

from microdit.config.load import load_recipe
from microdit.reports.run_folder import RunFolder
from microdit.reports.run_page import report_page
from microdit.training.logging import RunRecord
from tests.damage import ALL_BITS, flips
from tests.training.processes import RECIPE


@pytest.fixture
def run(tmp_path, encoded_emoji):
    """A run folder of two starts, as the trainer records them."""
    recipe = load_recipe(RECIPE, [f"data.path={encoded_emoji}"])
    for step in (0, 20):
        record = RunRecord(tmp_path, recipe, pytest.fail, step)
        record.started({"data": {"path": "x", "rows": 40}}, {"world_size": 1, "device": "cpu", "from_step": step})
        record.close()
    return RunFolder(tmp_path)


@pytest.mark.parametrize("bits", [None, pytest.param(ALL_BITS, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_run_json_is_noticed(run, bits):
    assert [start["from_step"] for start in run.starts] == [0, 20]
    assert not run.has_damaged_record
    before = run.record
    for _ in flips(run.path / "run.json", bits=bits):
        assert (run.record, run.starts, run.has_damaged_record) == ({}, [], True)
    assert run.record == before


@pytest.mark.parametrize("instead", ["folder", "link to itself", "pipe"])
def test_nobody_waits_for_what_lies_in_a_files_place(run, instead):
    for name in ("run.json", "status.json", "metrics.jsonl", "samples/step-00000001.png"):
        path = run.path / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        {"folder": path.mkdir, "link to itself": partial(path.symlink_to, path.name), "pipe": partial(os.mkfifo, path)}[instead]()
    assert (run.record, run.status, run.read_metrics()) == ({}, {}, ([], 0))
    assert b"run.json is damaged" not in report_page(run.path)


def test_the_report_says_that_run_json_is_damaged(run):
    assert b"run.json is damaged" not in report_page(run.path)
    for _ in flips(run.path / "run.json", [300]):
        assert b"run.json is damaged" in report_page(run.path)


def test_a_run_is_modified_when_its_metrics_status_or_samples_are(tmp_path):
    assert RunFolder(tmp_path).modified == 0
    (tmp_path / "samples").mkdir()
    for time, name in enumerate(("samples", "metrics.jsonl", "status.json"), start=10):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time, time))
        assert RunFolder(tmp_path).modified == time


def test_a_run_json_of_an_earlier_version_is_read_as_it_is(run):
    (run.path / "run.json").write_text(json.dumps({"name": "old", "starts": [{"from_step": 0}, "strange"]}))
    assert run.record["name"] == "old"
    assert run.starts == [{"from_step": 0}]
    (run.path / "run.json").write_text(json.dumps({"starts": {"a": 1}}))
    assert run.starts == []
