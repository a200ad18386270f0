"""`microdit compare`: a table of runs and published results, and sentences on which figures are comparable and why others are not."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from microdit.evaluation.geneval.rules import TASKS
from microdit.evaluation.published import (
    METRICS,
    TRAINING_COLUMNS,
    WITH_COST,
    Protocol,
    Published,
    PublishedResult,
    Training,
    metric_cell,
    metrics_of,
)
from microdit.evaluation.run_results import DPGResult, GenEvalResult, Measured, RunResult
from microdit.io.console import styled
from microdit.reports.formats import count, figure

RUN_STYLE = "bold green"
FRECHET = {"fid", "clip-fid"}  # their expectation depends on the number of images
EMOJI = "emoji"  # prefix of the emoji detector's fingerprint
GENEVAL_PROMPTS = dict(zip(TASKS, (80, 99, 80, 94, 100, 100), strict=True))  # of evaluation_metadata.jsonl, 553 in all
GENEVAL_SAMPLES = 4
DPG_PROMPTS, DPG_JUDGE = 1065, "mplug"


@dataclass(frozen=True)
class Comparability:
    """The `reasons` why two figures are not comparable, and details of the protocols that are `unknown`."""

    reasons: tuple[str, ...]
    unknown: tuple[str, ...] = ()

    @property
    def comparable(self) -> bool:
        return not self.reasons


def comparison_table(published: Published, table: str, runs: list[RunResult]) -> Table:
    """Return a table of the runs, followed by the published results."""
    rows = published.tables[table]
    metrics = metrics_of(rows)
    shown = Table(box=None, header_style="bold", pad_edge=False)
    shown.add_column("model", overflow="fold")
    for title in (*(TRAINING_COLUMNS if table in WITH_COST else ()), *(METRICS[name] for name in metrics)):
        # Headers break at every word and cells never do, so that all tables fit a terminal of 80 columns.
        shown.add_column("\n".join(title.split()), justify="right", no_wrap=title != "GPU-days")
    for run in runs:
        shown.add_row(str(run.path), *_cells(run, _figures(run, table), table, metrics), style=RUN_STYLE)
    study = None
    for row in rows:
        if row.study != study:
            study = row.study
            shown.add_row(styled(study or "", "italic"))
        shown.add_row(row.name, *_cells(row, row.metrics, table, metrics))
    return shown


def comparison_lines(published: Published, table: str, run: RunResult) -> Iterator[str]:
    """Yield a line for each figure of the run: whether it is comparable, and its difference to each published figure if it is."""
    rows = published.tables[table]
    if table in ("geneval", "benchmarks"):
        if run.geneval is None:
            yield f"{run.path} has no GenEval result: name its folder with --geneval."
        else:
            yield from _metric_lines(run, "overall", run.geneval.shares.get("overall"), table, rows, geneval_comparability(run.geneval))
        if table == "benchmarks" and run.dpg is not None:
            yield from _metric_lines(run, "dpg", run.dpg.score, table, rows, dpg_comparability(run.dpg))
        return
    for name, protocol in _protocols(published, rows):
        for metric in protocol.networks:
            if metric in run.metrics:
                comparability = metric_comparability(metric, run.metrics[metric], protocol)
                yield from _metric_lines(run, metric, run.metrics[metric].value, name, rows, comparability)
    yield from _without_counterpart(run, metrics_of(rows))


def _cells(training: Training, figures: dict[str, float], table: str, metrics: list[str]) -> list[str]:
    return [*(training.cells() if table in WITH_COST else []), *(metric_cell(name, figures.get(name)) for name in metrics)]


def _figures(run: RunResult, table: str) -> dict[str, float]:
    if table in ("geneval", "benchmarks"):
        dpg = {"dpg": run.dpg.score} if run.dpg else {}
        return {**(run.geneval.shares if run.geneval else {}), **dpg}
    return {name: measured.value for name, measured in run.metrics.items()}


def _protocols(published: Published, rows: tuple[PublishedResult, ...]) -> list[tuple[str, Protocol]]:
    used = {row.protocol for row in rows}
    return [(name, protocol) for name, protocol in published.protocols.items() if name in used]


def _metric_lines(
    run: RunResult, metric: str, value: float | None, protocol: str, rows: tuple[PublishedResult, ...], comparability: Comparability
) -> Iterator[str]:
    head = f"{run.path}: {METRICS[metric]} {metric_cell(metric, value)}"
    if not comparability.comparable or value is None:
        yield f"{head} is not comparable with {protocol}: {'; '.join(comparability.reasons or ('a task has no images',))}."
        return
    yield f"{head} is comparable with {protocol}" + (f", but {'; '.join(comparability.unknown)}." if comparability.unknown else ".")
    for row in rows:
        if row.protocol == protocol and metric in row.metrics:
            apart = value - row.metrics[metric]
            yield f"  {row.name}: {metric_cell(metric, row.metrics[metric])}, the run is {_difference(apart)}."


def _difference(apart: float) -> str:
    rounded = round(abs(apart), 4)
    return "equal" if rounded == 0 else f"{figure(rounded)} {'above' if apart > 0 else 'below'}"


def _without_counterpart(run: RunResult, metrics: list[str]) -> Iterator[str]:
    alone = [f"{name} {_alone(measured)}" for name, measured in run.metrics.items() if name not in metrics]
    if run.recognised is not None:
        alone.append(f"{100 * run.recognised:.1f}% of emoji recognised")
    if alone:
        yield f"{run.path}: the table has no counterpart for {', '.join(alone)}."
    elif not run.metrics:
        yield f"{run.path} has no metrics yet: run microdit evaluate."


def _alone(measured: Measured) -> str:
    return figure(measured.value) + ("" if measured.pictures is None else f" for {count(measured.pictures)} images")


def metric_comparability(metric: str, measured: Measured, protocol: Protocol) -> Comparability:
    """Compare the network, reference set, number and size of images with those of `protocol`, which must have the metric."""
    reasons = [
        _network(measured.network, protocol.networks[metric]),
        _reference(measured, protocol),
        _pictures(metric, measured.pictures, protocol.pictures),
    ]
    unknown = []
    here = "unknown here" if measured.side is None else f"{measured.side} px here"
    if protocol.side is None:
        unknown.append(f"the source does not state the image size ({here})")
    elif measured.side != protocol.side:
        reasons.append(f"images of {protocol.side} px there, {here}")
    return Comparability(tuple(reason for reason in reasons if reason), tuple(unknown))


def geneval_comparability(result: GenEvalResult) -> Comparability:
    """Check that the result is for four images of each of the authors' 553 prompts, judged by networks rather than for emoji."""
    if result.judges.startswith(EMOJI):
        return Comparability(("prompts about emoji, judged by matching Twemoji, not GenEval's prompts and detector",))
    reasons = []
    if result.prompts != sum(GENEVAL_PROMPTS.values()):
        reasons.append(f"{count(result.prompts)} prompts, not {sum(GENEVAL_PROMPTS.values())}")
    if result.without_pictures:
        reasons.append(f"{count(result.without_pictures)} prompts have no image")
    if result.pictures != {task: prompts * GENEVAL_SAMPLES for task, prompts in GENEVAL_PROMPTS.items()}:
        reasons.append(f"{count(sum(result.pictures.values()))} images, not {GENEVAL_SAMPLES} of each of the authors' prompts")
    if result.rewritten_by is not None:
        reasons.append(f"prompts were rewritten by {result.rewritten_by}")
    return Comparability(tuple(reasons), ("objects were detected by the Mask2Former of transformers here, by mmdetection's there",))


