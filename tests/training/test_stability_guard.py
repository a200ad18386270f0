import math
from collections import deque
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microdit.config.schema import GuardRecipe
from microdit.training.stability import ENOUGH, REMEMBERED, SpikeDecision, SpikeGuard

CPU = torch.device("cpu")


def judged(guard: SpikeGuard, loss: float, norm: float = 1.0, phase: str = "phase") -> tuple[SpikeDecision, str | None]:
    """A step's whole way: decided on the device, then read and noted."""
    taken, usual = guard.judge(torch.tensor(loss, dtype=torch.float64), torch.tensor(norm))
    decision = SpikeDecision(loss, norm, taken.item() > 0, usual.item())
    return decision, guard.record(decision, phase, 0)


def guard_that_saw(*losses: float) -> SpikeGuard:
    guard = SpikeGuard(GuardRecipe(loss_jump=10, rollback_after=3), CPU)
    for loss in losses:
        judged(guard, loss)
    return guard


@given(st.lists(st.floats(0.01, 100) | st.sampled_from([math.nan, math.inf, 0.5, 0.5, 0.5, 0.5]), max_size=120))
def test_the_device_decides_as_a_list_of_the_last_losses_would(losses):
    guard, kept = SpikeGuard(GuardRecipe(loss_jump=10, rollback_after=3), CPU), deque(maxlen=REMEMBERED)
    for loss in losses:
        usual = median(kept) if len(kept) >= ENOUGH else math.inf
        expected = math.isfinite(loss) and loss <= 10 * usual
        decision, _ = judged(guard, loss)
        assert decision.taken == expected
        assert decision.usual == pytest.approx(usual)
        if expected:
            kept.append(loss)
    assert guard.state()["losses"] == list(kept)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_refused_from_the_first_step_on(loss, norm):
    objection = judged(guard_that_saw(), loss, norm)[0].objection
    assert "nan" in objection or "inf" in objection


def test_a_jump_is_refused_once_enough_is_known():
    assert judged(guard_that_saw(*[0.5] * (ENOUGH - 1)), 6.0)[0].objection is None
    guard = guard_that_saw(*[0.5] * ENOUGH)
    assert judged(guard, 4.9)[0].objection is None
    assert judged(guard, 5.1)[0].objection == "the loss is 5.1, and its recent median 0.5"


def test_several_skips_in_a_row_ask_for_a_rollback():
    guard = guard_that_saw(1.0, math.nan, math.nan, 1.0, math.nan, math.nan)
    assert (guard.in_a_row, guard.must_roll_back) == (2, False)
    judged(guard, math.nan)
    assert guard.must_roll_back
    judged(guard, 1.0)  # a step that was under way already
    assert guard.must_roll_back
    assert guard.skipped == 5


def test_its_state_goes_through_a_checkpoint():
    guard = guard_that_saw(*[0.5] * ENOUGH, math.nan)
    other = guard_that_saw()
    other.restore(guard.state())
    assert other.state() == guard.state()
    assert judged(other, 6.0)[0].objection
    other.roll_back(guard.state())
    assert (other.skipped, other.rollbacks, other.in_a_row, other.must_roll_back) == (2, 1, 0, False)


@pytest.mark.parametrize("count", [3, REMEMBERED - 1, REMEMBERED, REMEMBERED + 5])
def test_a_guard_that_was_restored_goes_on_as_the_first_one(count):
    first = guard_that_saw(*(0.5 + number / 100 for number in range(count)))
    other = guard_that_saw(*[3.0] * 20)
    other.restore(first.state())
    for loss in (0.4, 0.9, 2.0) * 40:
        assert judged(first, loss) == judged(other, loss)


def test_a_loss_that_stays_up_is_told_once_a_phase_and_learnt_from():
    guard = guard_that_saw()
    steps = [("masked", 0.5)] * 100 + [("full", 1.0)] * 100 + [("full", 1.5)] * 100
    told = [judged(guard, loss, phase=phase)[1] for phase, loss in steps]
    assert [bool(sentence) for sentence in told].count(True) == 1
    assert guard.plateau.warning in told[200:]
    assert judged(guard, 1.5)[0].taken
    other = guard_that_saw()
    other.restore({key: value for key, value in guard.state().items() if key != "level"})  # of a version that kept none
    assert other.plateau.warning is None
    other.roll_back(guard.state())
    assert other.state() == guard.state() | {"rollbacks": 1}
