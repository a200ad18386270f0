import os
import random
import resource
from pathlib import Path

import pytest

from microdit.data.shards import DamagedShard, EncodedRow, Shard, ShardWriter, checksums_of
from microdit.errors import UserError
from tests.damage import ALL_BITS, flips


def write(path, count=600, features=False):
    def row(i):
        text, latents = [b"a%d" % i * 9, b"b%d" % i * 5], {8: b"l%d" % i * 20, 16: b"m%d" % i}
        return EncodedRow(f"key{i}", i % 3, [f"a {i}", f"b {i}"], [0.75, 0.25], text, latents, {8: b"f%d" % i * 3, 16: b"g%d" % i * 30})

    rows = [row(i) for i in range(count)]
    writer = ShardWriter(path, [8, 16], features)
    for row in rows:
        writer.write(row)
    writer.close()
    return rows, writer


def opened(path, rows, checksums=None, features=False):
    return Shard(path, path.stat().st_size, rows, [8, 16], checksums or checksums_of(path), features)


def everything(shard, features=False):
    """Read everything from a shard that `write` has written."""
    columns = [shard.column(name) for name in ("key", "bucket", "captions", "weights")]
    blobs = [
        [bytes(shard.latents(row, side, row % 3)) for side in (8, 16)] + [bytes(shard.text(row, draw, row % 3)) for draw in (0.1, 0.9)]
        for row in range(len(shard))
    ]
    if features:
        blobs.append([bytes(shard.features(row, side, row % 3)) for row in range(len(shard)) for side in (8, 16)])
    return columns, blobs, [shard.row_in_bucket(bucket, 0) for bucket in range(3)]


def test_rows_come_back_over_several_record_batches(tmp_path):
    rows, writer = write(tmp_path / "a.arrow")
    shard = opened(tmp_path / "a.arrow", 600)
    assert len(shard) == writer.rows == 600
    for i in (0, 255, 256, 599):
        assert shard.latents(i, 8, i % 3) == rows[i].latents[8]
        assert shard.latents(i, 16, i % 3) == rows[i].latents[16]
        assert shard.text(i, 0.0, i % 3) == shard.text(i, 0.74, i % 3) == rows[i].text[0]
        assert shard.text(i, 0.76, i % 3) == shard.text(i, 0.999, i % 3) == rows[i].text[1]
    assert shard.column("key") == [row.key for row in rows]
    assert writer.buckets == {0: 200, 1: 200, 2: 200}
    assert [shard.row_in_bucket(1, number) for number in range(200)] == list(range(1, 600, 3))


def as_format_3(path):
    """Remove the index from a shard. Returns the checksums of the rest."""
    checksums = checksums_of(path)
    os.truncate(path, path.stat().st_size - checksums.row_index_bytes)
    return checksums._replace(row_index="", row_index_bytes=0)


def sweep(path: Path, rows: int, features: bool = False, **chosen) -> int:
    """Flip bits of a shard and return how many flips are noticed. All others must not change anything that is read."""
    checksums = checksums_of(path)
    checksums = checksums if checksums.row_index_bytes else checksums._replace(row_index="")
    before, noticed = everything(opened(path, rows, checksums, features), features), 0
    for at in flips(path, **chosen):
        try:
            after = everything(opened(path, rows, checksums, features), features)
        except UserError as error:
            noticed += str(path) in str(error)
        else:
            assert after == before, at
    return noticed


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(tmp_path):
    """Flip one bit of every byte: blobs, keys, captions, weights, Arrow's metadata, and the index."""
    path = tmp_path / "a.arrow"
    write(path, 6)
    size = path.stat().st_size
    assert sweep(path, 6) > 0.7 * size  # the rest is padding


def test_features_come_back_and_a_flipped_bit_is_noticed_or_harmless(tmp_path):
    path = tmp_path / "a.arrow"
    rows, _ = write(path, 5, features=True)
    shard = opened(path, 5, features=True)
    assert all(shard.features(i, side, i % 3) == rows[i].features[side] for i in range(5) for side in (8, 16))
    assert sweep(path, 5, features=True) > 0.7 * path.stat().st_size
    with pytest.raises(DamagedShard, match="the index has other columns"):
        opened(path, 5)


