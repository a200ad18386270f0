"""Fields of dataclasses, read from YAML: text as it was written, decimal numbers, and everything else refused by its key."""

import contextlib
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.errors import UserError
from microdit.io.strict_yaml import decimal, known_keys, override, parse_yaml, read_as
from microdit.ranges import Range


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
        ("parts: [{name: a, stpes: 1}]", r"unknown key parts.0.stpes; did you mean parts.0.steps\?"),
        ("named: {a: {name: [b]}}", "named.a.name is a list"),
        ("zzz: 1", "unknown key zzz; known keys: kind, maybe, named.NAME.name"),
        ("- a", "it is a list, and must be keys and values"),
    ],
)
def test_everything_else_is_refused_by_its_key(text, sentence):
    with pytest.raises(UserError, match=sentence):
        thing(text)


def test_a_decimal_number_is_one_in_ten_digits():
    assert [decimal(text) for text in ("010", "-2.5", "1e-3", "1_0", "0x1", "", "1e", ".")] == [10, -2.5, 0.001, *[None] * 5]
    assert [decimal(text, whole=True) for text in ("010", "2.5", "9" * 100)] == [10, None, None]


def test_keys_are_known_through_lists_and_mappings():
    assert {"parts.0.name", "parts.0.steps", "named.NAME.name", "text", "pair"} <= set(known_keys(Thing))
    assert not {"parts", "named", "text.low"} & set(known_keys(Thing))


LEAVES = st.text("no1_:.-~&*!{}[]'\"#${ex, \n", max_size=12)
KEYS = st.sampled_from(["text", "whole", "number", "share", "words", "parts", "name", "named"])


@given(st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8))
def test_any_tree_is_a_thing_or_a_sentence(tree):
    for text in (str(tree), "\n".join(f"{key}: {value}" for key, value in tree.items()) if isinstance(tree, dict) else f"text: {tree}"):
        with contextlib.suppress(UserError):
            assert isinstance(thing(text), Thing)
