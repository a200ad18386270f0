import os
from dataclasses import replace
from pathlib import Path

import pytest

from microdit.evaluation.compare import comparison_lines, comparison_table
from microdit.evaluation.published import TITLES, load_published
from microdit.evaluation.run_results import DPGResult, GenEvalResult, Measured, RunResult
from microdit.io.console import PlainConsole
from tests.evaluation.test_compare_comparability import OFFICIAL

PUBLISHED = load_published()
RUN = RunResult(
    path=Path("runs/xl"), parameters=8_300_000, metrics={"fid": Measured(13.66, "inception-2015-12-05", "coco2014", 40504, 30000, 512)}
)
EMOJI = RunResult(
    path=Path("runs/emoji"),
    metrics={"fid": Measured(143.6, "efficientnet-lite0", "emoji", 1807, 512, 64), "kid": Measured(0.118, pictures=512)},
    recognised=0.449,
)


def printed(table: str, runs: list[RunResult], width: int = 250) -> list[str]:
    console = PlainConsole(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(comparison_table(PUBLISHED, table, runs))
    return console.export_text().splitlines()


@pytest.mark.parametrize("table", TITLES)
def test_a_table_holds_the_runs_above_all_published_rows(table: str):
    lines = [line for line in printed(table, [RUN, EMOJI]) if not line.startswith(" ")]
    assert lines[1].startswith("runs/xl")
    assert lines[2].startswith("runs/emoji")
    for row in PUBLISHED.tables[table]:
        assert any(row.name in line for line in lines)


@pytest.mark.parametrize("table", TITLES)
def test_a_terminal_of_80_columns_shows_every_figure(table: str):
    def words(width: int) -> list[str]:
        return sorted(" ".join(printed(table, [EMOJI], width)).split())

    assert words(80) == words(250)


def test_the_main_table_says_what_things_took():
    lines = printed("main", [RUN])
    assert lines[0].split() == ["CLIP", "CLIP"]
    assert lines[1].split() == ["model", "params", "images", "seen", "GPU-days", "cost", "FID", "FID", "score"]
    assert lines[2].split() == ["runs/xl", "8.3", "M", "–", "–", "–", "–", "13.66", "–", "–"]
    assert any("1.16 B" in line and "20.8 H100" in line and "$1,890" in line and "12.66" in line for line in lines)


def test_a_comparable_figure_is_set_against_every_published_one():
    lines = list(comparison_lines(PUBLISHED, "main", RUN))
    assert lines[0] == ("runs/xl: FID 13.66 is comparable with coco-30k, but the source does not state the image size (512 px here).")
    assert "  MicroDiT, 37 M images, 15 M of them synthetic: 12.66, the run is 1 above." in lines
    assert "  MicroDiT's recipe, trained again by others: 12.37, the run is 1.29 above." in lines
    assert len(lines) == 1 + sum("fid" in row.metrics for row in PUBLISHED.tables["main"])
    below = replace(RUN, metrics={"fid": replace(RUN.metrics["fid"], value=12.66)})
    told = list(comparison_lines(PUBLISHED, "main", below))
    assert any(line.endswith("12.66, the run is equal.") for line in told)
    assert any(line.endswith("13.04, the run is 0.38 below.") for line in told)


@pytest.mark.parametrize("table", TITLES)
def test_no_difference_is_told_between_what_is_not_comparable(table: str):
    emoji = replace(EMOJI, geneval=replace(OFFICIAL, judges="emoji 8"))
    lines = list(comparison_lines(PUBLISHED, table, emoji))
    assert any("is not comparable with" in line for line in lines)
    assert not any(" above" in line or " below" in line or "equal" in line for line in lines)


def test_reasons_and_what_stands_alone_are_named():
    lines = list(comparison_lines(PUBLISHED, "main", EMOJI))
    assert lines == [
        "runs/emoji: FID 143.6 is not comparable with coco-30k: features of efficientnet-lite0, not of Inception; compared with emoji, not "
        "with coco2014; 512 images, not 30,000: the Frechet distance is biased upwards.",
        "runs/emoji: the table has no counterpart for kid 0.118 for 512 images, 44.9% of emoji recognised.",
    ]
    assert list(comparison_lines(PUBLISHED, "main", RunResult(path=Path("new"), metrics={}))) == [
        "new has no metrics yet: run microdit evaluate."
    ]


def test_geneval_is_compared_by_its_overall():
    run = replace(RUN, geneval=OFFICIAL)
    lines = list(comparison_lines(PUBLISHED, "geneval", run))
    assert "but objects were detected by the Mask2Former of transformers here" in lines[0]
    assert "  Stable Diffusion 1.5: 0.43, the run is 0.07 above." in lines
    assert "  MicroDiT, 490 M synthetic images: 0.52, the run is 0.02 below." in lines
    assert list(comparison_lines(PUBLISHED, "geneval", RUN)) == ["runs/xl has no GenEval result: name its folder with --geneval."]
    (unfinished,) = comparison_lines(PUBLISHED, "geneval", replace(RUN, geneval=replace(OFFICIAL, shares={"counting": 0.5})))
    assert "a task has no images" in unfinished


def test_a_coco_figure_meets_the_ablations_that_are_of_coco_alone():
    lines = list(comparison_lines(PUBLISHED, "ablations", RUN))
    against = [line for line in lines if "the run is" in line]
    assert len(against) == 4  # with and without experts, with and without synthetic pictures
    assert any("is not comparable with paper-ablation: the source does not state the reference set" in line for line in lines)
    assert any("is not comparable with imagenet-256: compared with coco2014, not with imagenet" in line for line in lines)


def test_shares_of_a_task_stand_in_their_columns():
    geneval = GenEvalResult({"overall": 0.238, "single_object": 0.425}, {}, 120, 0, "emoji 8")
    (line,) = (line for line in printed("geneval", [replace(EMOJI, geneval=geneval)]) if "runs/emoji" in line)
    assert line.split() == ["runs/emoji", "0.238", "0.425", "–", "–", "–", "–", "–"]


def test_the_second_generation_stands_beside_its_cost():
    run = replace(RUN, geneval=OFFICIAL, dpg=DPGResult(80.0, 1065, "gpt-4o"))
    lines = printed("benchmarks", [run])
    (shown,) = (line for line in lines if line.startswith("runs/xl"))
    assert shown.split()[-2:] == ["0.50", "80"]
    for row in (
        ["MiniT2I B/16", "258 M", "0.873", "84.2"],
        ["Nitro-E", "304 M", "12 MI300X", "0.66"],
        ["PRX, 24 hours", "32 H200", "$1,500"],
        ["HDM, XUT-base", "64.2 RTX 5090", "$620"],
        ["MicroDiT, 37 M images, 15 M of them synthetic", "20.8 H100", "$1,890", "0.46"],
    ):
        (line,) = (line for line in lines if line.startswith(row[0]))
        assert all(cell in line for cell in row)
    told = list(comparison_lines(PUBLISHED, "benchmarks", run))
    assert "  Nitro-E: 0.66, the run is 0.16 below." in told
    assert told[-1] == "runs/xl: DPG 80 is not comparable with benchmarks: questions answered by gpt-4o, not by mPLUG-large."
    judged = replace(run, dpg=DPGResult(80.0, 1065, "mplug-large"))
    assert "  MiniT2I B/16: 84.2, the run is 4.2 below." in comparison_lines(PUBLISHED, "benchmarks", judged)
