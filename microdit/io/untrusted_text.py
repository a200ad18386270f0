"""Untrusted text: text files and JSON from elsewhere, and names, captions, recipes and command lines made safe to show.

`printable` and `one_line` escape text for terminals, `plain`, `code` and `block` for Markdown. `command_line` hides secrets in command
lines that are kept in shared records.
"""

import codecs
import json
import re
import shlex
import unicodedata
from collections.abc import Iterable
from itertools import chain
from typing import Any

_MARKS = (  # that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode_text(content: bytes) -> str:
    """Decode a text file: UTF-8, or UTF-16 or UTF-32 with a byte order mark. Raises UnicodeDecodeError if it is anything else."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding)
    if (place := content.find(b"\0")) >= 0:
        raise UnicodeDecodeError("utf-8", content, place, place + 1, "it holds null characters, as UTF-16 does")
    return content.decode()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as `json.loads` does, but raise ValueError also where brackets are nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError if the text is anything else."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


COMMANDS = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode categories: control, format, surrogate, line and paragraph separators
HARMLESS = set("\n\t\u200c\u200d")  # exceptions: the last two join and separate Persian letters and the parts of emoji


def printable(text: str, most: int | None = None) -> str:
    """Escape everything that controls a terminal or changes the reading direction: ESC becomes \\u001b.

    The escapes are JSON's, so escaped JSON keeps its meaning. If the text exceeds `most` characters, its middle is replaced by a count.
    """
    if most is not None and len(text) > most:
        half = most // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters left out ...] {text[-half:]}"
    return text if text.isprintable() else "".join(map(_visible, text))


def one_line(text: str, most: int | None = None) -> str:
    """Return printable text in one line: each run of white space becomes a blank."""
    return printable(" ".join(text.split()), most)


def _visible(character: str) -> str:
    if character in HARMLESS or unicodedata.category(character) not in COMMANDS:
        return character
    units = character.encode("utf-16-be", "surrogatepass").hex()  # two units beyond 16 bits, as in JSON
    return "".join(f"\\u{units[n : n + 4]}" for n in range(0, len(units), 4))


LONGEST = 500  # characters of a name or a value


def plain(text: object) -> str:
    """Escape text for a line or table cell of Markdown, without markup, HTML or formulas."""
    shown = one_line(str(text), LONGEST).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*_{}\[\]|~$]", r"\\\g<0>", shown)


def code(text: object) -> str:
    """Return a Markdown code span. Not for tables, where a | would end the cell."""
    shown = one_line(str(text), LONGEST)
    fence = "`" * (_longest_run(shown) + 1)
    blank = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{blank}{shown}{blank}{fence}"


def block(text: str, language: str = "") -> str:
    """Return a fenced Markdown code block."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{printable(text).strip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max(chain([0], map(len, re.findall("`+", text))))


HIDDEN = "***"
_SECRET = re.compile(
    r"(?:token|(?:key|secret|pass|password|passwd|passphrase|credential|auth|authorization|cookie)s?)\d*\s*$", re.IGNORECASE
)  # the end of a name; tokens are mostly counted
_URL = re.compile(r"[a-z][a-z\d+.-]*://\S+", re.IGNORECASE)


def command_line(arguments: Iterable[str]) -> str:
    """Return `arguments` as a shell command line, with `***` in place of secrets.

    Secrets are the values of options, settings and headers named key, token, secret, password or the like, and in URLs the user, the
    password and the query. When in doubt, text is hidden.
    """
    shown: list[str] = []
    is_secret = False
    for argument in arguments:
        shown.append(HIDDEN if is_secret else _URL.sub(lambda found: _without_secrets(found[0]), _without_value(argument)))
        is_secret = not is_secret and "=" not in argument and argument.startswith("-") and _SECRET.search(argument) is not None
    return shlex.join(shown)


def _without_value(argument: str) -> str:
    """Return NAME=VALUE or NAME: VALUE without the value if the name is that of a secret. The name may follow others, as in a header's."""
    names = (sign for sign in re.finditer("[=:]", argument) if _SECRET.search(argument[: sign.start()]))
    first = next(names, None)
    return argument if first is None else argument[: first.end()] + HIDDEN


def _without_secrets(url: str) -> str:
    scheme, _, rest = url.partition("://")
    _, at, place = rest.rpartition("@")
    shown = re.split("[?#]", place, maxsplit=1)
    return f"{scheme}://{HIDDEN if at else ''}{at}{shown[0]}{'?' + HIDDEN if len(shown) > 1 else ''}"
