"""A Jupyter notebook as a page of the site: its text, its code, and what its cells printed and drew."""

import json
from typing import Any

PICTURES = ("image/png", "image/jpeg")


def notebook_page(text: str) -> str:
    """Return the Markdown page of a notebook (nbformat 4). Pictures are part of the page."""
    return "\n\n".join(part for cell in json.loads(text)["cells"] for part in _parts(cell)) + "\n"


def _parts(cell: dict[str, Any]) -> list[str]:
    source = _joined(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    return [_fenced(source, "python"), *(part for output in cell["outputs"] if (part := _shown(output)))]


def _shown(output: dict[str, Any]) -> str:
    """Return the picture of an output, or else its text."""
    data = output.get("data", {})
    for kind in PICTURES:
        if kind in data:
            return f"![drawn by the cell above](data:{kind};base64,{''.join(_joined(data[kind]).split())})"
    printed = _joined(output.get("text") or data.get("text/plain", "")).rstrip()
    return _fenced(printed, "text") if printed else ""


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text}\n````"


def _joined(lines: str | list[str]) -> str:
    """Return a multi-line string of a notebook, which may be stored as a list of lines."""
    return lines if isinstance(lines, str) else "".join(lines)
