import pytest

from microdit.errors import UserError
from microdit.pipelines.settings import Cell, SamplerSettings, sheet_of

BASE = Cell(SamplerSettings(), 3)


def test_one_sweep_is_a_row_and_two_are_a_table():
    row = sheet_of(["guidance=1, 2.5"], BASE)
    assert (row.column_labels, row.row_labels) == (["guidance 1", "guidance 2.5"], [""])
    assert row.cells == [[Cell(SamplerSettings(guidance_scale=scale), 3) for scale in (1.0, 2.5)]]
    table = sheet_of(["solver=heun,dpm", "steps=4,8,16"], BASE)
    assert table.row_labels == ["steps 4", "steps 8", "steps 16"]
    assert table.cells[2][1] == Cell(SamplerSettings(16, solver="dpm"), 3)
    assert [[cell.seed for cell in row] for row in sheet_of(["seed=1,2"], BASE).cells] == [[1, 2]]
    ranges = sheet_of(["noise-range=none,0.03:30"], BASE).cells[0]
    assert [cell.settings.noise_range for cell in ranges] == [None, (0.03, 30.0)]
    intervals = sheet_of(["guidance-interval=none,0.2:5"], BASE).cells[0]
    assert [cell.settings.guidance_interval for cell in intervals] == [None, (0.2, 5.0)]


@pytest.mark.parametrize(
    ("sweeps", "sentence"),
    [
        (["guidance"], "must be NAME=VALUE,VALUE"),
        (["guidance="], "must be NAME=VALUE,VALUE"),
        (["colour=1"], "There is no setting 'colour' to sweep. Known: steps, guidance"),
        (["steps=many"], "--sweep steps: 'many' is no value for it"),
        (["guidance-interval=5"], "--sweep guidance-interval: '5' is no value for it"),
        (["steps=1"], "from 2 to 1000 steps, not 1"),
        (["steps=2", "steps=3"], "--sweep steps is given twice"),
        (["steps=2", "seed=3", "churn=1"], "once or twice, not 3 times"),
        (["seed=" + ",".join(map(str, range(201)))], "201 x 1 pictures are more than the 200"),
    ],
)
def test_sweeps_that_cannot_be_are_refused_in_a_sentence(sweeps, sentence):
    with pytest.raises(UserError) as error:
        sheet_of(sweeps, BASE)
    assert sentence in str(error.value)
