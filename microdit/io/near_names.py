"""What somebody may have meant who mistyped a name."""

import difflib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

MOST_LISTED = 10_000  # files of a folder that are compared


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return " Did you mean CHOICE?", of the choice nearest to `name`, to follow a sentence; "" if none is near.

    >>> did_you_mean("emoji-fats", ["emoji", "emoji-fast", "microdit-xl"])
    ' Did you mean emoji-fast?'
    >>> did_you_mean("something else", ["emoji", "emoji-fast", "microdit-xl"])
    ''
    """
    return _sentence(nearest(name, choices))


def nearest(name: str, choices: Iterable[str]) -> list[str]:
    """Return the choice nearest to `name` in a list, or an empty one if none is near."""
    return difflib.get_close_matches(name, sorted(choices), n=1)


def _sentence(near: list[str]) -> str:
    return f" Did you mean {near[0]}?" if near else ""


def did_you_mean_path(place: str | Path) -> str:
    """Return the same for a path that does not exist, of what lies beside it."""
    path = Path(place).expanduser()
    try:
        beside = {item.name: str(item) for item in islice(path.parent.iterdir(), MOST_LISTED)}
    except OSError:  # no such folder, or none that may be listed: nothing is near
        return ""
    return _sentence([beside[name] for name in nearest(path.name, beside)])
