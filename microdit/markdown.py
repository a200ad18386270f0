"""Other people's text in Markdown, where it is no markup, no HTML and no formula."""

import re
from itertools import chain

from microdit.printable import one_line, printable

LONGEST = 500  # characters of a name or a value


def plain(text: object) -> str:
    """For a line, or a table's cell."""
    shown = one_line(str(text), LONGEST).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*_{}\[\]|~$]", r"\\\g<0>", shown)


def code(text: object) -> str:
    """A span of code, not for tables: there a | would end its cell."""
    shown = one_line(str(text), LONGEST)
    fence = "`" * (_longest_run(shown) + 1)
    blank = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{blank}{shown}{blank}{fence}"


def block(text: str, language: str = "") -> str:
    """Lines of code, whole."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{printable(text).strip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max(chain([0], map(len, re.findall("`+", text))))