def test_a_flipped_bit_of_an_earlier_format_is_noticed_or_harmless(tmp_path):
    path = tmp_path / "a.arrow"
    write(path, 3)
    as_format_3(path)
    places = range(0, path.stat().st_size, 3)
    assert sweep(path, 3, places=places) > 0.6 * len(places)


def test_a_flipped_bit_of_the_index_is_noticed_at_opening(tmp_path):
    path = tmp_path / "a.arrow"
    write(path, 6)
    checksums, size = checksums_of(path), path.stat().st_size
    for _ in flips(path, range(size - checksums.row_index_bytes, size), ALL_BITS):
        with pytest.raises(DamagedShard, match="the checksum of its index differs"):
            opened(path, 6, checksums)


@pytest.mark.slow
def test_every_bit_of_a_larger_shard_is_noticed_or_harmless(tmp_path):
    path = tmp_path / "a.arrow"
    write(path, 300)  # two record batches
    size = path.stat().st_size
    places = sorted({*range(2500), *range(size - 300, size), *random.Random(0).sample(range(size), 500)})
    assert sweep(path, 300, places=places, bits=ALL_BITS) > 0.5 * 8 * len(places)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"key4", "checksum of the column key"),
        (b"b 5", "checksum of the column captions"),
        (b"\x00\x00\x40\x3f\x00\x00\x80\x3e", "checksum of its offsets, buckets and weights"),  # 0.75, 0.25
        (b"latents_16", "checksum of its Arrow messages"),
        (b"l3l3", "row 3 of .* is not what was written"),
        (b"a2a2", "row 2 of .* is not what was written"),
    ],
)
def test_what_was_damaged_is_said(tmp_path, written, said):
    path = tmp_path / "a.arrow"
    write(path, 6)
    checksums = checksums_of(path)
    for _ in flips(path, [path.read_bytes().index(written) + len(written) // 2 - 1]):
        with pytest.raises(DamagedShard, match=said):
            everything(opened(path, 6, checksums))


def test_a_blob_belongs_to_its_row_and_its_bucket(tmp_path):
    path = tmp_path / "a.arrow"
    write(path, 6)
    shard, checksums, content = opened(path, 6), checksums_of(path), bytearray(path.read_bytes())
    for read in (lambda: shard.latents(4, 8, 2), lambda: shard.text(4, 0.1, 0)):  # it is in bucket 1
        with pytest.raises(DamagedShard, match=r"row 4 of .* is not what was written"):
            read()
    one, four = (slice(at := content.index(b"l%d" % row * 20), at + 48) for row in (1, 4))  # each with its checksum
    content[one], content[four] = content[four], content[one]
    path.write_bytes(content)
    with pytest.raises(DamagedShard, match=r"row 1 of .* is not what was written"):
        opened(path, 6, checksums).latents(1, 8, 1)


def test_opening_reads_no_blob_and_no_caption(tmp_path):
    """Blobs are compared when they are read, so that terabytes of data open at once."""
    path = tmp_path / "a.arrow"
    rows, _ = write(path, 6)
    checksums, content = checksums_of(path), path.read_bytes()
    for written in (b"l3l3", b"b 5", b"key4"):
        for _ in flips(path, [content.index(written)]):
            assert opened(path, 6, checksums).latents(2, 8, 2) == rows[2].latents[8]


def test_shards_of_earlier_formats_are_read_with_their_checksums(tmp_path):
    path = tmp_path / "a.arrow"
    write(path, 6)
    size, before = path.stat().st_size, everything(opened(path, 6))
    assert everything(Shard(path, size, 6, [8, 16], None)) == before
    for _ in flips(path, [path.read_bytes().index(b"l3l3")]):
        with pytest.raises(DamagedShard, match="row 3 of"):
            everything(Shard(path, size, 6, [8, 16], None))


def test_a_cut_file_is_named(tmp_path):
    path = tmp_path / "a.arrow"
    write(path, 10)
    size, checksums = path.stat().st_size, checksums_of(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DamagedShard, match=f"{path} has {size - 50} bytes, not the {size}"):
        Shard(path, size, 10, [8, 16], checksums)


def test_a_shard_that_shrinks_while_it_is_open_is_named(tmp_path):
    """A mapped file that shrinks would kill the process (SIGBUS)."""
    path = tmp_path / "a.arrow"
    rows, _ = write(path, 600)
    shard, size = opened(path, 600), path.stat().st_size
    os.truncate(path, size // 2)
    assert shard.latents(0, 8) == rows[0].latents[8]
    with pytest.raises(DamagedShard, match=f"{path} cannot be read .it ends at byte {size // 2}"):
        shard.latents(599, 8, 2)
    with pytest.raises(DamagedShard, match=f"{path} cannot be read .it ends at byte {size // 2}"):
        shard.column("captions")


def test_a_shard_that_is_replaced_while_it_is_open_is_the_old_one_or_named(tmp_path):
    path, other = tmp_path / "a.arrow", tmp_path / "b.arrow"
    rows, _ = write(path, 6)
    shard, checksums = opened(path, 6), checksums_of(path)
    ShardWriter(other, [8, 16]).close()
    content = other.read_bytes()
    other.replace(path)
    assert shard.latents(5, 16, 2) == rows[5].latents[16]
    with pytest.raises(DamagedShard, match=f"{path} has {len(content)} bytes"):
        Shard(path, len(content) + 1, 6, [8, 16], checksums)
    path.unlink()
    assert shard.text(5, 0, 2) == rows[5].text[0]
    with pytest.raises(DamagedShard, match=f"{path} cannot be read .*No such file"):
        Shard(path, len(content), 6, [8, 16], checksums)


def test_too_few_descriptors_are_no_damage(tmp_path):
    path = tmp_path / "a.arrow"
    write(path, 3)
    checksums, (soft, hard) = checksums_of(path), resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))  # no number below it is free
    try:
        with pytest.raises(UserError, match=f"has reached its limit of {lowest} open files. Raise that limit .ulimit -n") as raised:
            opened(path, 3, checksums)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not isinstance(raised.value, DamagedShard)


def test_too_little_memory_is_no_damage(tmp_path):
    path = tmp_path / "a.arrow"
    write(path, 3)
    checksums = checksums_of(path)._replace(row_index_bytes=1 << 62)  # no machine has so many addresses
    with pytest.raises(UserError, match=f"no memory left to read {path}") as raised:
        opened(path, 3, checksums)
    assert not isinstance(raised.value, DamagedShard)


def test_opening_and_reading_touch_what_they_need(tmp_path):
    """Return the number of bytes requested from the system, whether they were cached or not."""
    path = tmp_path / "a.arrow"
    writer = ShardWriter(path, [8])
    for row in range(500):
        writer.write(EncodedRow(f"{row}", 0, ["c"], [1.0], [bytes(20_000)], {8: bytes(4_000)}))
    writer.close()
    checksums, before = checksums_of(path), bytes_asked_for()
    shard = Shard(path, path.stat().st_size, 500, [8], checksums)
    opening = bytes_asked_for() - before
    assert opening < 10_000
    for row in range(0, 500, 50):
        shard.latents(row, 8)
        shard.text(row, 0.5)
    assert bytes_asked_for() - before - opening < 10 * 24_016 + 5_000


def test_an_earlier_format_is_opened_without_its_blobs(tmp_path):
    path = tmp_path / "a.arrow"
    writer = ShardWriter(path, [8])
    for row in range(500):
        writer.write(EncodedRow(f"{row}", 0, ["c"], [1.0], [bytes(20_000)], {8: bytes(4_000)}))
    writer.close()
    checksums = as_format_3(path)
    before = bytes_asked_for()
    Shard(path, path.stat().st_size, 500, [8], checksums)
    assert bytes_asked_for() - before < 50_000


def bytes_asked_for() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_what_is_abandoned_leaves_nothing(tmp_path):
    writer = ShardWriter(tmp_path / "a.arrow", [8])
    writer.write(EncodedRow("k", 0, ["c"], [1.0], [b"t"], {8: b"l"}))
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
