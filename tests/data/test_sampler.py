from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.data.sampler import BatchSampler, SamplerPhase, StreamSchedule, permuted


@given(n=st.integers(1, 3000), key=st.integers(0, 2**63))
@settings(max_examples=50)
def test_every_row_comes_once(n, key):
    assert np.array_equal(np.sort(permuted(np.arange(n), n, key)), np.arange(n))


@given(n=st.integers(1, 10**12), key=st.integers(0, 99), index=st.integers(0, 10**12))
def test_a_single_place_costs_nothing_even_in_a_huge_set(n, key, index):
    index %= n
    (found,) = permuted(np.asarray([index]), n, key)
    assert 0 <= found < n
    assert found == permuted(np.asarray([index, 0]), n, key)[0]


def test_the_order_looks_random():
    n = 100_000
    order = permuted(np.arange(n), n, 5)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.02
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, permuted(np.arange(n), n, 6))[0, 1]) < 0.02
    # How often two neighbours stay within 100 of each other: twice 100 / n in a random order.
    assert np.mean(np.abs(np.diff(order)) <= 100) == pytest.approx(200 / n, abs=0.001)


@given(
    weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=5),
    start=st.integers(0, 5000),
    count=st.integers(1, 3000),
    seed=st.integers(0, 9),
)
def test_counts_agree_with_what_was_dealt_and_shares_are_kept(weights, start, count, seed):
    shares = StreamSchedule(tuple(w / sum(weights) for w in weights), seed)
    dealt = np.bincount(shares.streams(start, count), minlength=len(weights))
    assert np.array_equal(shares.counts_before(start + count) - shares.counts_before(start), dealt)
    far = 1024 * 50
    assert np.allclose(shares.counts_before(far) / far, shares.weights, atol=len(weights) / far)


def samples(order: BatchSampler, steps: range) -> list[tuple[int, int, int]]:
    return [(p.set, p.bucket, p.row) for step in steps for p in order.batch(step)]


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3), batch=st.integers(1, 16), epochs=st.integers(1, 3), data=st.data())
@settings(max_examples=40)
def test_without_weights_each_sample_comes_once_an_epoch_times_its_repeat(sizes, batch, epochs, data):
    repeats = tuple(data.draw(st.integers(1, 3)) for _ in sizes)
    total = sum(size * repeat for size, repeat in zip(sizes, repeats, strict=True))
    steps = -(-total * epochs // batch)
    order = BatchSampler(tuple((size,) for size in sizes), 0, (SamplerPhase(steps, batch, repeats),))
    seen = Counter(samples(order, range(steps))[: total * epochs])
    assert seen == {(s, 0, row): repeats[s] * epochs for s, size in enumerate(sizes) for row in range(size)}


@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=3), data=st.data(), batch=st.integers(1, 12))
@settings(max_examples=20)
def test_phases_go_on_where_the_last_one_stopped_and_weights_hold(sizes, data, batch):
    weights = tuple(data.draw(st.integers(1, 4)) / 4 for _ in sizes)
    one = SamplerPhase(60, batch, (1,) * len(sizes), weights)
    cut = data.draw(st.integers(1, 59))
    two = (SamplerPhase(cut, batch, (1,) * len(sizes), weights), SamplerPhase(60 - cut, batch, (1,) * len(sizes), weights))
    tables = tuple((size,) for size in sizes)
    for order in (BatchSampler(tables, 3, (one,)), BatchSampler(tables, 3, two)):
        drawn = samples(order, range(60))
        for number, size in enumerate(sizes):
            rows = [row for s, _, row in drawn if s == number]
            for epoch in range(len(rows) // size):  # each set walks through its own epochs, whatever the phases
                assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_a_set_of_weight_zero_is_not_drawn():
    order = BatchSampler(((50,), (50,)), 0, (SamplerPhase(20, 8, (1, 1), (1.0, 0.0)), SamplerPhase(20, 8, (1, 1), (0.5, 0.5))))
    assert {s for s, _, _ in samples(order, range(20))} == {0}
    assert Counter(s for s, _, _ in samples(order, range(20, 40)))[1] == pytest.approx(80, abs=16)


def test_batches_are_of_one_bucket_and_buckets_get_their_rows_share():
    order = BatchSampler(((30, 90), (0, 60)), 0, (SamplerPhase(900, 10, (1, 1), (0.5, 0.5)),))
    counts = Counter()
    for step in range(900):
        batch = order.batch(step)
        assert len({p.bucket for p in batch}) == 1
        assert all(p.row < order.sizes[p.set][p.bucket] for p in batch)
        counts[batch[0].bucket] += 1
    assert counts[0] / 900 == pytest.approx(30 / 180, abs=0.03)


def test_seeds_and_epochs_differ_and_draws_are_uniform():
    def order(seed: int) -> BatchSampler:
        return BatchSampler(((100,),), seed, (SamplerPhase(100, 20, (1,)),))

    assert samples(order(0), range(5)) != samples(order(0), range(5, 10))
    assert samples(order(0), range(5)) != samples(order(1), range(5))
    draws = [p.draw for step in range(100) for p in order(0).batch(step)]
    assert np.mean(draws) == pytest.approx(0.5, abs=0.03)
    assert np.std(draws) == pytest.approx(12**-0.5, abs=0.03)
