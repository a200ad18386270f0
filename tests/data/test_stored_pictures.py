"""Pictures in shards: their bytes are read as Pillow alone reads them, and damage is a sentence."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from microdit.data.dataset import EncodedDataset, MixedDataset
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.manifest import read_manifest, write_manifest
from microdit.data.pixels import normalise, to_tensor
from microdit.data.sampler import SamplerPhase
from microdit.data.shards import EncodedRow, Shard, ShardWriter, checksums_of
from microdit.data.sources.base import Part, Record, Source
from microdit.data.sources.builtin import emoji_images, emoji_source
from microdit.data.stored_pictures import DamagedPicture, pack_picture, unpack_picture
from microdit.encoders.autoencoder import Pixels, load_autoencoder
from microdit.errors import UserError
from microdit.io.files import sha256_of
from tests.commands import microdit
from tests.conftest import first_of
from tests.training.processes import losses, train


def encode(folder, text_encoder, packing="webp", source=None, **settings):
    encode_source(
        source or first_of(emoji_source("train"), 40), folder, EncodeSettings((16,), packing, "fp16", **settings), Pixels(), text_encoder
    )
    return folder


@pytest.fixture(scope="module")
def webp(tmp_path_factory, text_encoder):
    return encode(tmp_path_factory.mktemp("encoded") / "webp", text_encoder)


def stored_bytes(folder, row: int, bucket: int = 0) -> bytes:
    return bytes(EncodedDataset(folder).read_undecoded(bucket, row)[0])


def by_pillow(content: bytes) -> torch.Tensor:
    return normalise(np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))[None])[0]


def batches(folder, batch=8, **options):
    return MixedDataset([EncodedDataset(folder)], [SamplerPhase(50, batch, (1,), None)], 0, **options)


@pytest.mark.parametrize(("packing", "form"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_a_picture_is_what_pillow_writes_and_reads(packing, form):
    smooth = Image.radial_gradient("L").resize((24, 16))
    image = Image.merge("RGB", (smooth, smooth.rotate(180), smooth.point(lambda value: 255 - value)))
    exact_HWC = np.asarray(image)
    blob = pack_picture((exact_HWC.transpose(2, 0, 1) / 127.5 - 1).astype(np.float32), packing, 95)
    opened = Image.open(io.BytesIO(blob))
    assert (opened.format, opened.mode, opened.size) == (form, "RGB", (24, 16))
    pixels = np.frombuffer(unpack_picture(memoryview(blob), 16, 24, packing), np.uint8).reshape(3, 16, 24)
    assert np.array_equal(pixels.transpose(1, 2, 0), np.asarray(opened))
    assert np.abs(np.asarray(opened).astype(int) - exact_HWC).mean() < 3  # of 255


def test_batches_are_the_decoded_pixels(webp):
    data = EncodedDataset(webp)
    assert data.verify() == []
    expected = torch.stack([by_pillow(stored_bytes(webp, row)) for row in range(40)])
    assert torch.equal(data.latents([data.read(0, row)[0] for row in range(40)], 0), expected)
    assert torch.equal(data.latents([latents for _, latents, _ in data.spread(40)], 0), expected)
    flipping = batches(webp, 40, flip=True)
    batch = flipping.batch(0).latents_BCHW
    flipping.close()
    kinds = [
        {name for name, images in (("as is", expected), ("flipped", expected.flip(-1))) if (images == one).flatten(1).all(1).any()}
        for one in batch
    ]
    assert all(kinds)
    assert {"as is"} in kinds
    assert {"flipped"} in kinds


def test_statistics_are_those_of_the_exact_pixels(webp):
    exact = torch.stack([to_tensor(row.image, 16) for row in list(emoji_images("train"))[:40]]).double()
    statistics = EncodedDataset(webp).latent_statistics
    assert statistics["mean"] == pytest.approx(exact.mean((0, 2, 3)).tolist(), abs=1e-5)
    assert statistics["std"] == pytest.approx(exact.std((0, 2, 3), correction=0).tolist(), abs=1e-5)


def test_aspect_ratios_and_resolutions_are_kept(tmp_path, text_encoder):
    def record(number: int, size: tuple[int, int]) -> Record:
        file = io.BytesIO()
        Image.linear_gradient("L").resize(size).convert("RGB").save(file, "PNG")
        return Record(str(number), {"caption": f"number {number}"}, file.getvalue())

    shapes = [(256, 128), (128, 256), (160, 160)]
    source = Source("shapes", [Part("all", lambda: iter([record(n, shapes[n % 3]) for n in range(6)]))])
    encode_source(source, tmp_path / "set", EncodeSettings((64, 128), "jpeg", buckets=True), Pixels(), text_encoder)
    for resolution in (64, 128):
        data = EncodedDataset(tmp_path / "set", resolution)
        sizes = {}
        for bucket, count in enumerate(data.bucket_sizes):
            for number in range(count):
                picture = Image.open(io.BytesIO(data.read_undecoded(bucket, number)[0]))
                sizes[bucket] = (3, picture.height, picture.width)
                assert torch.equal(data.latents([data.read(bucket, number)[0]], bucket)[0], normalise(np.asarray(picture)[None])[0])
        assert sizes == {bucket: data.latent_shape(bucket) for bucket, count in enumerate(data.bucket_sizes) if count}
        assert len(sizes) == 3


def test_equal_runs_write_equal_shards_and_only_the_same_quality_continues(tmp_path, text_encoder, webp):
    def shards(folder):
        return [shard["sha256"] for shard in read_manifest(folder)["shards"]]

    assert shards(encode(tmp_path / "again", text_encoder)) == shards(webp)
    assert shards(encode(tmp_path / "finer", text_encoder, quality=100)) != shards(webp)
    done = tmp_path / "half"
    (tmp_path / "again").rename(tmp_path / ".half.part")  # as a run leaves it that was stopped
    assert (tmp_path / ".half.part" / "plan.json").is_file()
    with pytest.raises(UserError, match=r"started with other settings \(quality differ\)"):
        encode(done, text_encoder, quality=91)
    with pytest.raises(UserError, match=r"started with other settings \(latents differ\)"):
        encode(done, text_encoder, "int8")


def test_only_pixels_are_stored_as_pictures(tmp_path, text_encoder, webp):
    with pytest.raises(
        UserError, match=r"--store-latents jpeg stores pictures, but the latents of the autoencoder icon are none: use --auto"
    ):
        encode_source(emoji_source("held_out"), tmp_path / "set", EncodeSettings((64,), "jpeg"), load_autoencoder("icon"), text_encoder)
    jpeg = encode(tmp_path / "jpeg", text_encoder, "jpeg")
    with pytest.raises(UserError, match="latents are stored as webp and jpeg"):
        MixedDataset([EncodedDataset(webp), EncodedDataset(jpeg)], [SamplerPhase(1, 1, (1, 1), None)], 0)


def test_a_quality_without_pictures_is_refused(tmp_path):
    refused = microdit("data", "encode", "emoji", "--out", "set", "--quality", "80", cwd=tmp_path)
    assert refused.returncode == 1
    assert "--quality 80 is for pictures: give --store-latents jpeg or webp too" in refused.output


def saved(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


RED = Image.new("RGB", (16, 16), "red")
GOOD = saved(RED, "WEBP")
VAST = GOOD[:26] + struct.pack("<HH", 16383, 16383) + GOOD[30:]  # a lossy frame whose header claims the largest sides
HOSTILE = {
    "nothing": b"",
    "text": b"not a picture",
    "cut": GOOD[: len(GOOD) // 2],
    "other sides": saved(RED.resize((16, 32)), "WEBP"),
    "transparent": saved(RED.convert("RGBA").point(lambda value: value // 2), "WEBP"),
    "another format": saved(RED, "PNG"),
    "a program for a printer": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nquit\n",
    "vast": VAST,
    "endless": GOOD + bytes(100_000),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_other_bytes_are_damage(what):
    assert len(unpack_picture(memoryview(GOOD), 16, 16, "webp")) == 768
    with pytest.raises(DamagedPicture):
        unpack_picture(memoryview(HOSTILE[what]), 16, 16, "webp")


def test_a_cut_jpeg_and_one_of_ink_are_damage():
    whole = saved(RED, "JPEG")
    assert len(unpack_picture(memoryview(whole), 16, 16, "jpeg")) == 768
    for content in (whole[:-60], saved(RED.convert("L"), "JPEG"), saved(RED.convert("CMYK"), "JPEG"), GOOD):
        with pytest.raises(DamagedPicture):
            unpack_picture(memoryview(content), 16, 16, "jpeg")


def with_picture(webp, folder, row: int, content: bytes):
    """Write the set again, with other bytes in one row, under a checksum that is right: as its author could."""
    folder.mkdir()
    manifest, entry = read_manifest(webp), read_manifest(webp)["shards"][0]
    columns = EncodedDataset(webp)
    shard = Shard(webp / entry["name"], entry["bytes"], entry["rows"], [16], None)
    writer = ShardWriter(folder / entry["name"], [16])
    for number, (key, captions, weights) in enumerate(zip(*map(columns.column, ("key", "captions", "weights")), strict=True)):
        latents = content if number == row else bytes(shard.latents(number, 16))
        writer.write(EncodedRow(key, 0, captions, weights, [bytes(shard.text(number, 0.0))], {16: latents}))
    writer.close()
    path = writer.path
    entry |= {"bytes": path.stat().st_size, "sha256": sha256_of(path), "checksums": checksums_of(path)._asdict()}
    write_manifest(folder, {key: value for key, value in manifest.items() if key != "shards"}, [entry])
    return folder, path


@pytest.mark.parametrize("what", ["cut", "vast", "other sides"])
def test_a_hostile_picture_stops_training_or_is_replaced_and_counted(webp, tmp_path, what):
    folder, path = with_picture(webp, tmp_path / "set", 7, HOSTILE[what])
    data = EncodedDataset(folder)
    assert data.verify() == []
    stopping = batches(folder, 40)
    with pytest.raises(UserError, match=f"row 7 of {path} cannot be decoded: it holds .*data.on_damage=skip"):
        stopping.batch(0)
    stopping.close()
    said = []
    skipping = batches(folder, 40, on_damage="skip", warn=said.append)
    batch = skipping.batch(0).latents_BCHW
    skipping.close()
    assert skipping.replaced == len(said) == 1
    assert sum(torch.equal(one, by_pillow(stored_bytes(webp, 8))) for one in batch) == 2
    with pytest.raises(UserError, match=r"row 7 of .* cannot be decoded"):
        list(data.spread(40))


def test_a_model_trains_on_pictures_as_on_their_numbers(webp, tmp_path, text_encoder):
    exact = encode(tmp_path / "exact", text_encoder, "fp16")
    close = encode(tmp_path / "close", text_encoder, "jpeg", quality=100)  # WebP halves the resolution of colours
    runs = [train(tmp_path / name, data, f"data.held_out={data}", "phases.0.steps=6") for name, data in (("a", exact), ("b", close))]
    assert [run.wait() for run in runs] == [[0], [0]], runs[1].output
    one, two = (losses(tmp_path / name) for name in ("a", "b"))
    assert len(one) >= 2
    assert list(two.values()) == pytest.approx(list(one.values()), rel=0.02)
