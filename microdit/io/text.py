"""JSON that others wrote.

Other people's text (names, captions, recipes, servers' answers), made fit to be shown.

Other people's text in Markdown, where it is no markup, no HTML and no formula.

Command lines as they are kept in records, which people share.
"""

import json
import re
import shlex
import unicodedata
from collections.abc import Iterable
from itertools import chain
from typing import Any


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


COMMANDS = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's categories: control, format, half of a character, ends of lines and paragraphs
HARMLESS = set("\n\t\u200c\u200d")  # of those; the last two join and part the letters of Persian, and the signs of emoji


def printable(text: str, most: int | None = None) -> str:
    """`text` with everything that would command a terminal, or turn the reading direction, written out: ESC becomes \\u001b.

    These are JSON's escapes, so that JSON stays what it was. Of more than `most` characters the middle is left out, and counted.
    """
    if most is not None and len(text) > most:
        half = most // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters left out ...] {text[-half:]}"
    return text if text.isprintable() else "".join(map(_visible, text))


def one_line(text: str, most: int | None = None) -> str:
    """The same, in one line: any space, ends of lines too, becomes a blank."""
    return printable(" ".join(text.split()), most)


def _visible(character: str) -> str:
    if character in HARMLESS or unicodedata.category(character) not in COMMANDS:
        return character
    units = character.encode("utf-16-be", "surrogatepass").hex()  # beyond 16 bits two of them, as JSON has it
    return "".join(f"\\u{units[n : n + 4]}" for n in range(0, len(units), 4))


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


HIDDEN = "***"
_SECRET = re.compile(r"(?:key|token|secret|password|passwd|passphrase|credentials?|auth|authorization)$", re.IGNORECASE)  # a name's end
_URL = re.compile(r"[a-z][a-z\d+.-]*://\S+", re.IGNORECASE)


def command_line(arguments: Iterable[str]) -> str:
    """The line that `arguments` were typed in, for a shell, with `***` in the place of secrets.

    Those are what follows an option, or the = of a setting, that is called a key, token, secret, password or the like; and of a URL
    the user's name with the password, and all of the query. Rather too much is hidden than too little.
    """
    shown: list[str] = []
    is_secret = False
    for argument in arguments:
        name, sign, _ = argument.partition("=")
        told = f"{name}={HIDDEN}" if sign and _SECRET.search(name) else argument
        shown.append(HIDDEN if is_secret else _URL.sub(lambda found: _without_secrets(found[0]), told))
        is_secret = not is_secret and not sign and argument.startswith("-") and _SECRET.search(argument) is not None
    return shlex.join(shown)


def _without_secrets(url: str) -> str:
    scheme, _, rest = url.partition("://")
    _, at, place = rest.rpartition("@")
    shown = re.split("[?#]", place, maxsplit=1)
    return f"{scheme}://{HIDDEN if at else ''}{at}{shown[0]}{'?' + HIDDEN if len(shown) > 1 else ''}"
