"""Durations as people read them."""

import pytest

from microdit.reports.formats import MISSING, duration


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.0214, "0.021 s"),
        (9.94, "9.9 s"),
        (12.4, "12 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (4 * 86400 + 7200, "4 d 2 h"),
        (-1, MISSING),
        (None, MISSING),
    ],
)
def test_below_an_hour_seconds_are_said(seconds, said):
    assert duration(seconds) == said
