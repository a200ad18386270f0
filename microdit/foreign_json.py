"""JSON that others wrote."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`, but raises ValueError for everything that cannot be read, brackets within a thousand brackets included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
