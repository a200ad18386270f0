import json
from pathlib import Path

import pytest
from PIL import Image

from microdit.errors import UserError
from microdit.evaluation.preference.judge import judge_all
from microdit.evaluation.preference.verdicts import (
    Question,
    Reply,
    VerdictFile,
    both_orders,
    random_order,
    read_pairs,
    wilson,
)
from tests.damage import flips


def write_folders(root: Path, count: int) -> tuple[Path, Path]:
    """Write images that all differ: red ones for A, blue ones for B."""
    folders = root / "a", root / "b"
    for folder, channel in zip(folders, (0, 2), strict=True):
        folder.mkdir()
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"a cat, number {i}"}) + "\n" for i in range(count)))
        for i in range(count):
            colour = [i % 100, 0, i % 100]
            colour[channel] = 255
            Image.new("RGB", (8, 8), tuple(colour)).save(folder / f"{i:04d}.png")
    return folders


def likes_red(prompt: str, first: Path, second: Path, *_: object) -> Reply:
    return Reply("first" if first.parent.name == "a" else "second", "because", tokens=10)


def ask_nobody(prompt: str, first: Path, second: Path, *_: object) -> Reply:
    raise AssertionError("billed twice")


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return both_orders(read_pairs(*write_folders(tmp_path, 10)))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_perfect_judge_gives_everything_to_the_better_model(questions, tmp_path):
    result = judge_all(VerdictFile(tmp_path / "verdicts.jsonl", questions, "eyes"), likes_red)
    assert (result.win_rate, result.pairs, result.a_wins, result.consistency, result.tokens) == (1.0, 10, 10, 1.0, 200)
    assert (result.low, result.high) == wilson(10, 10)
    lines = lines_of(tmp_path / "verdicts.jsonl")
    assert {(line["pair"], line["order"]) for line in lines} == {(i, order) for i in range(10) for order in ("AB", "BA")}
    assert all(line["verdict"] == "A" and line["prompt"] == f"a cat, number {line['pair']}" for line in lines)
    assert all((line["answer"], line["model"], line["tokens"]) == ("because", "eyes", 10) for line in lines)


def test_a_judge_who_always_takes_the_first_gives_nothing_to_anyone(questions, tmp_path):
    result = judge_all(VerdictFile(tmp_path / "verdicts.jsonl", questions, "eyes"), lambda *_: Reply("first", "A"))
    assert (result.win_rate, result.ties, result.disagreed, result.consistency) == (0.5, 10, 10, 0.0)


def test_a_tie_in_one_order_ties_the_pair_and_unclear_pairs_are_left_out(questions, tmp_path):
    def judge(prompt: str, first: Path, second: Path, *_: object) -> Reply:
        number = int(first.stem)
        if number == 0:
            return Reply("tie", "TIE") if first.parent.name == "b" else Reply("first", "A")
        if number == 1:
            return Reply("unclear", "what?") if first.parent.name == "b" else Reply("first", "A")
        return Reply("tie", "TIE") if number == 2 else likes_red(prompt, first, second)

    result = judge_all(VerdictFile(tmp_path / "verdicts.jsonl", questions, "eyes"), judge)
    assert (result.pairs, result.a_wins, result.b_wins, result.ties, result.unclear, result.disagreed) == (9, 7, 0, 2, 1, 1)
    assert result.win_rate == pytest.approx(8 / 9)
    assert result.consistency == pytest.approx(8 / 9)


def test_nothing_but_unclear_verdicts_is_said_in_a_sentence(questions, tmp_path):
    with pytest.raises(UserError, match=r"No pair has clear verdicts yet \(10 unclear\)"):
        judge_all(VerdictFile(tmp_path / "verdicts.jsonl", questions, "eyes"), lambda *_: Reply("unclear", "?"))


def test_a_failure_keeps_verdicts_and_the_next_run_gets_the_rest(questions, tmp_path):
    path, judged = tmp_path / "verdicts.jsonl", []

    def judge(prompt: str, first: Path, second: Path, *_: object) -> Reply:
        if len(judged) == 7:
            raise UserError("The endpoint is down.")
        judged.append((first, second))
        return likes_red(prompt, first, second)

    file = VerdictFile(path, questions, "eyes")
    with pytest.raises(UserError, match="down"):
        judge_all(file, judge, concurrency=1)
    file.close()
    assert len(lines_of(path)) == 7

    def second_judge(prompt: str, first: Path, second: Path, *_: object) -> Reply:
        judged.append((first, second))
        return likes_red(prompt, first, second)

    file = VerdictFile(path, questions, "eyes")
    assert judge_all(file, second_judge).win_rate == 1.0
    assert len(judged) == len(set(judged)) == 20
    assert judge_all(file, ask_nobody).tokens == 200


@pytest.mark.parametrize("kept", [1, 20, 60])
def test_a_question_whose_line_was_cut_off_is_judged_again(questions, tmp_path, kept):
    path = tmp_path / "verdicts.jsonl"
    file = VerdictFile(path, questions, "eyes")
    judge_all(file, likes_red, concurrency=1)
    file.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
    file = VerdictFile(path, questions, "eyes")
    assert file.waiting() == questions[-1:]
    judge_all(file, likes_red)
    assert path.read_bytes() == b"".join(lines)


