"""May two figures stand beside each other? Rules, each with the sentence that says why not.

Runs beside published figures, as people read it: one table, and what may be compared in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from microdit.evaluation.geneval.rules import TASKS
from microdit.evaluation.published import METRICS, TRAINING_COLUMNS, Protocol, Published, Row, Training, metric_cell, metrics_of
from microdit.evaluation.run_results import GenEvalResult, Measured, RunResult
from microdit.io.console import styled
from microdit.reports.formats import count, figure

FRECHET = {"fid", "clip-fid"}  # whose expectation depends on the number of pictures
EMOJI = "emoji"  # how the fingerprint of the judge of emoji begins
GENEVAL_PROMPTS = dict(zip(TASKS, (80, 99, 80, 94, 100, 100), strict=True))  # of evaluation_metadata.jsonl, 553 in all
GENEVAL_SAMPLES = 4


@dataclass(frozen=True)
class Verdict:
    """`reasons` why figures are not comparable; if there are none, `unknown` says what nobody has told."""

    reasons: tuple[str, ...]
    unknown: tuple[str, ...] = ()

    @property
    def comparable(self) -> bool:
        return not self.reasons


def metric_comparability(metric: str, measured: Measured, protocol: Protocol) -> Verdict:
    """The same network, reference, number of pictures and size as in `protocol`, whose networks name the metric?"""
    reasons = [
        _network(measured.network, protocol.networks[metric]),
        _reference(measured, protocol),
        _pictures(metric, measured.pictures, protocol.pictures),
    ]
    unknown = []
    here = "not told here" if measured.side is None else f"{measured.side} px here"
    if protocol.side is None:
        unknown.append(f"the size at which pictures were compared is not told there ({here})")
    elif measured.side != protocol.side:
        reasons.append(f"pictures of {protocol.side} px there, {here}")
    return Verdict(tuple(reason for reason in reasons if reason), tuple(unknown))


def geneval_comparability(result: GenEvalResult) -> Verdict:
    """The 553 prompts of the authors, four pictures of each? Prompts about emoji are others."""
    if result.judges.startswith(EMOJI):
        return Verdict(("prompts about emoji, judged by matching Twemoji, not GenEval's prompts and detector",))
    reasons = []
    if result.prompts != sum(GENEVAL_PROMPTS.values()):
        reasons.append(f"{count(result.prompts)} prompts, not {sum(GENEVAL_PROMPTS.values())}")
    if result.without_pictures:
        reasons.append(f"{count(result.without_pictures)} prompts have no picture")
    if result.pictures != {task: prompts * GENEVAL_SAMPLES for task, prompts in GENEVAL_PROMPTS.items()}:
        reasons.append(f"{count(sum(result.pictures.values()))} pictures, not {GENEVAL_SAMPLES} of each of the authors' prompts")
    return Verdict(tuple(reasons), ("objects were found by the Mask2Former of transformers here, by mmdetection's there",))


def _network(here: str | None, there: str | None) -> str | None:
    if there is None:
        return "the source does not say which network saw the pictures"
    if here is None:
        return "the run's file does not say which network saw the pictures"
    return None if there in here.rpartition("/")[2].lower() else f"features of {here}, not of {there.capitalize()}"


def _reference(measured: Measured, protocol: Protocol) -> str | None:
    if protocol.reference is None:
        return "the source does not say which pictures it compared with"
    if measured.reference is None:
        return "the run's file does not say which pictures it compared with"
    if measured.reference != protocol.reference:
        return f"compared with {measured.reference}, not with {protocol.reference}"
    pictures, needed = measured.reference_pictures, protocol.pictures
    if pictures is not None and needed is not None and pictures < needed:
        return f"compared with {count(pictures)} pictures of {protocol.reference}, a part of it"
    return None


def _pictures(metric: str, here: int | None, there: int | None) -> str | None:
    if there is None:
        return "the source does not say how many pictures were drawn"
    if here is None:
        return "the run's file does not say how many pictures were drawn"
    if here == there:
        return None
    bias = "" if metric not in FRECHET else f": the Frechet distance is biased {'upwards' if here < there else 'downwards'}"
    return f"{count(here)} pictures, not {count(there)}{bias}"


RUN_STYLE = "bold green"


def comparison_table(published: Published, table: str, runs: list[RunResult]) -> Table:
    """The runs above, the published rows below."""
    rows = published.tables[table]
    metrics = metrics_of(rows)
    shown = Table(box=None, header_style="bold", pad_edge=False)
    shown.add_column("model", overflow="fold")
    for title in (*(TRAINING_COLUMNS if table == "main" else ()), *(METRICS[name] for name in metrics)):
        # Broken at every word, and never cut: all tables fit a terminal of 80 columns.
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


def comparison_words(published: Published, table: str, run: RunResult) -> Iterator[str]:
    """Lines on what of a run may be compared with what of the table. A difference is told only where it means something."""
    rows = published.tables[table]
    if table == "geneval":
        if run.geneval is None:
            yield f"{run.path}: no GenEval here; name its folder with --geneval."
        else:
            yield from _words(run, "overall", run.geneval.shares.get("overall"), "geneval", rows, geneval_comparability(run.geneval))
        return
    for name, protocol in _protocols(published, rows):
        for metric in protocol.networks:
            if metric in run.metrics:
                verdict = metric_comparability(metric, run.metrics[metric], protocol)
                yield from _words(run, metric, run.metrics[metric].value, name, rows, verdict)
    yield from _without_counterpart(run, metrics_of(rows))


def _cells(training: Training, figures: dict[str, float], table: str, metrics: list[str]) -> list[str]:
    return [*(training.cells() if table == "main" else []), *(metric_cell(name, figures.get(name)) for name in metrics)]


def _figures(run: RunResult, table: str) -> dict[str, float]:
    if table == "geneval":
        return run.geneval.shares if run.geneval else {}
    return {name: measured.value for name, measured in run.metrics.items()}


def _protocols(published: Published, rows: tuple[Row, ...]) -> list[tuple[str, Protocol]]:
    used = {row.protocol for row in rows}
    return [(name, protocol) for name, protocol in published.protocols.items() if name in used]


def _words(run: RunResult, metric: str, value: float | None, protocol: str, rows: tuple[Row, ...], verdict: Verdict) -> Iterator[str]:
    head = f"{run.path}: {METRICS[metric]} {metric_cell(metric, value)}"
    if not verdict.comparable or value is None:
        yield f"{head} is not comparable with {protocol}: {'; '.join(verdict.reasons or ('a task has no pictures',))}."
        return
    yield f"{head} is comparable with {protocol}" + (f", but {'; '.join(verdict.unknown)}." if verdict.unknown else ".")
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
        yield f"{run.path}: the table has nothing to set beside {', '.join(alone)}."
    elif not run.metrics:
        yield f"{run.path}: nothing is measured yet; see microdit evaluate."


def _alone(measured: Measured) -> str:
    return figure(measured.value) + ("" if measured.pictures is None else f" of {count(measured.pictures)} pictures")
