"""A row of the table that `benchmarks/scale.py` prints: one thing that grows with the size of a run, and the bar that it must keep."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SIZES = {"1 x": 0.01, "10 x": 0.1, "paper": 1.0}  # of the paper's run: 37 M pictures in 10,000 shards
PICTURES, SHARDS, SHARD_ROWS, RANKS = 37_000_000, 10_000, 3_700, 64


class Row(NamedTuple):
    """`figures` by the names of SIZES; one that was reckoned from the others begins with "->"."""

    what: str
    figures: dict[str, str]
    bar: str
    holds: bool


Measure = Callable[[Path], list[Row]]
"""Fabricates what it needs in an empty folder, and measures there."""
