import json
from pathlib import Path

import pytest

from microdit.errors import UserError
from microdit.evaluation.geneval.rules import (
    TASKS,
    Box,
    Detection,
    GenEvalPrompt,
    confident_objects,
    judge,
    overlap,
    parse_prompt,
    read_prompts,
    relations,
    score,
    suppress_overlapping,
)

LEFT: Box = (0, 40, 20, 60)
RIGHT: Box = (80, 40, 100, 60)


def prompt(tag: str, include: list[dict], exclude: list[dict] | None = None) -> GenEvalPrompt:
    return parse_prompt(json.dumps({"tag": tag, "include": include, "exclude": exclude or [], "prompt": "a photo"}), "here")


def seen(name: str, score: float = 0.95, box: Box = LEFT) -> Detection:
    return Detection(name, score, box)


def never(detection: Detection) -> str:
    raise AssertionError(f"nobody asked for the colour of {detection.class_name}")


def test_a_single_object_is_there_or_not():
    bench = prompt("single_object", [{"class": "bench", "count": 1}])
    assert judge(bench, [seen("bench"), seen("dog")], never).correct
    verdict = judge(bench, [seen("dog")], never)
    assert not verdict.correct
    assert verdict.reasons == ("Expected at least 1 of bench, found 0.",)


def test_more_than_asked_for_is_fine_where_nothing_is_excluded():
    assert judge(prompt("single_object", [{"class": "bench", "count": 1}]), [seen("bench")] * 5, never).correct


def test_of_two_objects_both_must_be_there():
    both = prompt("two_object", [{"class": "bench", "count": 1}, {"class": "dog", "count": 1}])
    assert judge(both, [seen("dog"), seen("bench")], never).correct
    assert judge(both, [seen("dog")], never).reasons == ("Expected at least 1 of bench, found 0.",)
    assert len(judge(both, [], never).reasons) == 2


@pytest.mark.parametrize(("number", "correct"), [(2, False), (3, True), (4, False)])
def test_counts_are_exact(number: int, correct: bool):
    three = prompt("counting", [{"class": "cup", "count": 3}], [{"class": "cup", "count": 4}])
    verdict = judge(three, [seen("cup") for _ in range(number)], never)
    assert verdict.correct == correct
    assert correct or f"found {number}." in verdict.reasons[0]


def test_the_detection_threshold_is_higher_for_counting():
    for tag, threshold in [*((tag, 0.3) for tag in TASKS if tag != "counting"), ("counting", 0.9)]:
        assert confident_objects([seen("cup", threshold)], tag) == {}
        assert len(confident_objects([seen("cup", threshold + 1e-6)], tag)["cup"]) == 1


def test_at_most_16_of_a_class_count_the_most_confident_first():
    found = confident_objects([*(seen("cup", 0.5 + n / 100) for n in range(20)), seen("dog", 0.4)], "position")
    assert [round(cup.score, 2) for cup in found["cup"]] == [round(0.69 - n / 100, 2) for n in range(16)]
    assert len(found["dog"]) == 1


def test_the_same_box_twice_counts_twice_as_with_the_authors():
    assert len(confident_objects([seen("cup"), seen("cup")], "counting")["cup"]) == 2


def test_a_lower_limit_drops_what_overlaps_a_more_confident_one():
    first, near, far = seen("cup", 0.9, (0, 0, 99, 99)), seen("cup", 0.8, (0, 0, 99, 49)), seen("cup", 0.7, RIGHT)
    assert overlap(first.box, near.box) == 0.5
    assert suppress_overlapping([first, near, far], 0.5) == [first, far]
    assert suppress_overlapping([first, near, far], 0.51) == [first, near, far]


def test_what_was_dropped_drops_nothing_itself():
    chain = [seen("cup", 0.9 - n / 10, (n * 40, 0, n * 40 + 99, 99)) for n in range(3)]
    assert suppress_overlapping(chain, 0.4) == [chain[0], chain[2]]


def test_overlap_counts_the_last_pixels_and_is_zero_apart():
    assert overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 1
    assert overlap((0, 0, 9, 9), (10, 0, 19, 9)) == 0
    assert overlap(LEFT, RIGHT) == 0


def test_a_colour_must_be_that_of_the_most_confident():
    pink = prompt("colors", [{"class": "car", "count": 1, "color": "pink"}])
    colours = {0.9: "red", 0.8: "pink"}
    sure, less = seen("car", 0.9), seen("car", 0.8)
    verdict = judge(pink, [less, sure], lambda found: colours[found.score])
    assert verdict.reasons == ("Expected 1 pink of car, found 1 red.",)
    assert judge(pink, [less], lambda found: colours[found.score]).correct


def test_every_one_of_several_must_have_the_colour():
    cups = prompt("colors", [{"class": "cup", "count": 2, "color": "blue"}])
    assert judge(cups, [seen("cup", 0.9), seen("cup", 0.8)], lambda found: "blue").correct
    verdict = judge(cups, [seen("cup", 0.9), seen("cup", 0.8)], lambda found: "blue" if found.score > 0.85 else "white")
    assert verdict.reasons == ("Expected 2 blue of cup, found 1 blue, 1 white.",)


def test_colours_belong_to_their_objects():
    prompted = prompt("color_attr", [{"class": "car", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}])
    right = {"car": "red", "dog": "blue"}
    assert judge(prompted, [seen("car"), seen("dog")], lambda found: right[found.class_name]).correct
    swapped = judge(prompted, [seen("car"), seen("dog")], lambda found: {"car": "blue", "dog": "red"}[found.class_name])
    assert swapped.reasons == ("Expected 1 red of car, found 1 blue.", "Expected 1 blue of dog, found 1 red.")


