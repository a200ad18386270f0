"""Command lines as they are kept in records, which people share."""

import re
import shlex
from collections.abc import Iterable

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
