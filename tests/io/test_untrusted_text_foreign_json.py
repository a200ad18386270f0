import pytest

from microdit.io.untrusted_text import parse_json, parse_json_object


def test_json_is_read():
    assert parse_json(b'{"a": [1, "\xc3\xa9"]}') == {"a": [1, "é"]}


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "[" * 200_000 + "]" * 200_000])
def test_what_is_nested_too_deeply_is_a_value_error(text):
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "why"), [(b"\xff\xfe\xfd", "decode"), ("1" * 10_000, "limit"), ("", "Expecting value"), ("{", "Expecting")]
)
def test_what_is_no_json_is_a_value_error(text, why):
    with pytest.raises(ValueError, match=why):
        parse_json(text)


def test_only_an_object_is_an_object():
    assert parse_json_object('{"a": 1}') == {"a": 1}
    for other in ("[]", '"a"', "1", "null"):
        with pytest.raises(ValueError, match="it is not a JSON object"):
            parse_json_object(other)