def test_a_position_must_hold():
    wanted = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]
    left = prompt("position", wanted)
    assert judge(left, [seen("cat", box=LEFT), seen("dog", box=RIGHT)], never).correct
    wrong = judge(left, [seen("cat", box=RIGHT), seen("dog", box=LEFT)], never)
    assert wrong.reasons == ("Expected cat left of dog, found it right of it.",)
    same = judge(left, [seen("cat"), seen("dog")], never)
    assert same.reasons == ("Expected cat left of dog, found it in no relation to it.",)


def test_a_position_is_wrong_without_the_other_object():
    left = prompt("position", [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}])
    verdict = judge(left, [seen("cat")], never)
    assert verdict.reasons == ("Expected at least 1 of dog, found 0.", "Nothing was found for cat to be left of.")


def test_a_position_is_that_of_the_most_confident_ones():
    left = prompt("position", [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}])
    dog, sure, less = seen("dog", 0.9, (40, 40, 60, 60)), seen("cat", 0.9, RIGHT), seen("cat", 0.5, LEFT)
    assert not judge(left, [dog, sure, less], never).correct
    assert judge(left, [dog, less], never).correct


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-50, 0, {"left of"}),
        (50, 0, {"right of"}),
        (0, -50, {"above"}),
        (0, 50, {"below"}),
        (-50, -50, {"left of", "above"}),
        (50, 50, {"right of", "below"}),
        (4, 0, set()),  # exactly a tenth of 20 + 20
        (7.9, 0, set()),  # (7.9 - 4) / 7.9 is below a half
        (8, 0, set()),  # exactly a half
        (8.1, 0, {"right of"}),
        (0, 0, set()),
        (50, 25, {"right of"}),  # (25 - 4) / 56 is below a half
    ],
)
def test_relations_of_boxes_of_side_20(dx: float, dy: float, expected: set[str]):
    assert relations((100 + dx, 100 + dy, 120 + dx, 120 + dy), (100, 100, 120, 120)) == expected


def test_the_margin_of_a_position_is_that_of_each_axis():
    wide, flat = (0, 0, 200, 10), (0, 30, 200, 40)
    assert relations(wide, flat) == {"above"}  # a margin of 2, not of 40
    assert relations((0, 0, 10, 200), (30, 0, 40, 200)) == {"left of"}


def test_what_is_excluded_makes_a_picture_wrong():
    no_dog = prompt("single_object", [{"class": "cat", "count": 1}], [{"class": "dog", "count": 1}])
    assert judge(no_dog, [seen("cat")], never).correct
    assert judge(no_dog, [seen("cat"), seen("dog")], never).reasons == ("Expected fewer than 1 of dog, found 1.",)


def test_the_overall_score_is_the_unweighted_mean_of_six_tasks():
    verdicts = [("single_object", True)] * 6 + [("counting", True), ("counting", False)]
    verdicts += [(task, False) for task in TASKS if task not in ("single_object", "counting")]
    scores = score(verdicts)
    assert scores.tasks == {"single_object": 1, "two_object": 0, "counting": 0.5, "colors": 0, "position": 0, "color_attr": 0}
    assert scores.overall == 0.25
    assert scores.pictures == 12


def test_there_is_no_overall_score_while_a_task_is_missing():
    scores = score([("colors", True), ("position", False)])
    assert scores.tasks == {"colors": 1.0, "position": 0.0}
    assert scores.overall is None


def test_the_authors_format_is_read(tmp_path: Path):
    lines = [
        {"tag": "counting", "include": [{"class": "cup", "count": 3}], "exclude": [{"class": "cup", "count": 4}], "prompt": "three cups"},
        {
            "tag": "position",
            "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
            "prompt": "a photo of a cat left of a dog",
        },
    ]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    counting, position = read_prompts(path)
    assert (counting.tag, counting.text, counting.exclude[0].count) == ("counting", "three cups", 4)
    assert position.include[1].relation == ("left of", 0)
    assert position.exclude == ()
    assert json.loads(position.metadata) == lines[1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tag": "colour"}, "tag is 'colour'"),
        ({"prompt": ""}, "there is no prompt"),
        ({"include": []}, "include names no object"),
        ({"include": "cup"}, "include must be a list"),
        ({"include": [{"count": 1}]}, r"include\[0\] names no class"),
        ({"include": [{"class": "cup", "count": 0}]}, "count is 0"),
        ({"include": [{"class": "cup", "count": True}]}, "count is True"),
        ({"include": [{"class": "cup", "count": 1, "color": "mauve"}]}, "color is 'mauve'"),
        ({"include": [{"class": "cup", "count": 1, "position": ["beside", 0]}]}, "position is"),
        ({"include": [{"class": "cup", "count": 1, "position": ["above", 0]}]}, "an entry before this one"),
        ({"exclude": [{"class": "cup"}]}, r"exclude\[0\]: count is None"),
    ],
)
def test_whatever_does_not_fit_is_named_with_file_and_line(tmp_path: Path, change: dict, sentence: str):
    fine = {"tag": "single_object", "include": [{"class": "cup", "count": 1}], "prompt": "a cup"}
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{json.dumps(fine)}\n{json.dumps(fine | change)}\n")
    with pytest.raises(UserError, match=f"prompts.jsonl, line 2: .*{sentence}"):
        read_prompts(path)


def test_a_file_that_is_no_json_or_empty_or_missing_is_refused(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="no prompts"):
        read_prompts(path)
    path.write_text("a cup\n")
    with pytest.raises(UserError, match=r"line 1: a JSON object is expected .Expecting"):
        read_prompts(path)
    path.write_text("[]\n")
    with pytest.raises(UserError, match=r"line 1: a JSON object is expected .it is not a JSON object"):
        read_prompts(path)
