"""YAML as data: nothing in it reaches out of the file, or takes more than the file's own size."""

import pytest

from microdit.errors import UserError
from microdit.io.strict_yaml import MOST_BYTES, override, parse_yaml, read_yaml

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (LAUGHS, "line 1: anchors and aliases"),
        ("a: &x [*x]", "line 1: anchors and aliases"),
        ("text: !!python/object/apply:os.system [ls]", r"line 1: tags \(tag:yaml.org,2002:python/object/apply:os.system\) are not read"),
        ("text: !!int 3", "line 1: tags"),
        ("text: a\nwhole: 1\ntext: b", "line 3: the key text is there twice"),
        ("? [a]\n: b", "line 1: a key must be a word"),
        ("text: a\n---\ntext: b", "line 2: a second document"),
        ("[" * 100_000, "line 1: more than 12 lists and mappings"),
        ("{a: " * 20_000, "line 1: more than 12 lists and mappings"),
        ("- " * 50_000, "line 1: more than 12 lists and mappings"),
        ("a: [", "f is not readable YAML"),
        ("a: \x00", "f is not readable YAML"),
        ('a: "\\U00110000"', "f is not readable YAML"),
        ('a: "\\e[2J"', r"line 1: a text holds the control character '\\x1b'"),
        ('"\\x9b": a', r"line 1: a text holds the control character '\\x9b'"),
        ('a: "\\N"', r"line 1: a text holds the control character '\\x85'"),
        ("a: \ud800", "f is not readable YAML"),
    ],
)
def test_what_is_more_than_data_is_refused_before_it_is_read(text, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_yaml(text, "f")


def test_a_file_is_read_only_so_far(tmp_path):
    path = tmp_path / "large.yaml"
    with path.open("wb") as file:
        file.truncate(10**12)  # on the disk it is empty
    with pytest.raises(UserError, match=f"large.yaml is too large: it may have {MOST_BYTES:,} bytes"):
        read_yaml(path)
    path.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(UserError, match=r"large\.yaml is not readable YAML"):
        read_yaml(path)
    path.write_text("text: no\n")
    assert read_yaml(path) == {"text": "no"}


@pytest.mark.parametrize(
    ("said", "there"),
    [
        ("text=a: b # c", {"text": "a: b # c"}),
        ("text= - x ", {"text": "- x"}),
        ("text=", {"text": ""}),
        ("words=[a, 'b: c']", {"words": ["a", "b: c"]}),
        ("text='a=b'", {"text": "a=b"}),
        ("named.new.name=x", {"named": {"new": {"name": "x"}}}),
        ("parts.1.steps=3", {"parts": [{"name": "a"}, {"name": "b", "steps": "3"}]}),
        ("parts.0={name: c}", {"parts": [{"name": "c"}, {"name": "b"}]}),
    ],
)
def test_an_override_is_text_unless_it_looks_like_yaml(said, there):
    before = "text: no\nparts: [{name: a}, {name: b}]\nnamed:"
    tree = parse_yaml(before, "f")
    override(tree, said)
    assert tree == {**parse_yaml(before, "f"), **there}


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("text", "'text' is not an override: write key=value"),
        ("=3", "is not an override"),
        ("parts.1.name=x", "'parts.1.name=x' does not fit: 1 is none of the 1 entries"),
        ("parts.-1.name=x", "-1 is none of the 1 entries"),
        ("parts.1=x", "1 is none of the 1 entries"),
        ("text.a=x", "does not fit: there is a single value where it looks for a"),
        ("words=[a", r"The override 'words=\[a' is not readable YAML"),
        ("words=[&a b]", "anchors and aliases"),
        ("text=a\x1b[2J", r"'text=a\\x1b\[2J' holds the control character '\\x1b'"),
    ],
)
def test_an_override_that_does_not_fit_says_why(said, sentence):
    with pytest.raises(UserError, match=sentence):
        override(parse_yaml("parts: [{name: a}]\ntext: b", "f"), said)
