"""The published figures: every row whole, every figure possible, and the page made of nothing else."""

import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from microdit.evaluation.geneval.rules import TASKS
from microdit.evaluation.published import METRICS, TITLES, PublishedResult, Training, load_published, metric_cell

PAGE = Path(__file__).parents[2] / "docs" / "reference-results.md"
ROWS = [pytest.param(row, id=f"{table}: {row.name}") for table in TITLES for row in load_published().tables[table]]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_a_source_and_possible_figures(row: PublishedResult):
    assert row.name
    assert row.source
    for field in fields(Training):
        value = getattr(row, field.name)
        assert value is None or field.name == "gpu" or (value > 0 and math.isfinite(value))
    assert row.gpu is None or row.gpu_days is not None
    for metric, value in row.metrics.items():
        assert metric in METRICS
        assert math.isfinite(value)
        shares = (*TASKS, "overall", "preferred")
        assert 0 <= value <= 1 if metric in shares else value > 0
    assert (row.protocol is None) == (not row.metrics)
    assert row.protocol is None or row.protocol in load_published().protocols


@pytest.mark.parametrize("table", TITLES)
def test_names_are_unique_within_a_table(table: str):
    rows = load_published().tables[table]
    assert rows
    assert len({row.name for row in rows}) == len(rows)


def test_ablations_alone_are_of_studies_that_stand_together():
    tables = load_published().tables
    assert not any(row.study for table in ("main", "geneval") for row in tables[table])
    studies = [row.study for row in tables["ablations"]]
    assert all(studies)
    assert len(dict.fromkeys(studies)) == sum(a != b for a, b in zip(studies, [None, *studies], strict=False))


@pytest.mark.parametrize("row", [row for row in load_published().tables["geneval"] if len(row.metrics) == 7], ids=lambda row: row.name)
def test_the_overall_of_geneval_is_the_mean_of_its_six_tasks(row: PublishedResult):
    """But for rounding; the row whose mean is further off says so itself."""
    mean = sum(row.metrics[task] for task in TASKS) / len(TASKS)
    if abs(mean - row.metrics["overall"]) > 0.0101:
        assert row.note
        assert f"{mean:.3f}" in row.note
    assert abs(mean - row.metrics["overall"]) < 0.02


def test_what_the_releases_readme_says_is_here():
    """https://github.com/SonyResearch/micro_diffusion: FID and GenEval of the four released models."""
    names = [row.name for row in load_published().tables["main"] if row.source.startswith("README of SonyResearch/micro_diffusion")]
    fid = {row.name: row.metrics["fid"] for row in load_published().tables["main"] if row.name in names}
    overall = {row.name: row.metrics["overall"] for row in load_published().tables["geneval"] if row.name in names}
    assert [(fid[name], overall[name]) for name in names] == [(12.66, 0.46), (12.72, 0.46), (13.04, 0.40), (13.26, 0.52)]


def test_the_page_is_what_the_command_prints():
    printed = subprocess.run([sys.executable, "-m", "microdit.evaluation.published"], capture_output=True, check=True).stdout
    assert PAGE.read_bytes() == printed, f"python -m microdit.evaluation.published > {PAGE}"


def test_training_is_written_as_people_read_it():
    training = Training(parameters=1_160_000_000, images=37_000_000, seen=4_800, gpu_days=20.8, gpu="H100", dollars=1890)
    assert training.cells() == ["1.16 B", "37 M", "4,800", "20.8 H100", "$1,890"]
    assert Training(gpu_days=0.05).cells() == ["–", "–", "–", "0.05", "–"]
    assert (metric_cell("fid", 9.4), metric_cell("overall", 0.4), metric_cell("fid", None)) == ("9.4", "0.40", "–")
