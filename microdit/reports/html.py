"""Pages of HTML that need nothing else: no script, no font, no picture from elsewhere."""

import base64
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from microdit.io.text import printable
from microdit.reports import formats


def page_template(name: str) -> jinja2.Template:
    """Of this folder. Escapes everything: recipes, names, captions and reasons are other people's text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name_of_filter in ("figure", "count", "hours", "money", "duration", "moment", "share"):
        environment.filters[name_of_filter] = getattr(formats, name_of_filter)
    return environment.get_template(name)


def _shown(value: Any) -> Any:
    """What a page says as text; our own drawings stay as they are."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def picture_address(kind: str, content: bytes) -> str:
    """What an <img> shows. `kind`: png or webp."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
