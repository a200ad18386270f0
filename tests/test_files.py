import json

import pytest

from microdit.files import from_checked_json, to_checked_json
from tests.damage import ALL_BITS, flips

CONTENT = {
    "step": 60,
    "loss": 0.1,
    "nothing": None,
    "name": "gr\u00fcn \ud800",
    "sha256": "of something else",
    "files": {"a": [1, {"b": True}]},
    "nan": float("inf"),
}


def test_it_is_json_to_others_and_the_same_content_to_us():
    raw = to_checked_json(CONTENT)
    assert from_checked_json(raw) == CONTENT
    assert json.loads(raw).items() >= CONTENT.items()
    assert from_checked_json(to_checked_json({})) == {}


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "content.json"
    path.write_bytes(to_checked_json(CONTENT))
    for _ in flips(path, bits=ALL_BITS):
        with pytest.raises(ValueError):  # noqa: PT011 - half of them are no JSON any more, in many ways
            from_checked_json(path.read_bytes())
    assert from_checked_json(path.read_bytes()) == CONTENT


@pytest.mark.parametrize("cut", [0, 1, 20, -70, -5, -1])
def test_a_cut_file_is_noticed(cut):
    with pytest.raises(ValueError):  # noqa: PT011
        from_checked_json(to_checked_json(CONTENT)[:cut])


@pytest.mark.parametrize("content", [b"", b"[]", b"1", b"\xff", b"[" * 100_000, b'{"a": ' * 100_000])
def test_what_is_no_object_is_refused(content):
    with pytest.raises(ValueError):  # noqa: PT011
        from_checked_json(content)


def test_what_has_no_checksum_is_read_as_it_is():
    assert from_checked_json(b'{"step": 60}') == {"step": 60}
    with pytest.raises(ValueError, match="its checksum differs"):
        from_checked_json(to_checked_json(CONTENT).replace(b'"self_sha256": ', b'"other": '))
    with pytest.raises(ValueError, match="its checksum differs"):
        from_checked_json(to_checked_json(CONTENT) + b"\n")
