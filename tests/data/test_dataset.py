import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from microdit.data.dataset import EncodedDataset, MixedDataset
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.sampler import SamplerPhase
from microdit.data.shards import MOST_OPEN, most_open
from microdit.data.sources.base import Part, Source
from microdit.data.sources.builtin import emoji_source
from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError
from tests.conftest import first_of


@pytest.fixture(scope="module")
def held_out(tmp_path_factory, text_encoder):
    """Encode 12 other emoji in the same way as `encoded_emoji`."""
    out = tmp_path_factory.mktemp("encoded") / "held_out"
    encode_source(first_of(emoji_source("held_out"), 12), out, EncodeSettings((16,), "fp16", "fp16"), Pixels(), text_encoder)
    return out


def latents_of(folder, row):
    data = EncodedDataset(folder)
    return data.latents([data.read(0, row)[0]], 0)[0]


def mixture(*folders, steps=50, batch=8, weights=None, **options):
    sets = [EncodedDataset(folder) for folder in folders]
    return MixedDataset(sets, [SamplerPhase(steps, batch, (1,) * len(sets), weights)], 0, **options)


def test_batches_are_padded_to_their_longest_caption(encoded_emoji):
    batch = mixture(encoded_emoji).batch(3)
    assert batch.latents_BCHW.shape == (8, 3, 16, 16)
    assert batch.text_BLE.shape[:2] == batch.text_mask_BL.shape
    assert batch.text_mask_BL.any(dim=0).all()
    assert (batch.text_BLE.abs().sum(dim=-1) > 0).equal(batch.text_mask_BL)


def test_ranks_share_a_batch_and_together_have_all_of_it(encoded_emoji, held_out):
    whole = mixture(encoded_emoji, held_out, weights=(0.6, 0.4), flip=True).batch(5)
    ranks = [mixture(encoded_emoji, held_out, weights=(0.6, 0.4), flip=True).batch(5, rank, 3) for rank in range(3)]
    for rank, part in enumerate(ranks):
        assert torch.equal(part.latents_BCHW, whole.latents_BCHW[rank::3])
        length = part.text_BLE.shape[1]
        assert torch.equal(part.text_BLE, whole.text_BLE[rank::3, :length])


def test_weights_mix_the_sets(encoded_emoji, held_out):
    mixed = mixture(encoded_emoji, held_out, steps=40, weights=(0.25, 0.75))
    first = {latents_of(encoded_emoji, i).numpy().tobytes() for i in range(40)}
    drawn = [latents.numpy().tobytes() in first for step in range(40) for latents in mixed.batch(step).latents_BCHW]
    assert np.mean(drawn) == pytest.approx(0.25, abs=0.05)


def test_flips_are_off_unless_asked_for(encoded_emoji):
    plain, flipped = mixture(encoded_emoji).batch(1).latents_BCHW, mixture(encoded_emoji, flip=True).batch(1).latents_BCHW
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped, strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert not all(same)
    assert not all(mirrored)


def test_token_numbers_are_embedded_when_the_batch_is_made(encoded_emoji, tmp_path, text_encoder):
    encode_source(first_of(emoji_source("train"), 40), tmp_path / "ids", EncodeSettings((16,), "fp16", "ids"), Pixels(), text_encoder)
    stored, made = mixture(encoded_emoji).batch(2), mixture(tmp_path / "ids").batch(2)
    assert torch.equal(stored.text_mask_BL, made.text_mask_BL)
    assert torch.allclose(stored.text_BLE, made.text_BLE, atol=1e-2)
    with pytest.raises(UserError, match="captions are stored as fp16 and ids"):
        mixture(encoded_emoji, tmp_path / "ids")


def test_strangers_are_not_mixed(encoded_emoji, tmp_path, text_encoder):
    encode_source(first_of(emoji_source("train"), 4), tmp_path / "large", EncodeSettings((32,)), Pixels(), text_encoder)
    with pytest.raises(UserError, match="cannot be mixed: sizes is"):
        mixture(encoded_emoji, tmp_path / "large")


def damaged(encoded_emoji, tmp_path):
    """Copy a data set and change one number in the latents of row 7."""
    copy = tmp_path / "copy"
    shutil.copytree(encoded_emoji, copy)
    path = next(copy.glob("*.arrow"))
    content = path.read_bytes()
    latents = latents_of(encoded_emoji, 7).half().numpy().tobytes()
    at = content.index(latents) + 100
    path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    return copy, path


def test_a_changed_row_stops_training_or_is_replaced_and_counted(encoded_emoji, tmp_path):
    copy, path = damaged(encoded_emoji, tmp_path)
    with pytest.raises(UserError, match=f"row 7 of {path} is not what was written.*data.on_damage=skip"):
        mixture(copy, batch=40).batch(0)
    said = []
    skipping = mixture(copy, batch=40, on_damage="skip", warn=said.append)
    batch = skipping.batch(0)
    assert len(batch.latents_BCHW) == 40
    assert skipping.replaced == len(said) == 1
    replacement = latents_of(copy, 8)
    assert sum(torch.equal(latents, replacement) for latents in batch.latents_BCHW) == 2


