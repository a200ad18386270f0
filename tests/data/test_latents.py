import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microdit.data.encode import encode_rows
from microdit.data.images import to_tensor
from microdit.data.latents import EncodedSet, sample_ids
from microdit.data.sources import emoji_rows
from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError


def test_what_was_encoded_is_what_is_read(encoded_emoji, text_encoder):
    data = EncodedSet(encoded_emoji)
    rows = list(emoji_rows("train"))
    batch = data.batch([7, 0, 31])
    assert batch.captions == [rows[i].caption for i in (7, 0, 31)]
    for n, i in enumerate((7, 0, 31)):
        assert torch.allclose(batch.latents_BCHW[n], to_tensor(rows[i].image, 16), atol=1e-3)  # float16 on the disk
        text, _ = text_encoder.encode([rows[i].caption])
        length = batch.text_mask_BL[n].sum()
        assert length == text.shape[1]
        assert torch.allclose(batch.text_BLE[n, :length], text[0], atol=1e-2)
        assert batch.text_BLE[n, length:].abs().sum() == 0


@given(
    rows=st.integers(1, 30), seed=st.integers(0, 5), cuts=st.lists(st.integers(1, 20), min_size=1, max_size=8)
)  # fmt: skip
def test_the_order_depends_on_the_position_alone_however_it_is_cut(rows, seed, cuts):
    total = sum(cuts)
    whole = sample_ids(rows, seed, 0, total)
    pieces, position = [], 0
    for count in cuts:
        pieces += sample_ids(rows, seed, position, count)
        position += count
    assert pieces == whole
    for epoch in range(total // rows):
        assert sorted(whole[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_epochs_and_seeds_differ():
    assert sample_ids(100, 0, 0, 100) != sample_ids(100, 0, 100, 100)
    assert sample_ids(100, 0, 0, 100) != sample_ids(100, 1, 0, 100)


def test_damage_is_named(encoded_emoji, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(encoded_emoji, copy)
    assert EncodedSet(copy).verify() == []
    shard = next(copy.glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert EncodedSet(copy).verify() == [shard.name]
    shard.write_bytes(content[:-10])
    with pytest.raises(UserError, match=f"{shard.name} has .* bytes"):
        EncodedSet(copy)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        EncodedSet(copy)


def test_no_data_set_or_a_strange_one_is_refused_with_the_fix(tmp_path):
    with pytest.raises(UserError, match="microdit data encode"):
        EncodedSet(tmp_path / "nowhere")
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        EncodedSet(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps({"format": 99, "files": {}}))
    with pytest.raises(UserError, match="format 99"):
        EncodedSet(tmp_path)


def test_encoding_never_overwrites_and_leaves_no_half(tmp_path, text_encoder):
    rows = list(emoji_rows("held_out"))[:3]

    def breaks():
        yield from rows
        raise RuntimeError("the source broke")

    out = tmp_path / "set"
    with pytest.raises(RuntimeError):
        encode_rows(breaks(), out, "test", 16, Pixels(), text_encoder, batch_size=2)
    assert list(tmp_path.iterdir()) == []
    encode_rows(rows, out, "test", 16, Pixels(), text_encoder)
    with pytest.raises(UserError, match="exists already"):
        encode_rows(rows, out, "test", 16, Pixels(), text_encoder)
    with pytest.raises(UserError, match="gave no picture"):
        encode_rows([], tmp_path / "other", "test", 16, Pixels(), text_encoder)
