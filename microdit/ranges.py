"""Ranges of the values of recipes and studies, written in their annotations: `steps: Annotated[int, Range(1, 10**9)]`."""

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


def _short(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else f"{number:,}"
