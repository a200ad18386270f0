import json
import shutil

import pytest

from microdit.data.card import read_card
from microdit.data.latents import EncodedSet
from microdit.errors import UserError
from microdit.files import from_checked_json
from tests.damage import ALL_BITS, flips


@pytest.fixture
def copy(encoded_emoji, tmp_path):
    return shutil.copytree(encoded_emoji, tmp_path / "copy")


@pytest.mark.parametrize("bits", [None, pytest.param(ALL_BITS, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_the_card_is_noticed_at_opening(copy, bits):
    card = read_card(copy)
    for _ in flips(copy / "card.json", bits=bits):
        with pytest.raises(UserError, match=r"card\.json is damaged .*: encode the data again"):
            EncodedSet(copy)
    assert read_card(copy) == card


def test_the_manifests_of_shards_are_covered_too(copy):
    """An encoding that goes on adds them up to a card."""
    assert from_checked_json((copy / "shard-00000.json").read_bytes()) == read_card(copy)["shards"][0]
    for _ in flips(copy / "shard-00000.json"):
        with pytest.raises(ValueError):  # noqa: PT011
            from_checked_json((copy / "shard-00000.json").read_bytes())


def as_format_2(folder):
    """Leave the card as version 2 wrote it."""
    card = from_checked_json((folder / "card.json").read_bytes())
    for shard in card["shards"]:
        del shard["checksums"]
    (folder / "card.json").write_text(json.dumps({**card, "format": 2}, indent=1))


def test_a_set_of_format_2_is_read_as_before(encoded_emoji, copy):
    as_format_2(copy)
    ours, old = EncodedSet(encoded_emoji), EncodedSet(copy)
    for row in range(40):
        assert [bytes(blob) for blob in old.read(0, row)] == [bytes(blob) for blob in ours.read(0, row)]
    assert old.column("captions") == ours.column("captions")
    assert old.verify() == []


def test_a_format_that_is_not_known_is_refused(copy):
    (copy / "card.json").write_text(json.dumps({"format": 4}))
    with pytest.raises(UserError, match="is of format 4"):
        EncodedSet(copy)