def test_a_last_line_that_lacks_only_its_end_is_not_paid_again(questions, tmp_path):
    path = tmp_path / "verdicts.jsonl"
    file = VerdictFile(path, questions, "eyes")
    judge_all(file, likes_red)
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    file = VerdictFile(path, questions, "eyes")
    judge_all(file, ask_nobody)
    assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_named(questions, tmp_path):
    path = tmp_path / "verdicts.jsonl"
    path.write_text("nonsense\n")
    with pytest.raises(UserError, match=r"Line 1 of .*verdicts.jsonl is no verdict, or damaged"):
        VerdictFile(path, questions, "eyes")


def test_no_flipped_byte_changes_a_verdict(questions, tmp_path):
    path = tmp_path / "verdicts.jsonl"
    file = VerdictFile(path, questions, "eyes")
    judge_all(file, likes_red)
    file.close()
    first = path.read_bytes().index(b"\n")
    for _ in flips(path, range(first)):
        with pytest.raises(UserError, match=r"Line 1 of .*verdicts.jsonl is no verdict, or damaged"):
            VerdictFile(path, questions, "eyes")


@pytest.mark.parametrize("change", ["model", "picture", "swap"])
def test_verdicts_of_another_comparison_are_not_mixed_in(questions, tmp_path, change):
    path = tmp_path / "verdicts.jsonl"
    file = VerdictFile(path, questions, "eyes")
    judge_all(file, likes_red)
    file.close()
    a, b = tmp_path / "a", tmp_path / "b"
    if change == "picture":
        Image.new("RGB", (8, 8), "white").save(a / "0003.png")
    if change == "swap":
        a, b = b, a
    with pytest.raises(UserError, match="another comparison"):
        VerdictFile(path, both_orders(read_pairs(a, b)), "other eyes" if change == "model" else "eyes")


def test_a_question_has_one_verdict_and_a_file_one_writer(questions, tmp_path):
    path = tmp_path / "verdicts.jsonl"
    file = VerdictFile(path, questions, "eyes")
    assert file.add(questions[0], Reply("first", "A")) is not None
    assert file.add(questions[0], Reply("second", "B")) is None
    assert [line["verdict"] for line in lines_of(path)] == ["A"]
    with pytest.raises(UserError, match="Another process"):
        VerdictFile(path, questions, "eyes")


def test_answers_of_any_characters_come_back(questions, tmp_path):
    path = tmp_path / "verdicts.jsonl"
    file = VerdictFile(path, questions, "eyes")
    file.add(questions[0], Reply("unclear", "\u2028 猫\r\n\x85 \ud83d \0"))
    file.close()
    assert len(VerdictFile(path, questions, "eyes").waiting()) == 19


def test_people_see_each_pair_once_in_the_seeds_order(tmp_path):
    pairs = read_pairs(*write_folders(tmp_path, 100))
    questions = random_order(pairs, seed=1)
    assert sorted(question.pair.index for question in questions) == list(range(100))
    assert 30 < sum(question.order == "AB" for question in questions) < 70
    assert questions == random_order(pairs, seed=1)
    assert questions != random_order(pairs, seed=2)
    result = judge_all(VerdictFile(tmp_path / "verdicts.jsonl", questions, "human"), likes_red)
    assert (result.win_rate, result.pairs, result.consistency, result.disagreed) == (1.0, 100, None, 0)


def test_folders_that_are_no_comparison_are_refused_in_a_sentence(tmp_path):
    a, b = write_folders(tmp_path, 3)
    (b / "0003.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"0003.png has no prompt"):
        read_pairs(a, b)
    (b / "0003.png").unlink()
    (b / "0001.png").write_bytes((a / "0001.png").read_bytes()[:50])
    with pytest.raises(UserError, match=r"0001.png is not a complete PNG"):
        read_pairs(a, b)
    (b / "0001.png").unlink()
    with pytest.raises(UserError, match=r"0001.png is missing"):
        read_pairs(a, b)
    (b / "prompts.jsonl").write_text('{"prompt": "a dog"}\n')
    with pytest.raises(UserError, match="different prompts"):
        read_pairs(a, b)
    (b / "prompts.jsonl").write_text('{"caption": "a dog"}\n')
    with pytest.raises(UserError, match="Line 1 of"):
        read_pairs(a, b)
    (b / "prompts.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty"):
        read_pairs(a, b)
    (a / "prompts.jsonl").unlink()
    (b / "prompts.jsonl").unlink()
    with pytest.raises(UserError, match=r"There is no prompts.jsonl"):
        read_pairs(a, b)


def test_one_prompts_file_is_enough(tmp_path):
    a, b = write_folders(tmp_path, 3)
    (b / "prompts.jsonl").unlink()
    assert [pair.prompt for pair in read_pairs(a, b)] == [pair.prompt for pair in read_pairs(b, a)]


def test_the_wilson_interval_has_its_known_values():
    assert wilson(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I


def test_the_wilson_interval_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for count in (1, 7, 100, 4000):
        for successes in {0, 1, count // 3, count}:
            theirs = stats.binomtest(successes, count).proportion_ci(0.95, "wilson")
            assert wilson(successes, count) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
