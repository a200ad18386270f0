"""DPG-Bench's arithmetic, on answers worked out by hand."""

import pytest

from microdit.errors import UserError
from microdit.evaluation.dpg.questions import picture_score, prompt_score, read_dpg_prompts, score
from tests.evaluation.dpg.bench_folder import HEADER, ROWS, write_bench


@pytest.fixture
def prompts(tmp_path):
    return read_dpg_prompts(write_bench(tmp_path / "bench"), pytest.fail)


def test_the_published_layout_is_read(prompts):
    cats, room = prompts
    assert (cats.name, cats.text) == ("cats7", "Two cats, black, side by side.")
    assert [one.parents for one in cats.propositions] == [(), (1,), (1,), (2, 3)]
    assert cats.propositions[3].question == "Do two black cats sit side by side, close?"
    assert [(one.category, one.detail) for one in room.propositions] == [("global", ""), ("entity", "whole")]


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        ("yyyy", 1.0),
        ("nyyy", 0.0),  # no cats: neither two, nor black; and so no two black ones side by side, of which no parent was answered no
        ("ynyy", 0.5),  # cats, black
        ("yyyn", 0.75),
        ("ynny", 0.25),
        ("nnnn", 0.0),
    ],
)
def test_what_depends_on_a_no_counts_as_no(prompts, answers, share):
    assert picture_score(prompts[0], {n: answer == "y" for n, answer in enumerate(answers, 1)}) == share


def test_scores_are_means_over_questions_then_pictures_then_prompts(prompts):
    cats = [{1: True, 2: True, 3: True, 4: True}, {1: False, 2: True, 3: True, 4: True}]
    cats += [{1: True, 2: False, 3: True, 4: True}, {1: True, 2: True, 3: True, 4: False}]
    room = [{1: True, 2: False}] * 3 + [{1: False, 2: False}]
    assert prompt_score(prompts[0], cats) == (1 + 0 + 0.5 + 0.75) / 4  # 0.5625
    assert prompt_score(prompts[1], room) == 3 / 8  # 0.375
    found = score([(prompts[0], cats), (prompts[1], room)])
    assert found.score == 46.875  # the mean of 56.25 and 37.5, not 9 + 3 of 24 questions
    # Answers as they were given: entity is 3 of 4 about cats and 0 of 4 about rooms.
    assert found.categories == {"attribute": 100, "entity": 37.5, "global": 75, "other": 75, "relation": 75}
    assert found.details["entity - whole"] == 37.5
    with pytest.raises(UserError, match="no answers"):
        score([])


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("cats7,,,x,0,entity,whole,t,Is it?", r"dpg_bench\.csv, line 2: proposition_id and dependency must be whole numbers"),
        ("cats7,,,1,7,entity,whole,t,Is it?", "questions of cats7 depend on 7, which are not among them"),
        ("../up,,,1,0,entity,whole,t,Is it?", "line 2: item_id is '../up', which cannot be the name of a file"),
        ("cats7,,,1,0,entity,whole,t,", "line 2: there is no question"),
        ("dogs,,,1,0,entity,whole,t,Is it?", "No item_id of .* is the name of a file"),
        ("cats7,,,1,0,entity,whole,t,Is it?\ncats7,,,1,0,entity,whole,t,Is it?", "have a proposition_id twice"),
    ],
)
def test_malformed_questions_are_named(tmp_path, row, sentence):
    folder = write_bench(tmp_path / "bench", [row])
    with pytest.raises(UserError, match=sentence):
        read_dpg_prompts(folder, lambda _: None)


def test_missing_parts_are_named(tmp_path):
    folder, said = write_bench(tmp_path / "bench", ROWS[:4]), []
    assert [prompt.name for prompt in read_dpg_prompts(folder, said.append)] == ["cats7"]
    assert said[0].startswith("1 of the prompts")
    (folder / "dpg_bench.csv").write_text(HEADER.replace("dependency", "depends") + "\n")
    with pytest.raises(UserError, match="has no column dependency"):
        read_dpg_prompts(folder, pytest.fail)
    with pytest.raises(UserError, match=r"has 0 prompts and 0 \.csv files"):
        read_dpg_prompts(tmp_path, pytest.fail)
