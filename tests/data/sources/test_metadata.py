"""Captions in fields and in files beside images."""

import json

import pytest

from microdit.data.sources.folders import folder_source
from microdit.data.sources.metadata import field_of, file_named, find_caption_name, find_name, from_fields, from_sidecars
from tests.data.pictures import picture, records_of, write_file


def sidecar(fields, wanted=("caption",)):
    return from_sidecars({"json": json.dumps(fields).encode()}, wanted)


def test_usual_names_are_found_in_any_case_and_in_order():
    assert find_caption_name(["url", "Prompt", "TEXT"]) == "TEXT"
    assert find_caption_name(["name", "Title", "prompt"]) == "prompt"
    assert find_caption_name(["Name", "width"]) == "Name"
    assert find_caption_name(["width"]) is None
    assert find_name(["File-Name", "path"], ("filename", "path")) == "File-Name"
    assert file_named({"Image Path": "a.png", "url": "https://x"}) == "a.png"
    assert file_named({"image": {"bytes": None, "path": "a.png"}}) == "a.png"
    assert file_named({"image": 5}) == file_named({"width": 5}) == ""


@pytest.mark.parametrize("name", ["caption", "Caption", "text", "TEXT", "prompt", "title", "description", "name"])
def test_json_beside_a_picture_has_the_same_names_as_tables(name):
    assert sidecar({name: "words", "width": 5}) == ({"caption": "words"}, "")


def test_a_text_file_comes_before_fields_with_other_names():
    files = {"txt": b"from text", "json": b'{"text": "from json"}'}
    assert from_sidecars(files, ("caption", "text")) == ({"caption": "from text", "text": "from json"}, "")
    assert from_sidecars({**files, "txt": b" "}, ("caption",)) == ({}, "no caption")


def test_fields_inside_others_have_paths():
    fields = {"metadata": {"caption": "deep", "more": {"alt": "deeper"}}, "a.b": "with a dot", "json": '{"caption": "in text"}'}
    assert field_of(fields, "metadata.more.alt") == "deeper"
    assert field_of(fields, "a.b") == "with a dot"
    assert field_of(fields, "json.caption") == "in text"
    assert field_of(fields, "metadata.gone") is field_of(fields, "a.gone") is None
    assert sidecar(fields, ("metadata.caption",)) == ({"metadata.caption": "deep"}, "")


@pytest.mark.parametrize(
    ("value", "caption", "problem"),
    [
        (["", "b"], "b", ""),
        ([["b", "c"], "d"], "b", ""),
        ([[], [[" "]]], "", "no caption"),
        ([" "], "", "no caption"),
        ([5], "", "caption is not text"),
        ({"text": "x"}, "", "caption is not text"),
        (None, "", "no caption"),
        ("w" * 131_073, "", "caption is too long"),
    ],
)
def test_what_is_no_caption_is_named_for_what_it_is(value, caption, problem):
    found, reason = from_fields({"caption": value}, ("caption",))
    assert (found.get("caption", ""), reason) == (caption, problem)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_files_with_a_mark_are_read_in_their_encoding(tmp_path, encoding):
    write_file(tmp_path / "a.png", picture())
    write_file(tmp_path / "a.txt", "f\u00fcr \u2028 \u65e5\u672c".encode(encoding))
    assert records_of(folder_source(tmp_path))[0].captions == {"caption": "f\u00fcr \u2028 \u65e5\u672c"}


@pytest.mark.parametrize("content", ["words".encode("utf-16-le"), "words".encode("utf-16-be"), b"f\xfcr", b"a\0b"])
def test_text_in_an_unknown_encoding_is_named(content):
    assert from_sidecars({"txt": content}, ("caption",)) == ({}, "caption is not UTF-8")
