"""Features stored beside the latents: what is in them, what else stays as it was, and what is refused."""

from dataclasses import replace

import pytest
import torch

from microdit.config.schema import SetRecipe
from microdit.data.dataset import EncodedDataset, MixedDataset
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.manifest import MANIFEST
from microdit.data.sampler import SamplerPhase
from microdit.data.shards import DamagedShard
from microdit.data.sources.base import Part, Record, Source
from microdit.data.sources.builtin import emoji_source
from microdit.encoders.autoencoder import Pixels
from microdit.encoders.vision import load_vision_encoder
from microdit.errors import UserError
from microdit.io.files import from_checked_json
from tests.commands import microdit
from tests.conftest import first_of
from tests.data.pictures import picture
from tests.data.test_encode import good, source_of
from tests.encoders.test_vision import save

SMALL = EncodeSettings((64, 128), "fp16", "fp16", buckets=True, batch_size=2)
SHAPES = [(130, 64), (130, 130), (64, 130), (140, 70)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    save(folder, "dinov2")
    return load_vision_encoder(str(folder))


def shaped() -> Source:
    """Pictures of several shapes."""
    return source_of([Record(f"k{n}", {"caption": f"picture {n}"}, picture(n, "PNG", size)) for n, size in enumerate(SHAPES)])


def mixture(*sets: EncodedDataset, flip: bool = False) -> MixedDataset:
    return MixedDataset(list(sets), [SamplerPhase(4, 5, (1,) * len(sets))], seed=0, flip=flip)


def test_features_are_the_encoders_of_the_stored_pixels(tmp_path, text_encoder, tiny):
    """Of both resolutions and all shapes; pixels stand beside them, so the encoder can be asked again."""
    encode_source(shaped(), tmp_path / "set", SMALL, Pixels(), text_encoder, vision=tiny)
    for resolution in (64, 128):
        data = EncodedDataset(tmp_path / "set", resolution)
        assert sum(rows > 0 for rows in data.bucket_sizes) == 3
        for bucket, rows in enumerate(data.bucket_sizes):
            for row in range(rows):
                pixels = data.latents([data.read(bucket, row)[0]], bucket)
                expected = tiny.encode(pixels)
                channels, *grid = data.feature_shape(bucket)
                stored = data.stored_features([data.read_features(bucket, row)], bucket).expand()
                assert expected.shape[1:] == (channels, *grid) == (32, *(side // 16 for side in pixels.shape[2:]))
                assert torch.allclose(stored.mT.unflatten(2, grid), expected, rtol=1e-2, atol=1e-2)


def test_all_else_is_what_it_is_without_features(tmp_path, text_encoder, tiny):
    source = shaped()
    plain = encode_source(source, tmp_path / "plain", SMALL, Pixels(), text_encoder)
    more = encode_source(source, tmp_path / "more", SMALL, Pixels(), text_encoder, vision=tiny)
    assert (plain["format"], more["format"]) == (4, 5)
    assert "features" not in plain
    assert more["features"] == {"name": tiny.name, "fingerprint": tiny.fingerprint, "channels": 32, "cell": 16}
    own = ("format", "features", "shards")
    assert {key: value for key, value in plain.items() if key not in own} == {key: value for key, value in more.items() if key not in own}
    one, other = EncodedDataset(tmp_path / "plain", 128), EncodedDataset(tmp_path / "more", 128)
    for step in range(4):
        ours, theirs = (mixture(data).stored(step) for data in (other, one))
        assert ours.latents.numbers_BRV.equal(theirs.latents.numbers_BRV)
        assert ours.text.numbers_BRV.equal(theirs.text.numbers_BRV)
        assert ours.features is None
    import datasets

    assert {"features_64", "features_128"} <= set(datasets.load_from_disk(str(tmp_path / "more")).column_names)


def test_batches_carry_them_mirrored_where_the_images_are(tmp_path, text_encoder, tiny):
    settings = EncodeSettings((64,), "fp16", "fp16")
    encode_source(first_of(emoji_source("train"), 6), tmp_path / "set", settings, Pixels(), text_encoder, vision=tiny)
    data = EncodedDataset(tmp_path / "set")
    plain, flipped = (mixture(data, flip=flip).stored(1, features=True) for flip in (False, True))
    ours, theirs = flipped.expand(), plain.expand()
    assert 0 < flipped.flipped_B.sum() < 5
    for sample in range(5):
        turn = (lambda maps: maps.flip(-1)) if flipped.flipped_B[sample] else (lambda maps: maps)
        assert ours.latents_BCHW[sample].equal(turn(theirs.latents_BCHW[sample]))
        assert ours.features_BEYX[sample].equal(turn(theirs.features_BEYX[sample]))
    assert not theirs.features_BEYX[0].equal(theirs.features_BEYX[0].flip(-1))
    halves = [part.expand().features_BEYX for part in flipped.split(3)]
    assert torch.cat(halves).equal(ours.features_BEYX)
    shares = [mixture(data).stored(1, rank, 2, features=True).expand().features_BEYX for rank in range(2)]
    assert all(shares[place % 2][place // 2].equal(theirs.features_BEYX[place]) for place in range(5))


def test_a_changed_byte_of_a_feature_is_noticed_and_its_row_replaced(tmp_path, text_encoder, tiny):
    settings = EncodeSettings((32,), "fp16", "fp16")
    encode_source(first_of(emoji_source("train"), 6), tmp_path / "set", settings, Pixels(), text_encoder, vision=tiny)
    blob = bytes(EncodedDataset(tmp_path / "set").read_features(0, 2))
    path = tmp_path / "set" / "shard-00000.arrow"
    content = path.read_bytes()
    for at in range(content.index(blob), content.index(blob) + len(blob) + 8):  # its checksum as well
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        data = EncodedDataset(tmp_path / "set")
        data.read(0, 2)
        with pytest.raises(DamagedShard, match=r"row 2 of .*shard-00000.arrow is not what was written"):
            data.read_features(0, 2)
    told: list[str] = []
    whole = MixedDataset([data], [SamplerPhase(2, 6, (1,))], seed=0, on_damage="skip", warn=told.append)
    assert whole.stored(0, features=True).features.numbers_BRV.shape == (6, 4, 32)
    assert "another sample takes its place" in told[0]
    assert whole.replaced == 1
    assert MixedDataset([data], [SamplerPhase(2, 6, (1,))], seed=0).stored(0).features is None  # nobody reads it


def test_an_unfinished_encoding_goes_on_with_the_same_features_only(tmp_path, text_encoder, tiny):
    def broken():
        yield good(1)
        raise OSError("the disk is gone")

    source = source_of([good(0)], [good(1)])
    interrupted = replace(source, parts=[source.parts[0], Part("part 1", broken)])
    settings = EncodeSettings((16,))
    with pytest.raises(UserError, match="the disk is gone"):
        encode_source(interrupted, tmp_path / "set", settings, Pixels(), text_encoder, vision=tiny)
    with pytest.raises(UserError, match=r"was started with other settings \(features differ\)"):
        encode_source(source, tmp_path / "set", settings, Pixels(), text_encoder)
    assert encode_source(source, tmp_path / "set", settings, Pixels(), text_encoder, vision=tiny)["rows"] == 2
    whole = encode_source(source, tmp_path / "whole", settings, Pixels(), text_encoder, vision=tiny)
    assert [shard["sha256"] for shard in whole["shards"]] == [
        shard["sha256"] for shard in from_checked_json((tmp_path / "set" / MANIFEST).read_bytes())["shards"]
    ]


def test_the_command_stores_them_of_the_training_set_alone(tmp_path):
    options = ("--features", "efficientnet", "--hold-out", 8, "--fraction", 0.1)
    done = microdit("data", "encode", "emoji:held_out", "--out", "set", *options, cwd=tmp_path)
    assert done.returncode == 0, done.output
    assert "features of efficientnet: 1,280 numbers for each 16 x 16 pixels" in done.output
    cards = [from_checked_json((tmp_path / name / MANIFEST).read_bytes()) for name in ("set", "set-held-out")]
    assert [card["format"] for card in cards] == [5, 4]
    assert EncodedDataset(SetRecipe(str(tmp_path / "set")).folder).feature_shape() == (1280, 4, 4)
    refused = microdit("data", "encode", "emoji:held_out", "--out", "other", "--features", "dino", cwd=tmp_path)
    assert refused.returncode == 1
    assert "There is no vision encoder in dino" in refused.output
