"""Other people's text (names, captions, recipes, servers' answers), made fit to be shown."""

import unicodedata

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
