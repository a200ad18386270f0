import math

import pytest

from microdit.recipe import GuardRecipe
from microdit.training.guard import ENOUGH, Guard


def guard_that_saw(*losses: float) -> Guard:
    guard = Guard(GuardRecipe(loss_jump=10, rollback_after=3))
    for loss in losses:
        guard.accept(loss, "phase", 0)
    return guard


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_refused_from_the_first_step_on(loss, norm):
    assert "nan" in guard_that_saw().objection(loss, norm) or "inf" in guard_that_saw().objection(loss, norm)


def test_a_jump_is_refused_once_enough_is_known():
    assert guard_that_saw(*[0.5] * (ENOUGH - 1)).objection(6.0, 1.0) is None
    guard = guard_that_saw(*[0.5] * ENOUGH)
    assert guard.objection(4.9, 1.0) is None
    assert guard.objection(5.1, 1.0) == "the loss is 5.1, usual were 0.5"


def test_after_several_in_a_row_it_is_time_to_go_back_and_one_good_step_starts_the_count_anew():
    guard = guard_that_saw(1.0)
    assert [guard.skip(), guard.skip()] == [False, False]
    guard.accept(1.0, "phase", 0)
    assert [guard.skip(), guard.skip(), guard.skip()] == [False, False, True]
    assert guard.skipped == 5


def test_its_state_goes_through_a_checkpoint():
    guard = guard_that_saw(*[0.5] * ENOUGH)
    guard.skip()
    other = guard_that_saw()
    other.restore(guard.state())
    assert other.state() == guard.state()
    assert other.objection(6.0, 1.0)
    other.skip()
    other.roll_back(guard.state())
    assert (other.skipped, other.rollbacks, other.in_a_row) == (2, 1, 0)


def test_a_loss_that_stays_up_is_told_once_a_phase_and_learnt_from():
    guard = guard_that_saw()
    told = [guard.accept(loss, phase, 0) for phase, loss in [("masked", 0.5)] * 100 + [("full", 1.0)] * 100 + [("full", 1.5)] * 100]
    assert [bool(sentence) for sentence in told].count(True) == 1
    assert guard.level.warning in told[200:]
    assert guard.objection(1.5, 1.0) is None
    other = guard_that_saw()
    other.restore({key: value for key, value in guard.state().items() if key != "level"})  # of a version that kept none
    assert other.level.warning is None
    other.roll_back(guard.state())
    assert other.state() == guard.state() | {"rollbacks": 1}
