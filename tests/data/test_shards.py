import random

import pytest

from microdit.data.shards import DamagedShard, Row, Shard, ShardWriter


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


def test_rows_come_back_over_several_record_batches(tmp_path):
    rows, writer = write(tmp_path / "a.arrow")
    shard = Shard(tmp_path / "a.arrow", writer.path.stat().st_size, 600, [8, 16])
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
    shards = [Shard(writer.path, writer.path.stat().st_size, 3, [8, 16]) for _ in range(2000)]  # more than a process may have files
    assert all(len(shard) == 3 for shard in shards)


def test_no_flipped_bit_is_ever_read_as_a_sample(tmp_path):
    """Any single changed bit either does not touch what is read, or is noticed."""
    path = tmp_path / "a.arrow"
    rows, _ = write(path, 40)
    content = path.read_bytes()
    noticed = 0
    generator = random.Random(0)
    for _ in range(400):
        changed = bytearray(content)
        changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        try:
            shard = Shard(path, len(content), 40, [8, 16])
            for number in range(13):
                i = shard.row_in_bucket(1, number)
                assert shard.latents(i, 8, 1) == rows[i].latents[8]
                assert shard.text(i, 0.1, 1) in rows[i].text
                assert i % 3 == 1
        except DamagedShard as damage:
            noticed += str(path) in str(damage)
    assert noticed > 100  # the file is small: much of it is schema and padding


def test_a_cut_file_is_named(tmp_path):
    path = tmp_path / "a.arrow"
    write(path, 10)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DamagedShard, match=f"{path} has {size - 50} bytes, not the {size}"):
        Shard(path, size, 10, [8, 16])


def test_what_is_abandoned_leaves_nothing(tmp_path):
    writer = ShardWriter(tmp_path / "a.arrow", [8])
    writer.write(Row("k", 0, ["c"], [1.0], [b"t"], {8: b"l"}))
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
