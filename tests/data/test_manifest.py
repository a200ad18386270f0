import json
import os
import shutil

import pytest

from microdit.data.dataset import EncodedDataset
from microdit.data.manifest import open_manifest, read_manifest
from microdit.errors import UserError
from microdit.io.files import from_checked_json, sha256_of, to_checked_json
from tests.damage import ALL_BITS, flips


@pytest.fixture
def copy(encoded_emoji, tmp_path):
    return shutil.copytree(encoded_emoji, tmp_path / "copy")


@pytest.mark.parametrize("bits", [None, pytest.param(ALL_BITS, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_the_card_is_noticed_at_opening(copy, bits):
    manifest = read_manifest(copy)
    for _ in flips(copy / "card.json", bits=bits):
        with pytest.raises(UserError, match=r"card\.json is damaged .*: encode the data again"):
            EncodedDataset(copy)
    assert read_manifest(copy) == manifest


def test_the_entries_of_shards_are_covered_too(copy):
    """A continued encoding combines the shards' entries into the manifest."""
    entry = from_checked_json((copy / "shard-00000.json").read_bytes())
    assert entry.pop("latent_sums")["16"]["count"] == 40 * 16 * 16  # the manifest holds what follows from them
    assert entry == read_manifest(copy)["shards"][0]
    for _ in flips(copy / "shard-00000.json"):
        with pytest.raises(ValueError):  # noqa: PT011
            from_checked_json((copy / "shard-00000.json").read_bytes())


def as_format(folder, version):
    """Rewrite the manifest and the shards as an earlier version wrote them."""
    manifest = from_checked_json((folder / "card.json").read_bytes())
    for shard in manifest["shards"]:
        checksums = shard["checksums"]
        del checksums["row_index"]
        shard["bytes"] -= checksums.pop("row_index_bytes")
        os.truncate(folder / shard["name"], shard["bytes"])
        shard["sha256"] = sha256_of(folder / shard["name"])
        if version == 2:
            del shard["checksums"]
    content = {**manifest, "format": version}
    (folder / "card.json").write_bytes(json.dumps(content, indent=1).encode() if version == 2 else to_checked_json(content))


@pytest.mark.parametrize("settings", [None, [1], -1e308, {}, {"resolutions": "64"}, {"resolutions": 64}, {"resolutions": ["64"]}])
def test_a_card_whose_settings_are_none_is_damaged(copy, settings):
    """Its checksum is right: it may come from another version, or from elsewhere."""
    card = from_checked_json((copy / "card.json").read_bytes())
    (copy / "card.json").write_bytes(to_checked_json(card | {"settings": settings}))
    with pytest.raises(UserError, match=r"card\.json is damaged .*: encode the data again"):
        read_manifest(copy)


@pytest.mark.parametrize("instead", ["folder", "link to itself", "pipe"])
@pytest.mark.parametrize("name", ["card.json", "shard-00000.arrow"])
def test_what_lies_in_a_files_place_is_named(copy, name, instead):
    path = copy / name
    path.unlink()
    {"folder": path.mkdir, "link to itself": lambda: path.symlink_to(path.name), "pipe": lambda: os.mkfifo(path)}[instead]()
    said = r"card\.json cannot be read \(.*\): encode the data again" if name == "card.json" else r"arrow .*the data set is damaged; encode"
    with pytest.raises(UserError, match=said):
        open_manifest(copy)


@pytest.mark.parametrize("version", [2, 3])
def test_sets_of_earlier_formats_are_read_as_before(encoded_emoji, copy, version):
    as_format(copy, version)
    ours, old = EncodedDataset(encoded_emoji), EncodedDataset(copy)
    for row in range(40):
        assert [bytes(blob) for blob in old.read(0, row)] == [bytes(blob) for blob in ours.read(0, row)]
    for name in ("key", "bucket", "captions", "weights"):
        assert old.column(name) == ours.column(name)
    assert old.verify() == []


def test_a_format_that_is_not_known_is_refused(copy):
    (copy / "card.json").write_text(json.dumps({"format": 7}))
    with pytest.raises(UserError, match="has format 7"):
        EncodedDataset(copy)
