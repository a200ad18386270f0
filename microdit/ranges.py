"""Ranges of the values of recipes and studies, written in their annotations: `steps: Annotated[int, Range(1, 10**9)]`."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """The range from `low` to `high` of a number, a text's length or a list's length. `above` excludes `low`, `below` excludes `high`."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def holds(self, number: float) -> bool:
        over_low = number > self.low if self.above else number >= self.low
        return over_low and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        """Return the range in words: 'from 1 to 1,000', 'from 0 to less than 1'."""
        low = f"from above {_short(self.low)}" if self.above else f"from {_short(self.low)}"
        return f"{low} to {'less than ' if self.below else ''}{_short(self.high)}"


@dataclass(frozen=True, eq=False)
class OneOf:
    """The names in a table, to which rows may have been added by the time that a value is read."""

    table: Mapping[str, object]

    def __str__(self) -> str:
        return f"one of {', '.join(self.table)}"


def _short(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else f"{number:,}"
