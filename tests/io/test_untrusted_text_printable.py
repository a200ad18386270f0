import json
import unicodedata

import pytest

from microdit.io.untrusted_text import one_line, printable

HOSTILE = "\x1b[2J\x1b]0;title\x07 a\rb \x9b1m \u202egnp.exe \u2066x\u2069 \u200b \ufeff \ud83d \u2028 \x7f \x00"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\u001b[31mred"),
        ("\x9b31m", r"\u009b31m"),
        ("cat\rdog\b", r"cat\u000ddog\u0008"),
        ("photo\u202egnp.exe", r"photo\u202egnp.exe"),
        ("half \ud83d", r"half \ud83d"),
        ("\U000e0041", r"\udb40\udc41"),  # letters that nobody sees
        ("[b] é 猫\tmat\n", "[b] é 猫\tmat\n"),
        ("👩\u200d🚀 می\u200cخواهم", "👩\u200d🚀 می\u200cخواهم"),
    ],
)
def test_what_commands_is_written_out_and_everything_else_stays(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


def test_no_character_that_commands_is_left():
    everything = "".join(map(chr, range(0x20000)))
    left = {character for character in printable(everything) if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert left == set("\n\t\u200c\u200d")


def test_json_stays_the_same_json():
    content = {HOSTILE: ["\U000e0041", "é"]}
    assert json.loads(printable(json.dumps(content, ensure_ascii=False))) == content


def test_of_long_text_the_middle_is_left_out_and_counted():
    assert printable("a" * 5 + "x" * 1000 + "b" * 5, 10) == "aaaaa [... 1,000 characters left out ...] bbbbb"
    assert printable("a" * 10, 10) == "a" * 10


def test_one_line_is_one():
    assert one_line(" two\n\r\nlines\x1b\x85\u2028here ") == r"two lines\u001b here"
