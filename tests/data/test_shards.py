import random
from pathlib import Path

import pytest

from microdit.data.shards import DamagedShard, Row, Shard, ShardWriter, checksums_of
from microdit.errors import UserError
from tests.damage import ALL_BITS, flips


def write(path, count=600):
    rows = [
        Row(f"key{i}", i % 3, [f"a {i}", f"b {i}"], [0.75, 0.25], [b"a%d" % i * 9, b"b%d" % i * 5], {8: b"l%d" % i * 20, 16: b"m%d" % i})
        for i in range(count)
    ]
    writer = ShardWriter(path, [8, 16])
    for row in rows:
        writer.write(row)
    writer.close()
    return rows, writer


def opened(path, rows, checksums=None):
    return Shard(path, path.stat().st_size, rows, [8, 16], checksums or checksums_of(path))


def everything(shard):
    """All that can be read of a shard of `write`."""
    columns = [shard.column(name) for name in ("key", "bucket", "captions", "weights")]
    blobs = [
        [bytes(shard.latents(row, side, row % 3)) for side in (8, 16)] + [bytes(shard.text(row, draw, row % 3)) for draw in (0.1, 0.9)]
        for row in range(len(shard))
    ]
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


def test_many_shards_can_be_open_at_once(tmp_path):
    _, writer = write(tmp_path / "a.arrow", 3)
    checksums = checksums_of(writer.path)
    shards = [opened(writer.path, 3, checksums) for _ in range(2000)]  # more than a process may have files
    assert all(len(shard) == 3 for shard in shards)


def sweep(path: Path, rows: int, **chosen) -> int:
    """Flip bits of a shard: how many are noticed. All others must leave everything as it is."""
    checksums, before, noticed = checksums_of(path), everything(opened(path, rows)), 0
    for at in flips(path, **chosen):
        try:
            after = everything(opened(path, rows, checksums))
        except UserError as error:
            noticed += str(path) in str(error)
        else:
            assert after == before, at
    return noticed


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(tmp_path):
    """One bit of every byte: blobs, keys, captions, weights, and what Arrow finds them by."""
    path = tmp_path / "a.arrow"
    write(path, 6)
    size = path.stat().st_size
    assert sweep(path, 6) > 0.7 * size  # the rest is padding


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


def test_opening_reads_no_blob_and_no_caption(tmp_path):
    """They are compared when they are read: a set of terabytes opens at once."""
    path = tmp_path / "a.arrow"
    rows, _ = write(path, 6)
    checksums, content = checksums_of(path), path.read_bytes()
    for written in (b"l3l3", b"b 5", b"key4"):
        for _ in flips(path, [content.index(written)]):
            assert opened(path, 6, checksums).latents(2, 8, 2) == rows[2].latents[8]


def test_a_shard_of_an_earlier_version_is_read_with_the_checksums_of_its_blobs(tmp_path):
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


def test_what_is_abandoned_leaves_nothing(tmp_path):
    writer = ShardWriter(tmp_path / "a.arrow", [8])
    writer.write(Row("k", 0, ["c"], [1.0], [b"t"], {8: b"l"}))
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