def dpg_comparability(result: DPGResult) -> Comparability:
    """Check that the result is for all 1,065 prompts, and that the authors' judge answered the questions."""
    reasons = []
    if result.prompts != DPG_PROMPTS:
        reasons.append(f"{count(result.prompts)} prompts, not {count(DPG_PROMPTS)}")
    if DPG_JUDGE not in result.judge.lower():
        reasons.append(f"questions answered by {result.judge}, not by mPLUG-large")
    return Comparability(tuple(reasons))


def _network(here: str | None, there: str | None) -> str | None:
    if there is None:
        return "the source does not state the feature network"
    if here is None:
        return "the run's file does not state the feature network"
    return None if there in here.rpartition("/")[2].lower() else f"features of {here}, not of {there.capitalize()}"


def _reference(measured: Measured, protocol: Protocol) -> str | None:
    if protocol.reference is None:
        return "the source does not state the reference set"
    if measured.reference is None:
        return "the run's file does not state the reference set"
    if measured.reference != protocol.reference:
        return f"compared with {measured.reference}, not with {protocol.reference}"
    pictures, needed = measured.reference_pictures, protocol.pictures
    if pictures is not None and needed is not None and pictures < needed:
        return f"compared with only {count(pictures)} images of {protocol.reference}"
    return None


def _pictures(metric: str, here: int | None, there: int | None) -> str | None:
    if there is None:
        return "the source does not state the number of generated images"
    if here is None:
        return "the run's file does not state the number of generated images"
    if here == there:
        return None
    bias = "" if metric not in FRECHET else f": the Frechet distance is biased {'upwards' if here < there else 'downwards'}"
    return f"{count(here)} images, not {count(there)}{bias}"
