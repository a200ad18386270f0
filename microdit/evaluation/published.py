"""Figures that others have published, each with its source: published.yaml, read.

`python -m microdit.evaluation.published` prints docs/reference-results.md, which is made of nothing else.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from microdit.evaluation.geneval.rules import TASKS as GENEVAL_TASKS
from microdit.io.text import printable
from microdit.reports.formats import MISSING, count, figure

DATA = Path(__file__).with_name("published.yaml")
TITLES = {"main": "Quality and cost", "geneval": "GenEval by task", "ablations": "Ablations"}
TASKS = ("overall", *GENEVAL_TASKS)
METRICS = {  # all that rows may have, in the order of columns
    "fid": "FID", "clip-fid": "CLIP FID", "clip-score": "CLIP score", "preferred": "preferred", "speed-up": "speed-up",
    "overall": "overall", "single_object": "one object", "two_object": "two objects", "counting": "counting", "colors": "colours",
    "position": "position", "color_attr": "colour of each",
}  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """How figures were measured; None is what the source does not say.

    `reference`: the pictures that were compared with. `pictures`: how many were drawn. `side`: their pixels when compared.
    `networks`: by metric, the family of the network that saw them.
    """

    what: str
    networks: dict[str, str | None]
    reference: str | None = None
    pictures: int | None = None
    side: int | None = None


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a model is and what its training took; None is what nobody says.

    `images` are different ones, `seen` counts each as often as it was shown. `gpu_days` are days of one `gpu`.
    """

    parameters: int | None = None
    images: int | None = None
    seen: int | None = None
    gpu_days: float | None = None
    gpu: str | None = None
    dollars: float | None = None

    def cells(self) -> list[str]:
        """As people read it, under TRAINING_COLUMNS: 1.16 B, 37 M, 686 M, 20.8 H100, $1,890."""
        days = figure(self.gpu_days, 3) + (f" {self.gpu}" if self.gpu and self.gpu_days is not None else "")
        dollars = MISSING if self.dollars is None else f"${figure(self.dollars, 2)}"
        return [_rounded(self.parameters), _rounded(self.images), _rounded(self.seen), days, dollars]


TRAINING_COLUMNS = ("params", "images", "seen", "GPU-days", "cost")


@dataclass(frozen=True, kw_only=True)
class Row(Training):
    """One model's figures. `source`: who says so; `through`: where we read it, if not there."""

    name: str
    metrics: dict[str, float]
    source: str
    protocol: str | None = None  # a key of Published.protocols; none where nothing was measured
    study: str | None = None  # what the ablation is about
    through: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Published:
    """`tables`: rows by the keys of TITLES. `missing`: sentences on what could not be found."""

    protocols: dict[str, Protocol]
    tables: dict[str, tuple[Row, ...]]
    missing: tuple[str, ...]


@cache
def load_published() -> Published:
    """The package's own file; a mistake in it is ours, and raises whatever comes first."""
    content: dict[str, Any] = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    return Published(
        protocols={name: Protocol(**entry) for name, entry in content["protocols"].items()},
        tables={table: tuple(Row(**entry) for entry in content[table]) for table in TITLES},
        missing=tuple(content["missing"]),
    )


def metrics_of(rows: Iterable[Row]) -> list[str]:
    """Those that any of the rows has, in the order of columns."""
    found = {name for row in rows for name in row.metrics}
    return [name for name in METRICS if name in found]


def metric_cell(metric: str, value: float | None) -> str:
    """GenEval's shares to two digits, as they are published."""
    return figure(value) if value is None or metric not in TASKS else f"{value:.2f}"


def page(published: Published) -> str:
    """All tables as Markdown."""
    parts = [_INTRODUCTION]
    for table, title in TITLES.items():
        parts += [f"## {title}\n", _markdown_table(table, published.tables[table])]
        used = {row.protocol: None for row in published.tables[table] if row.protocol}
        parts.append("".join(f"- `{name}`: {published.protocols[name].what}.\n" for name in used))
    parts += ["## What could not be found\n", "".join(f"- {sentence}\n" for sentence in published.missing)]
    return "\n".join(parts)


_INTRODUCTION = """# Reference results

What others have published, to lay a run beside: `microdit compare RUN`. Printed from `microdit/evaluation/published.yaml` by
`python -m microdit.evaluation.published`; change figures there. We measured none of them. A dash is what the source does not say.
*Read in* names where a figure was found that we could not read in its source: trust it less.
"""


def _markdown_table(table: str, rows: tuple[Row, ...]) -> str:
    metrics = metrics_of(rows)
    study, training = ["study"] * (table == "ablations"), TRAINING_COLUMNS if table == "main" else ()
    header = [*study, "model", *training, *(METRICS[name] for name in metrics), "measured", "source"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = row.cells() if training else []
        figures = [metric_cell(name, row.metrics.get(name)) for name in metrics]
        lines.append([*([row.study or MISSING] if study else []), row.name, *cells, *figures, row.protocol or MISSING, _origin(row)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _origin(row: Row) -> str:
    return (
        row.source + (f". *Read in:* {row.through}" if row.through else "") + (f". {row.note[0].upper()}{row.note[1:]}" if row.note else "")
    )


def _rounded(value: float | None) -> str:
    """1.16 B, 37 M"""
    if value is None:
        return MISSING
    for size, unit in ((1e9, " B"), (1e6, " M")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return count(value)


if __name__ == "__main__":
    print(printable(page(load_published())), end="")
