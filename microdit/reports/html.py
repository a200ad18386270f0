"""Self-contained HTML pages: templates and embedded images, without scripts, fonts or images from elsewhere."""

import base64
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from microdit.io.untrusted_text import printable
from microdit.reports import formats


def load_template(name: str) -> jinja2.Template:
    """Load a template of reports/templates. All values are escaped: recipes, names, captions and reasons are untrusted text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name_of_filter in ("figure", "count", "hours", "money", "duration", "moment", "share"):
        environment.filters[name_of_filter] = getattr(formats, name_of_filter)
    return environment.get_template(name)


def _printable(value: Any) -> Any:
    """Make a value's control characters visible. Markup, such as our own SVG, passes unchanged."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def image_data_url(kind: str, content: bytes) -> str:
    """Return the data URL of an image file for an <img> tag. `kind` is png or webp."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
