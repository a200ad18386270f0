import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.data.shard_index import ArrowStream, ShardIndex
from microdit.data.shards import BATCH_ROWS, EncodedRow, ShardWriter

# Of each row: its bucket, the lengths and weights of its captions' blobs, the lengths of its latents.
ROWS = st.lists(
    st.tuples(
        st.integers(0, 2**15 - 1),
        st.lists(st.tuples(st.integers(0, 300), st.sampled_from([0.0, 0.25, 1.0])), max_size=3),
        st.tuples(st.integers(0, 300), st.integers(0, 300)),
    ),
    max_size=8,
)


def write(path, rows):
    writer = ShardWriter(path, [8, 16])
    for bucket, captions, (small, large) in rows:
        text = [os.urandom(length) for length, _ in captions]
        weights = [weight for _, weight in captions]
        writer.write(EncodedRow("k", bucket, ["c"] * len(text), weights, text, {8: os.urandom(small), 16: os.urandom(large)}))
    writer.close()
    return path


def same(one: ShardIndex, other: ShardIndex) -> bool:
    pairs = [(one.buckets, other.buckets), (one.first_captions, other.first_captions), (one.weights, other.weights)]
    for name, blobs in one.blobs.items():
        pairs += [(blobs.positions, other.blobs[name].positions), (blobs.lengths, other.blobs[name].lengths)]
    return list(one.blobs) == list(other.blobs) and all(np.array_equal(a, b) for a, b in pairs)


@given(rows=ROWS, repeat=st.sampled_from([1, 1, 1, BATCH_ROWS]))
@settings(max_examples=40, deadline=None)
def test_an_index_comes_back_from_its_bytes_and_finds_every_blob(tmp_path_factory, rows, repeat):
    rows = rows * repeat
    path = write(tmp_path_factory.mktemp("shard") / "a.arrow", rows)
    with path.open("rb") as file:
        stream = ArrowStream(file.fileno())
        index = ShardIndex.of(stream)
        file.seek(stream.end)
        content = file.read()
    assert content == index.to_bytes()
    assert same(ShardIndex.from_bytes(content, [8, 16]), index)
    assert index.buckets.tolist() == [bucket for bucket, _, _ in rows]
    assert index.weights.tolist() == [weight for _, captions, _ in rows for _, weight in captions]
    assert np.diff(index.first_captions.astype(int)).tolist() == [len(captions) for _, captions, _ in rows]
    assert (index.blobs["latents_16"].lengths == [large + 8 for _, _, (_, large) in rows]).all()


def test_an_index_of_other_columns_is_refused(tmp_path):
    path = write(tmp_path / "a.arrow", [(0, [(5, 1.0)], (3, 4))])
    with path.open("rb") as file:
        content = ShardIndex.of(ArrowStream(file.fileno())).to_bytes()
    for resolutions in ([8], [8, 16, 32]):
        with pytest.raises(ValueError, match=r"other columns|buffer"):
            ShardIndex.from_bytes(content, resolutions)


def test_thousands_of_equal_rows_take_little_room(tmp_path):
    path = write(tmp_path / "a.arrow", [(1, [(100, 1.0)], (20, 40))] * 3000)
    with path.open("rb") as file:
        index = ShardIndex.of(ArrowStream(file.fileno()))
    assert len(index.to_bytes()) < 5_000
    arrays = [index.buckets, index.first_captions, index.weights, *(n for b in index.blobs.values() for n in (b.positions, b.lengths))]
    assert sum(array.nbytes for array in arrays if array.strides != (0,)) < 50_000
