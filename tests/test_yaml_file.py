"""YAML as data: text as it was written, decimal numbers, and nothing that reaches out of the file."""

import contextlib
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.errors import UserError
from microdit.ranges import Range
from microdit.yaml_file import MOST_BYTES, known_keys, override, parse_yaml, read_as, read_yaml


@dataclass(frozen=True)
class Part:
    name: str
    steps: Annotated[int, Range(1, 1000)] = 1


@dataclass(frozen=True)
class Thing:
    text: Annotated[str, Range(1, 100)] = "a"
    maybe: str | None = None
    whole: Annotated[int, Range(-9, 10**6)] = 0
    number: Annotated[float, Range(0, 1000, above=True)] = 1.0
    truth: bool = False
    share: bool | Annotated[float, Range(0, 1)] = False
    kind: Literal["no", "other"] = "other"
    pair: tuple[int, float] | None = None
    words: Annotated[list[str], Range(0, 3)] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    named: dict[str, Part] = field(default_factory=dict)


def thing(text: str, *overrides: str) -> Thing:
    tree = parse_yaml(text, "f")
    for said in overrides:
        override(tree, said)
    return read_as(Thing, tree, "f")


AS_WRITTEN = [
    "no",
    "on",
    "12:30",
    "2024_01",
    "010",
    "0x1F",
    "1e3",
    "~",
    "null",
    "2026-11-26",
    "3.10",
    ".nan",
    "1_000",
    "<<",
    "=",
    "true",
]


@pytest.mark.parametrize("text", [*AS_WRITTEN, "${oc.env:HOME}", "$HOME", "a ${b} c"])
def test_text_stays_as_it_was_written(text, monkeypatch):
    monkeypatch.setenv("HOME", "secret")
    assert thing(f"text: {text}\nwords:\n- {text}") == Thing(text=text, words=[text])
    assert thing("truth: no", f"text={text}").text == text


def test_a_word_is_the_key_and_nothing_is_nothing_only_where_it_may_be():
    assert thing("named: {no: {name: yes}, 2024_01: {name: 010}}").named == {"no": Part("yes"), "2024_01": Part("010")}
    assert [thing(f"maybe: {text}").maybe for text in ("null", "~", "", "'null'", '""', "nil")] == [None, None, None, "null", "", "nil"]
    assert thing("parts:\nnamed: null", "maybe=", "words=[null]") == Thing(words=["null"])


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("whole: 010", Thing(whole=10)),
        ("whole: +7", Thing(whole=7)),
        ("whole: '12'", Thing(whole=12)),
        ("number: 1e-3", Thing(number=0.001)),
        ("number: 1E2", Thing(number=100.0)),
        ("number: .5", Thing(number=0.5)),
        ("number: 3", Thing(number=3.0)),
        ("number: 4.", Thing(number=4.0)),
        ("truth: yes", Thing(truth=True)),
        ("truth: Off", Thing(truth=False)),
        ("share: true", Thing(share=True)),
        ("share: 0.25", Thing(share=0.25)),
        ("kind: no", Thing(kind="no")),
        ("pair: [1, 2]", Thing(pair=(1, 2.0))),
    ],
)
def test_values_are_read_by_the_type_of_their_field(text, read):
    assert thing(text) == read


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        *[
            (f"whole: {text}", rf"f: whole is {text}, and must be a whole number from -9 to 1,000,000\.")
            for text in ("1_0", "1:30", "0x10")
        ],
        *[
            (f"whole: {text}", "whole is .*, and must be a whole number")
            for text in ("1e3", "1.0", "0o17", "٣", "1000001", "9" * 5000, "true")
        ],
        *[
            (f"number: {text}", "number is .*, and must be a number from above 0 to 1,000")
            for text in (".nan", ".inf", "0", "1e999", "1_0", "6:30")
        ],
        ("truth: 1", "truth is 1, and must be true or false"),
        ("kind: yes", "kind is yes, and must be one of no, other"),
        ("text:", "text has 0 letters, and may have from 1 to 100"),
        (f"text: {'x' * 101}", "text has 101 letters"),
        ("text: [a]", "text is a list, and must be text"),
        ("words:\n- a sign: red heart", "words.0 is a mapping, and must be text: put it in quotes"),
        ("words: [a, b, c, d]", "words has 4 entries, and may have from 0 to 3"),
        ("words: a", "words is a, and must be a list"),
        ("pair: [1]", "pair is a list, and must be a list of 2"),
        ("named: [a]", "named is a list, and must be a mapping"),
        ("parts: [{steps: 1}]", "parts.0.name is missing, and has no default"),
        ("parts: [{name: a, stpes: 1}]", r"unknown key parts.0.stpes; did you mean named.steps or parts.steps\?"),
        ("named: {a: {name: [b]}}", "named.a.name is a list"),
        ("zzz: 1", "unknown key zzz; known keys: kind, maybe, named.name"),
        ("- a", "it is a list, and must be keys and values"),
    ],
)
def test_everything_else_is_refused_by_its_key(text, sentence):
    with pytest.raises(UserError, match=sentence):
        thing(text)


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
    ("said", "read"),
    [
        ("text=a: b # c", Thing(text="a: b # c")),
        ("text= - x ", Thing(text="- x")),
        ("words=[a, 'b: c']", Thing(words=["a", "b: c"])),
        ("named.new.name=x", Thing(named={"new": Part("x")}, parts=[])),
        ("parts=[{name: a}]", Thing(parts=[Part("a")])),
    ],
)
def test_an_override_is_text_unless_it_begins_as_a_list_a_mapping_or_a_quote(said, read):
    assert thing("truth: no", said) == read
    assert thing("parts: [{name: a}, {name: b}]", "parts.1.steps=3").parts == [Part("a"), Part("b", 3)]


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
        thing("parts: [{name: a}]\ntext: b", said)


def test_keys_are_known_through_lists_and_mappings():
    assert {"parts.name", "parts.steps", "named.name", "text", "pair"} <= set(known_keys(Thing))
    assert not {"parts", "named", "text.low"} & set(known_keys(Thing))


LEAVES = st.text("no1_:.-~&*!{}[]'\"#${ex, \n", max_size=12)
KEYS = st.sampled_from(["text", "whole", "number", "share", "words", "parts", "name", "named"])


@given(st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8))
def test_any_tree_is_a_thing_or_a_sentence(tree):
    for text in (str(tree), "\n".join(f"{key}: {value}" for key, value in tree.items()) if isinstance(tree, dict) else f"text: {tree}"):
        with contextlib.suppress(UserError):
            assert isinstance(thing(text), Thing)
