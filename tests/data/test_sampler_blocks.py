"""Samples shuffled by blocks of shards."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.data.sampler import BatchSampler, BlockOrder, SamplerPhase, ShardSizes


def shard_sizes(rows: list[list[int]]) -> ShardSizes:
    """The sizes of shards with these rows by bucket, a hundred bytes each."""
    counts = np.asarray(rows, np.int64)
    return ShardSizes(counts, 100 * counts.sum(axis=1) + 1)


def sampler(sets: list[ShardSizes], phases, block_bytes: float, seed: int = 0) -> BatchSampler:
    sizes = tuple(tuple(one.rows.sum(axis=0).tolist()) for one in sets)
    return BatchSampler(sizes, seed, tuple(phases), BlockOrder(tuple(sets), block_bytes))


@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12),
    other=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=4),
    block_bytes=st.floats(1, 5000),
    repeat=st.integers(1, 3),
)
@settings(max_examples=40)
def test_each_sample_comes_once_an_epoch_times_its_repeat(rows, other, block_bytes, repeat):
    order = BlockOrder((shard_sizes([list(row) for row in rows]), shard_sizes([list(row) for row in other])), block_bytes)
    for bucket in (0, 1):
        counts = [int(one.rows[:, bucket].sum()) for one in order.sets]
        epoch = counts[0] * repeat + counts[1]
        sets, numbers = order.rows(((0, repeat), (1, 1)), bucket, epoch + np.arange(epoch), 7)
        seen = Counter(zip(sets.tolist(), numbers.tolist(), strict=True))
        assert seen == {(which, row): (repeat, 1)[which] for which in (0, 1) for row in range(counts[which])}


def test_any_position_alone_gives_what_all_together_give():
    order = BlockOrder((shard_sizes([[5]] * 40),), 2500)
    everything = order.rows(((0, 1),), 0, np.arange(1000), 3)
    for position in (0, 199, 200, 617, 999):
        one = order.rows(((0, 1),), 0, np.asarray([position]), 3)
        assert (one[0][0], one[1][0]) == (everything[0][position], everything[1][position])


def test_few_shards_are_needed_at_a_time_and_each_once_an_epoch():
    shards, rows, per_block = 60, 20, 6
    one = shard_sizes([[rows]] * shards)
    data = sampler([one], [SamplerPhase(shards * rows // 10, 10, (1,))], per_block * int(one.bytes[0]))
    steps = [np.unique(data.rows(step)[2] // rows) for step in range(data.steps)]
    assert all(len(shards) <= 2 * per_block for shards in steps)
    assert sum(len(shards) > per_block for shards in steps) <= shards // per_block  # where a batch lies in two blocks
    first, last = {}, {}
    for step, numbers in enumerate(steps):
        for number in numbers.tolist():
            first.setdefault(number, step)
            last[number] = step
    assert max(last[number] - first[number] for number in first) <= per_block * rows // 10 + 1


def test_all_buckets_follow_one_order_of_shards():
    one = shard_sizes([[12, 4]] * 50)
    order = BlockOrder((one,), 5 * int(one.bytes[0]))
    for block in range(10):
        shards = [
            set((order.rows(((0, 1),), bucket, np.arange(5 * rows) + block * 5 * rows, 1)[1] // rows).tolist())
            for bucket, rows in ((0, 12), (1, 4))
        ]
        assert shards[0] == shards[1]
        assert len(shards[0]) == 5


def test_streams_with_weights_share_the_block_by_their_bytes():
    large, small = shard_sizes([[10]] * 90), shard_sizes([[10]] * 10)
    data = sampler([large, small], [SamplerPhase(50, 20, (1, 1), (0.5, 0.5))], 20 * int(large.bytes[0]))
    for step in range(20):
        _, sets, rows = data.rows(step)
        assert (sets == 0).sum() == pytest.approx(10, abs=5)
        assert len(np.unique(rows[sets == 1] // 10)) <= 4  # a fifth of the ten shards, or two blocks of these


def test_epochs_and_seeds_differ():
    order = BlockOrder((shard_sizes([[10]] * 20),), 4000)
    first, second = (order.rows(((0, 1),), 0, np.arange(200) + 200 * epoch, 0)[1] for epoch in (0, 1))
    assert np.mean(first == second) < 0.05
    assert np.mean(first == order.rows(((0, 1),), 0, np.arange(200), 1)[1]) < 0.05
