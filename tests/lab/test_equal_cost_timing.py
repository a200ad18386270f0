import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.config.schema import ModelRecipe, PhaseRecipe, Recipe
from microdit.lab.equal_cost import moments

MODEL = ModelRecipe(dim=32, depth=2, head_dim=8, mixer_dim=32, mixer_depth=1)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=6))
def test_every_phase_is_timed_and_counts_by_its_share(steps):
    recipe = Recipe(name="r", model=MODEL, phases=[PhaseRecipe(str(n), count, 1, 1.0) for n, count in enumerate(steps)])
    shares = [0.0] * len(steps)
    for step, share in moments(recipe):
        shares[int(recipe.phase_at(step)[0].name)] += share
    assert shares == pytest.approx([count / sum(steps) for count in steps])


def test_a_finish_of_a_tenth_is_not_missed():
    masked, full = PhaseRecipe("masked", 900, 1, 1.0), PhaseRecipe("full", 100, 1, 1.0)
    assert moments(Recipe(name="r", model=MODEL, phases=[masked, full]))[-1] == (950, 0.1)
    assert [step for step, _ in moments(Recipe(name="r", model=MODEL, phases=[masked]))] == [112, 337, 562, 787]
