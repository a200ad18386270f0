import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.training.stability import RISE, WINDOW, PlateauDetector


def warnings(losses, level=None) -> list[tuple[int, str]]:
    level = level or PlateauDetector("one")
    told = [(step, level.add(loss, step)) for step, loss in enumerate(losses)]
    return [(step, sentence) for step, sentence in told if sentence]


def test_a_rise_that_stays_is_told_once_with_both_levels():
    [(step, sentence)] = warnings([0.66] * 100 + [1.0] * 200)
    assert 100 < step <= 100 + WINDOW // 2
    assert "Phase one: the loss had come down to 0.66, and was above 0.825 in most of the 64 steps before step" in sentence


def test_a_few_high_losses_and_a_slow_fall_are_no_rise():
    spikes = [5.0 if step % 10 < 4 else 0.5 for step in range(500)]
    assert warnings(spikes) == []
    assert warnings([1 / (1 + step / 100) for step in range(500)]) == []


@given(seed=st.integers(0, 10**6), spread=st.floats(0, 0.2))
def test_chance_is_no_rise(seed, spread):
    """Losses of a batch of 32 spread by a fifth of their mean."""
    generator = random.Random(seed)
    assert warnings([generator.gauss(0.7, 0.7 * spread) for _ in range(600)]) == []


@given(low=st.floats(0.01, 10), factor=st.floats(1.01, 3))
def test_it_is_the_ratio_that_counts(low, factor):
    assert bool(warnings([low] * 100 + [low * factor] * 100)) == (low * factor > RISE * low)


@pytest.mark.parametrize("cut", [10, 80, 120, 160])
def test_a_run_that_goes_on_is_judged_as_one_without_a_break(cut):
    losses = [0.5] * 100 + [1.0] * 100
    first = PlateauDetector("one")
    before = warnings(losses[:cut], first)
    second = PlateauDetector(**json.loads(json.dumps(first.state(), allow_nan=False)))
    after = [(cut + step, sentence) for step, sentence in warnings(losses[cut:], second)]
    assert [step for step, _ in before + after] == [step for step, _ in warnings(losses)]
    assert second.warning
