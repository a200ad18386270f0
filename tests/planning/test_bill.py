"""The arithmetic of the bill, against numbers worked out by hand."""

import json
from dataclasses import replace

import pytest

from microdit.errors import UserError
from microdit.io.files import to_checked_json
from microdit.planning.bill import bill_of, comparison, evaluation_seconds, recorded_comparisons, settled
from microdit.planning.timings import Repeated, StepTime
from tests.planning.test_timings import TIMINGS, recipe_of

# 25 steps, then 15; a checkpoint every 20 steps, so at 20 and 40; grids every 16: at 16, 32 and 40; held-out losses every 30: at 30 and 40
EVENTS = ["record.checkpoint_every=20", "record.samples_every=16", "record.sample_prompts=[owl]"]
EVENTS += ["data.held_out=somewhere", "record.held_out_every=30"]


def lines_of(bill) -> dict[str, tuple[int, float]]:
    return {line.part: (line.times, line.seconds) for line in bill.lines}


def test_each_part_of_a_bill():
    bill = bill_of(recipe_of(*EVENTS), TIMINGS, to_encode=100)
    assert lines_of(bill) == {
        "encoding": (100, 5.0),  # at 20 a second
        "start": (1, 2.0),
        "steps of masked": (25, 25 * 0.5 + 1.0),
        "steps of full": (15, 15 * 0.25 + 0.5),
        "checkpoints": (2, 2 * 0.125 + 3.0),  # the first is written while 20 steps of 0.44 s go on
        "sample grids": (3, 5.0 + 2 * 1.0),
        "held-out losses": (2, 0.75 + 0.5),
    }
    assert bill.seconds == 5 + 2 + 13.5 + 4.25 + 3.25 + 7 + 1.25
    assert bill.memory_gb == 1.5
    assert [line.seconds for line in bill.steps] == [13.5, 4.25]


def test_what_is_not_asked_for_or_was_not_timed_costs_nothing():
    assert "sample grids" not in lines_of(bill_of(recipe_of(), TIMINGS))
    assert "held-out losses" not in lines_of(bill_of(recipe_of(*EVENTS), replace(TIMINGS, held_out=None)))
    assert "encoding" not in lines_of(bill_of(recipe_of(), replace(TIMINGS, pictures_encoded_per_second=None), to_encode=100))


def test_quality_is_measured_when_it_is_due_and_at_the_end():
    timed = replace(TIMINGS, quality=Repeated(4.0, 3.0))
    assert lines_of(bill_of(recipe_of("record.quality_every=15"), timed))["image quality"] == (3, 4.0 + 2 * 3.0)  # at 15, 30, 40
    assert "image quality" not in lines_of(bill_of(recipe_of(), timed))


def test_frechet_distances_are_measured_when_due_and_at_the_end():
    """At 15, 30 and 40; each picture by 9 steps, half of those that a picture was timed for."""
    asked = ["record.fid_every=15", "record.fid_reference=somewhere", "record.fid_samples=100", "record.sample_steps=9"]
    timed = replace(TIMINGS, picture=2.0, features=0.5)
    bill = bill_of(recipe_of(*asked), timed)
    assert lines_of(bill)["Frechet distances"] == (3, 3 * 100 * (1.0 + 0.5))
    assert "those of record.fid_reference, computed once, are not in it" in bill.notes[-1]
    assert "Frechet distances" not in lines_of(bill_of(recipe_of(*asked), replace(timed, picture=None)))
    assert "Frechet distances" not in lines_of(bill_of(recipe_of(), timed))


def test_training_waits_for_checkpoints_that_are_overtaken():
    slow = replace(TIMINGS, steps=(StepTime(0, False, 0.25, 0, 8), StepTime(1, False, 0.25, 0, 6)))
    # every 4 steps of 0.25 s, 10 in all: the loop waits 3 - 1 = 2 s at each of 9, and 3 s for the last
    assert lines_of(bill_of(recipe_of("record.checkpoint_every=4"), slow))["checkpoints"] == (10, 10 * 0.125 + 9 * 2.0 + 3.0)


def test_a_phase_with_and_without_alignment_is_the_sum_of_both():
    timed = replace(TIMINGS, steps=(StepTime(0, True, 2.0, 0.5, 8), StepTime(0, False, 0.5, 0.25, 8), StepTime(1, False, 0.25, 0, 6)))
    bill = bill_of(recipe_of("alignment={encoder: efficientnet, block: 1, until: 0.25}"), timed)
    assert lines_of(bill)["steps of masked"] == (25, 10 * 2.0 + 0.5 + 15 * 0.5 + 0.25)


def test_evaluation_draws_256_pictures_and_looks_at_1512():
    assert evaluation_seconds(TIMINGS) == 256 * 0.25 + (512 + 1000) * 0.0625
    assert evaluation_seconds(replace(TIMINGS, picture=None)) is None


def test_plan_and_run_side_by_side():
    bill = bill_of(recipe_of(), TIMINGS)  # 2 + 13.5 + 4.25 + 3.25 = 23
    recorded = settled(bill, {"start": 4.0, "steps of masked": 27.0, "lost": 15.0}, 3.0, 36.0)
    found = comparison(json.loads(json.dumps(recorded)))
    assert (found.total.planned, found.total.actual, found.total.ratio) == (23.0, 46.0, 0.5)
    assert (found.memory.planned, found.memory.actual, found.memory.ratio) == (1.5, 3.0, 0.5)
    assert (found.dollars.planned, found.dollars.actual) == (pytest.approx(0.23), pytest.approx(0.46))  # a cent a second
    rows = {row.what: (row.planned, row.actual) for row in found.parts}
    assert rows["steps of masked"] == (13.5, 27.0)
    assert rows["checkpoints"] == (3.25, None)
    assert rows["lost"] == (None, 15.0)


def test_without_a_plan_and_without_a_price_only_the_run_is_known():
    found = comparison(settled(None, {"start": 4.0}, 3.0, None))
    assert not found.has_plan
    assert (found.total.planned, found.total.actual, found.total.ratio) == (None, 4.0, None)
    assert (found.dollars.planned, found.dollars.actual) == (None, None)


@pytest.mark.parametrize("said", [{}, {"planned": 3, "actual": []}, {"actual": {"parts": {"start": "x"}, "seconds": True}}])
def test_a_record_of_others_is_read_without_harm(said):
    found = comparison(said)
    assert (found.total.planned, found.total.actual) == (None, None)


def test_runs_without_a_bill_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="There is no run in"):
        recorded_comparisons(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "recipe.yaml").write_text("name: one\n")
    with pytest.raises(UserError, match="holds no finished run whose cost was recorded"):
        recorded_comparisons(tmp_path)
    bill = settled(None, {"start": 4.0}, None, None)
    (tmp_path / "one" / "run.json").write_bytes(to_checked_json({"bill": bill}))
    assert recorded_comparisons(tmp_path)["one"] == recorded_comparisons(tmp_path / "one")["one"] == comparison(bill)
    (tmp_path / "one" / "run.json").write_bytes(to_checked_json({"bill": bill}).replace(b"4.0", b"1.0"))
    with pytest.raises(UserError, match=r"an edited run\.json is not read"):
        recorded_comparisons(tmp_path)
