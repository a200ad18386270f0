"""Numbers formatted for people. Missing values become a dash."""

import math
from datetime import UTC, datetime
from typing import Any

MISSING = "–"


def finite(value: Any) -> float | None:
    """Return `value` as a float, or None if it is not a finite number. Booleans and integers too large for a float are None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def figure(value: Any, digits: int = 4) -> str:
    """Format to `digits` significant digits: 0.1235, 12,350. Infinity and NaN (the loss of a diverged run) become "not finite"."""
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    number = finite(value)
    if number is None:
        return MISSING
    if abs(number) >= 10**digits:
        return f"{number:,.0f}"
    return f"{number:.{digits}g}"


def count(value: Any) -> str:
    """Format an integer: 1,234,567."""
    number = finite(value)
    return MISSING if number is None else f"{number:,.0f}"


def share(part: Any, whole: Any) -> float:
    """Return `part` of `whole` in percent, from 0 to 100; 0 if either is missing."""
    above, below = finite(part), finite(whole)
    return min(100.0, max(0.0, 100 * above / below)) if above and below else 0.0


def hours(value: Any) -> str:
    """Format hours, with two decimals below 1,000: 0.25, 12.40, 1,234."""
    number = finite(value)
    if number is None:
        return MISSING
    return f"{number:,.2f}" if number < 1000 else f"{number:,.0f}"


def money(value: Any) -> str:
    """Format dollars: $1,890.00."""
    number = finite(value)
    return MISSING if number is None else f"${number:,.2f}"


def duration(seconds: Any) -> str:
    """Format seconds in their two largest units: 3 d 4 h, 2 h 05 min, 7 min 03 s, 12 s, 0.25 s."""
    number = finite(seconds)
    if number is None or number < 0:
        return MISSING
    if number < 10:
        return f"{number:.2g} s"
    whole = round(number)
    if whole < 3600:
        return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(number / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def moment(unix: Any) -> str:
    """Format a Unix time in UTC: 2026-01-31 14:05."""
    number = finite(unix)
    if number is None or not 0 <= number < 2**40:
        return MISSING
    return datetime.fromtimestamp(number, UTC).strftime("%Y-%m-%d %H:%M")


def age(seconds: Any) -> str:
    """Format seconds in their largest unit: 12 s ago, 5 min ago, 3 h ago, 4 d ago."""
    number = finite(seconds)
    if number is None:
        return MISSING
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if number >= size:
            return f"{number // size:.0f} {unit} ago"
    return f"{max(0.0, number):.0f} s ago"