def test_a_whole_shard_lost_in_the_middle_of_training_is_named_or_replaced(tmp_path, text_encoder):
    source = emoji_source("held_out")
    records = list(source.parts[0].records())[:90]
    parts = [Part(f"{first}", lambda first=first: iter(records[first : first + 30])) for first in (0, 30, 60)]
    encode_source(Source("three", parts), tmp_path / "set", EncodeSettings((8,)), Pixels(), text_encoder)
    said = []
    stopping, skipping = mixture(tmp_path / "set"), mixture(tmp_path / "set", steps=30, on_damage="skip", warn=said.append)
    lost = tmp_path / "set" / "shard-00001.arrow"
    lost.write_bytes(lost.read_bytes()[:1000])  # after the sets were opened and their sizes checked
    with pytest.raises(UserError, match=r"shard-00001\.arrow has 1000 bytes"):
        [stopping.batch(step) for step in range(12)]
    batches = [skipping.batch(step) for step in range(30)]
    assert all(len(batch.latents_BCHW) == 8 for batch in batches)
    assert skipping.replaced == len(said) == pytest.approx(80, abs=8)  # a third of 240


@pytest.fixture(scope="module")
def of_four_shards(tmp_path_factory, text_encoder):
    out = tmp_path_factory.mktemp("encoded") / "four"
    records = list(emoji_source("held_out").parts[0].records())[:12]
    parts = [Part(f"{first}", lambda first=first: iter(records[first : first + 3])) for first in (0, 3, 6, 9)]
    encode_source(Source("four", parts), out, EncodeSettings((8,)), Pixels(), text_encoder)
    return out


def descriptors(folder):
    links = [link for link in Path("/proc/self/fd").iterdir() if link.exists()]
    return sorted(link.resolve().name for link in links if link.resolve().parent == folder)


def test_open_shards_are_bounded_and_the_least_recently_used_is_closed(of_four_shards):
    wide, narrow = EncodedDataset(of_four_shards), EncodedDataset(of_four_shards)
    expected = [[bytes(blob) for blob in wide.read(0, row)] for row in range(12)]
    del wide
    narrow.most_open = 2
    for row in (0, 3, 1, 6):  # of shards 0, 1, 0 and 2: 1 has to go
        narrow.read(0, row)
    assert descriptors(of_four_shards) == ["shard-00000.arrow", "shard-00002.arrow"]
    for row in (11, 0, 5, 8, 2, 7):
        assert [bytes(blob) for blob in narrow.read(0, row)] == expected[row]
        assert len(descriptors(of_four_shards)) == 2
    assert len(narrow.column("key")) == 12
    del narrow
    assert descriptors(of_four_shards) == []


def test_the_sets_of_a_mixture_share_what_may_be_open(of_four_shards):
    mixed = mixture(*[of_four_shards] * 3)
    assert [encoded.most_open for encoded in mixed.sets] == [most_open(3)] * 3
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 3 * most_open(3) <= most_open() <= min(MOST_OPEN, soft // 2)


def test_a_deleted_shard_is_named_and_counted_for_each_row(of_four_shards, tmp_path):
    copy, said = shutil.copytree(of_four_shards, tmp_path / "copy"), []
    skipping = mixture(copy, steps=3, batch=12, on_damage="skip", warn=said.append)
    (copy / "shard-00002.arrow").unlink()
    [skipping.batch(step) for step in range(3)]
    assert skipping.replaced == len(said) == 9
    assert all("shard-00002.arrow cannot be read" in sentence for sentence in said)


def test_a_want_of_descriptors_ends_a_run_that_skips_damage(of_four_shards):
    skipping = mixture(of_four_shards, on_damage="skip")
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(UserError, match=r"has reached its limit of \d+ open files"):
            skipping.batch(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert skipping.replaced == 0
    assert len(skipping.batch(0).latents_BCHW) == 8


def test_a_set_that_is_mostly_damage_is_given_up(encoded_emoji, tmp_path):
    copy, _ = damaged(encoded_emoji, tmp_path)
    skipping = mixture(copy, steps=300, batch=40, on_damage="skip", warn=lambda sentence: None)
    with pytest.raises(UserError, match=r"101 of .* samples were damaged"):
        [skipping.batch(step) for step in range(300)]


def test_damage_to_the_files_is_named_at_opening_or_by_verify(encoded_emoji, tmp_path):
    copy, path = damaged(encoded_emoji, tmp_path)
    assert EncodedDataset(encoded_emoji).verify() == []
    assert EncodedDataset(copy).verify() == [path.name]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{path.name} has .* bytes"):
        EncodedDataset(copy)
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is missing"):
        EncodedDataset(copy)


def test_no_data_set_or_a_strange_one_is_refused_with_the_fix(tmp_path):
    with pytest.raises(UserError, match="microdit data encode"):
        EncodedDataset(tmp_path / "nowhere")
    (tmp_path / ".begun.part").mkdir()
    with pytest.raises(UserError, match=r"finishes the one in .*: run the same command again"):
        EncodedDataset(tmp_path / "begun")
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        EncodedDataset(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        EncodedDataset(tmp_path)
