"""Published results of other models, each with its source, from published.yaml.

`python -m microdit.evaluation.published` prints docs/reference-results.md, which is generated from that file alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from microdit.evaluation.geneval.rules import TASKS as GENEVAL_TASKS
from microdit.io.untrusted_text import printable
from microdit.reports.formats import MISSING, count, figure

DATA = Path(__file__).with_name("published.yaml")
TITLES = {"main": "Quality and cost", "geneval": "GenEval by task", "benchmarks": "GenEval, DPG-Bench and cost", "ablations": "Ablations"}
TASKS = ("overall", *GENEVAL_TASKS)
METRICS = {  # in the order of columns
    "fid": "FID", "clip-fid": "CLIP FID", "clip-score": "CLIP score", "preferred": "preferred", "speed-up": "speed-up",
    "overall": "overall", "single_object": "one object", "two_object": "two objects", "counting": "counting", "colors": "colours",
    "position": "position", "color_attr": "colour of each", "dpg": "DPG",
}  # fmt: skip
WITH_COST = ("main", "benchmarks")  # tables that show size and cost


@dataclass(frozen=True)
class Protocol:
    """The protocol by which figures were measured. None means that the source does not say.

    `reference` is the reference set, `pictures` the number of generated images, `side` their size in pixels when compared, and `networks`
    the family of the feature network of each metric.
    """

    what: str
    networks: dict[str, str | None]
    reference: str | None = None
    pictures: int | None = None
    side: int | None = None


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model's size and training cost. None means unknown.

    `images` counts distinct images, `seen` counts each as often as it was seen. `gpu_days` are days of one `gpu`.
    """

    parameters: int | None = None
    images: int | None = None
    seen: int | None = None
    gpu_days: float | None = None
    gpu: str | None = None
    dollars: float | None = None

    def cells(self) -> list[str]:
        """Format the values for TRAINING_COLUMNS: 1.16 B, 37 M, 686 M, 20.8 H100, $1,890."""
        days = figure(self.gpu_days, 3) + (f" {self.gpu}" if self.gpu and self.gpu_days is not None else "")
        dollars = MISSING if self.dollars is None else f"${figure(self.dollars, 2)}"
        return [_rounded(self.parameters), _rounded(self.images), _rounded(self.seen), days, dollars]


TRAINING_COLUMNS = ("params", "images", "seen", "GPU-days", "cost")


@dataclass(frozen=True, kw_only=True)
class PublishedResult(Training):
    """One model's published figures. `source` reports them; `through` is where they were read, if not in the source itself."""

    name: str
    metrics: dict[str, float]
    source: str
    protocol: str | None = None  # a key of Published.protocols; None if nothing was measured
    study: str | None = None  # the subject of an ablation
    through: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Published:
    """All published results. `tables` has the keys of TITLES; `missing` holds sentences on figures that could not be found."""

    protocols: dict[str, Protocol]
    tables: dict[str, tuple[PublishedResult, ...]]
    missing: tuple[str, ...]


@cache
def load_published() -> Published:
    """Load published.yaml."""
    content: dict[str, Any] = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    return Published(
        protocols={name: Protocol(**entry) for name, entry in content["protocols"].items()},
        tables={table: tuple(PublishedResult(**entry) for entry in content[table]) for table in TITLES},
        missing=tuple(content["missing"]),
    )


def metrics_of(rows: Iterable[PublishedResult]) -> list[str]:
    """Return the metrics that any of the rows has, in the order of columns."""
    found = {name for row in rows for name in row.metrics}
    return [name for name in METRICS if name in found]


def metric_cell(metric: str, value: float | None) -> str:
    """Format a value for the metric's column. GenEval's shares have two digits, as most are published, or three if there are more."""
    if value is None or metric not in TASKS:
        return figure(value)
    return f"{value:.2f}" if round(value, 2) == value else f"{value:.3f}"


def page(published: Published) -> str:
    """Return the content of docs/reference-results.md."""
    parts = [_INTRODUCTION]
    for table, title in TITLES.items():
        parts += [f"## {title}\n", _markdown_table(table, published.tables[table])]
        used = {row.protocol: None for row in published.tables[table] if row.protocol}
        parts.append("".join(f"- `{name}`: {published.protocols[name].what}.\n" for name in used))
    parts += ["## What could not be found\n", "".join(f"- {sentence}\n" for sentence in published.missing)]
    return "\n".join(parts)


_INTRODUCTION = """# Reference results

Published results of other models, which `microdit compare RUN` shows next to a run. This page is generated from
`microdit/evaluation/published.yaml` by `python -m microdit.evaluation.published`; change figures there. None of them was measured by this
project. A dash means that the source does not say. *Read in* marks figures that were read in a secondary source and are less certain.
"""


def _markdown_table(table: str, rows: tuple[PublishedResult, ...]) -> str:
    metrics = metrics_of(rows)
    study, training = ["study"] * (table == "ablations"), TRAINING_COLUMNS if table in WITH_COST else ()
    header = [*study, "model", *training, *(METRICS[name] for name in metrics), "measured", "source"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = row.cells() if training else []
        figures = [metric_cell(name, row.metrics.get(name)) for name in metrics]
        lines.append([*([row.study or MISSING] if study else []), row.name, *cells, *figures, row.protocol or MISSING, _origin(row)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _origin(row: PublishedResult) -> str:
    return (
        row.source + (f". *Read in:* {row.through}" if row.through else "") + (f". {row.note[0].upper()}{row.note[1:]}" if row.note else "")
    )


def _rounded(value: float | None) -> str:
    """Format a large number: 1.16 B, 37 M."""
    if value is None:
        return MISSING
    for size, unit in ((1e9, " B"), (1e6, " M")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return count(value)


if __name__ == "__main__":
    print(printable(page(load_published())), end="")
