"""Choose the samples of every batch, as a function of (seed, step) alone.

The sampler has no state, so the step number is a run's exact position in its data, on any number of ranks and workers.

Notable:
- `permuted` evaluates a random permutation without storing it, so memory does not grow with the data;
- `StreamSchedule` distributes items over several streams by weight, evenly at every point, and counts how many each stream got before;
- `BatchSampler` combines both: phases with their own mix of data sets, batches of one bucket (image shape), every sample once per epoch;
- `BlockOrder` takes the place of the permutation where only some shards are at hand: shards in random order, samples shuffled by blocks.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from microdit.splitmix import splitmix64

Ints = NDArray[np.int64]
Members = tuple[tuple[int, int], ...]  # (data set, repeat) for each data set of a stream

ROUNDS = 6
BLOCK = 1024  # items that `StreamSchedule` distributes at a time


class SampleRef(NamedTuple):
    """A sample: row number `row` among those of its data set and bucket. `draw` in [0, 1) chooses one of its captions."""

    set: int
    bucket: int
    row: int
    draw: float


@dataclass(frozen=True)
class SamplerPhase:
    """The steps, batch size and mix of data sets of a training phase.

    With `weights`, each data set has its share of the samples. Without, the data sets are concatenated, each as often as `repeats` says.
    """

    steps: int
    batch_size: int
    repeats: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    @property
    def streams(self) -> tuple[Members, ...]:
        """The data sets of each stream: one stream of all, or one stream per data set."""
        if self.weights is None:
            return (tuple((number, repeat) for number, repeat in enumerate(self.repeats) if repeat),)
        return tuple(((number, 1),) for number in range(len(self.weights)))

    @property
    def members(self) -> Members:
        """The data sets that this phase uses."""
        if self.weights is None:
            return self.streams[0]
        return tuple((number, 1) for number, weight in enumerate(self.weights) if weight)


@dataclass(frozen=True)
class BatchSampler:
    """The batches of all phases, numbered consecutively. `sizes[set][bucket]` is the number of rows."""

    sizes: tuple[tuple[int, ...], ...]
    seed: int
    phases: tuple[SamplerPhase, ...]
    blocks: "BlockOrder | None" = None  # by default, each epoch is one permutation of all samples

    @property
    def steps(self) -> int:
        """The number of steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def batch(self, step: int) -> list[SampleRef]:
        """Return the samples of a step, counted from 0. All are from one bucket."""
        bucket, sets, rows = self.rows(step)
        draws = np.random.default_rng([self.seed, step]).random(len(rows))
        return [SampleRef(*sample) for sample in zip(sets.tolist(), [bucket] * len(rows), rows.tolist(), draws.tolist(), strict=True)]

    def rows(self, step: int) -> tuple[int, Ints, Ints]:
        """Return the bucket of a step, and the data set and row of each of its samples, (B,)."""
        number, step_in_phase = self._phase_at(step)
        phase = self.phases[number]
        buckets = self._bucket_schedule(phase)
        bucket = int(buckets.streams(step_in_phase, 1)[0])
        first = int(buckets.counts_before(step_in_phase)[bucket]) * phase.batch_size
        schedule = self._stream_schedule(phase, bucket)
        before, streams = schedule.counts_before(first), schedule.streams(first, phase.batch_size)
        of_set, of_row = np.zeros(phase.batch_size, np.int64), np.zeros(phase.batch_size, np.int64)
        for stream, members in enumerate(phase.streams):
            mine = np.flatnonzero(streams == stream)
            start = self._earlier[number].get((members, bucket), 0) + int(before[stream])
            of_set[mine], of_row[mine] = self._rows(members, bucket, start + np.arange(len(mine)))
        return bucket, of_set, of_row

    def _rows(self, members: Members, bucket: int, positions: Ints) -> tuple[Ints, Ints]:
        """Return the data sets and rows at some positions of a stream, counted over all epochs."""
        if self.blocks is not None:
            return self.blocks.rows(members, bucket, positions, self.seed)
        numbers = np.asarray([number for number, _ in members])
        sizes = np.asarray([self.sizes[number][bucket] for number in numbers])
        ends = np.cumsum(sizes * [repeat for _, repeat in members])
        epochs, inside = np.divmod(positions, max(ends[-1], 1))
        for epoch in np.unique(epochs):
            this = epochs == epoch
            inside[this] = permuted(inside[this], int(ends[-1]), _hash(self.seed, bucket, int(epoch), *numbers))
        member = np.searchsorted(ends, inside, side="right")
        starts = np.concatenate([[0], ends[:-1]])
        return numbers[member], (inside - starts[member]) % sizes[member]

    @lru_cache(maxsize=64)  # noqa: B019
    def _bucket_schedule(self, phase: SamplerPhase) -> "StreamSchedule":
        """Distribute batches over buckets by their numbers of rows."""
        rows = np.asarray([[self.sizes[n][b] * repeat for n, repeat in phase.members] for b in range(len(self.sizes[0]))]).sum(axis=1)
        return StreamSchedule(tuple(rows / rows.sum()), self.seed + 1)

    @lru_cache(maxsize=64)  # noqa: B019
    def _stream_schedule(self, phase: SamplerPhase, bucket: int) -> "StreamSchedule":
        """Distribute samples over the streams that have rows in the bucket, by weight."""
        weights = np.asarray(phase.weights or [1.0])
        filled = np.asarray([any(self.sizes[number][bucket] for number, _ in members) for members in phase.streams])
        weights = weights * filled if filled.any() else weights
        return StreamSchedule(tuple(weights / weights.sum()), self.seed)

    @cached_property
    def _earlier(self) -> list[dict[tuple[Members, int], int]]:
        """The number of samples of each (stream, bucket) that earlier phases used, for each phase."""
        taken: dict[tuple[Members, int], int] = {}
        earlier = []
        for phase in self.phases:
            earlier.append(dict(taken))
            for bucket, batches in enumerate(self._bucket_schedule(phase).counts_before(phase.steps)):
                counts = self._stream_schedule(phase, bucket).counts_before(int(batches) * phase.batch_size)
                for members, count in zip(phase.streams, counts, strict=True):
                    taken[members, bucket] = taken.get((members, bucket), 0) + int(count)
        return earlier

    def _phase_at(self, step: int) -> tuple[int, int]:
        for number, phase in enumerate(self.phases):
            if step < phase.steps:
                return number, step
            step -= phase.steps
        raise IndexError("the step lies after the last phase")


class ShardSizes(NamedTuple):
    """The number of rows of each shard of a data set by bucket, (shards, buckets), and the bytes of each shard, (shards,)."""

    rows: Ints
    bytes: Ints


@dataclass(frozen=True, eq=False)
class BlockOrder:
    """An order in which few shards are needed at a time: the shards of an epoch in random order, divided into blocks of `block_bytes`.

    The samples of a block are permuted. Each of several data sets that are not concatenated has its share of `block_bytes`, by its bytes.
    All buckets of an epoch follow the same order of shards.
    """

    sets: tuple[ShardSizes, ...]
    block_bytes: float

    def rows(self, members: Members, bucket: int, positions: Ints, seed: int) -> tuple[Ints, Ints]:
        """Return the data sets and rows at some positions of a stream, counted over all epochs."""
        per_epoch = sum(int(self.sets[number].rows[:, bucket].sum()) * repeat for number, repeat in members)
        epochs, inside = np.divmod(positions, max(per_epoch, 1))
        of_set, of_row = np.empty_like(inside), np.empty_like(inside)
        for epoch in np.unique(epochs).tolist():
            order = self._epoch(members, bucket, epoch, seed)
            block = np.searchsorted(order.block_ends, inside, side="right")
            for number in np.unique(block[epochs == epoch]).tolist():
                here = (epochs == epoch) & (block == number)
                first = int(order.block_ends[number - 1]) if number else 0
                key = _hash(seed, bucket, epoch, number, *(member for member, _ in members))
                position = first + permuted(inside[here] - first, int(order.block_ends[number]) - first, key)
                shard = np.searchsorted(order.shard_ends, position, side="right")
                before = np.where(shard > 0, order.shard_ends[shard - 1], 0)
                of_set[here], of_row[here] = order.sets[shard], order.first_rows[shard] + position - before
        return of_set, of_row

    @lru_cache(maxsize=64)  # noqa: B019 - the epochs that neighbouring steps need
    def _epoch(self, members: Members, bucket: int, epoch: int, seed: int) -> "_Epoch":
        sets = np.concatenate([np.full(len(self.sets[number].bytes) * repeat, number) for number, repeat in members])
        rows = np.concatenate([np.tile(self.sets[number].rows[:, bucket], repeat) for number, repeat in members])
        size = np.concatenate([np.tile(self.sets[number].bytes, repeat) for number, repeat in members])
        firsts = [np.cumsum(self.sets[number].rows[:, bucket]) - self.sets[number].rows[:, bucket] for number, _ in members]
        first_rows = np.concatenate([np.tile(first, repeat) for first, (_, repeat) in zip(firsts, members, strict=True)])
        order = permuted(np.arange(len(sets)), len(sets), _hash(seed, epoch, *(number for number, _ in members)))
        size, ends = size[order], np.cumsum(rows[order])
        share = sum(int(self.sets[number].bytes.sum()) for number, _ in members) / sum(int(one.bytes.sum()) for one in self.sets)
        blocks = (np.cumsum(size) - size) // max(1.0, self.block_bytes * share)
        return _Epoch(sets[order], first_rows[order], ends, ends[np.flatnonzero(np.diff(blocks, append=np.inf))])


class _Epoch(NamedTuple):
    """The shards of an epoch in their order: data set, first row, and the number of rows up to the end of each; and those of the blocks."""

    sets: Ints
    first_rows: Ints
    shard_ends: Ints
    block_ends: Ints


@dataclass(frozen=True)
class StreamSchedule:
    """Distributes items 0, 1, 2, ... over streams by `weights`, which add up to 1. Every block of 1,024 items holds each stream's share."""

    weights: tuple[float, ...]
    seed: int

    def counts_before(self, item: int) -> Ints:
        """Return how many of the items before `item` went to each stream."""
        block, inside = divmod(item, BLOCK)
        counts = self._counts(block)
        if inside:
            counts = counts + np.bincount(self._block(block)[:inside], minlength=len(self.weights))
        return counts

    def streams(self, start: int, count: int) -> Ints:
        """Return the streams of items `start` to `start + count - 1`."""
        blocks = range(start // BLOCK, (start + count - 1) // BLOCK + 1)
        streams = np.concatenate([self._block(block) for block in blocks])
        return streams[start % BLOCK :][:count]

    @lru_cache(maxsize=64)  # noqa: B019 - a few numbers each; neighbouring steps need the same blocks
    def _counts(self, blocks: int) -> Ints:
        """Return the counts after whole blocks: each share rounded down, and the remainder for the largest stream."""
        counts = np.floor(blocks * BLOCK * np.asarray(self.weights)).astype(np.int64)
        largest = int(np.argmax(self.weights))
        counts[largest] += blocks * BLOCK - counts.sum()
        return counts

    @lru_cache(maxsize=64)  # noqa: B019
    def _block(self, block: int) -> Ints:
        counts = self._counts(block + 1) - self._counts(block)
        return np.random.default_rng([self.seed, block]).permutation(np.repeat(np.arange(len(counts)), counts))


def permuted(index: Ints, n: int, key: int) -> Ints:
    """Evaluate a random permutation of range(n) at `index`, with a Feistel network on the next even number of bits.

    Results outside range(n) are permuted again until they fall inside (cycle walking), which keeps it a permutation.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = _mix(np.arange(1, ROUNDS + 1, dtype=np.uint64) + np.uint64(key % (1 << 63)))
    value = index.astype(np.uint64)
    outside = np.ones(len(value), bool)
    while outside.any():
        left, right = value[outside] >> np.uint64(half), value[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        value[outside] = (left << np.uint64(half)) | right
        outside = value >= n
    return value.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash unsigned 64-bit integers."""
    return splitmix64(x.view(np.int64)).view(np.uint64)


def _hash(*numbers: int) -> int:
    """Hash several numbers into one of 64 bits."""
    value = np.zeros(1, np.uint64)
    for number in numbers:
        value = _mix(value + np.uint64(int(number) % (1 << 63)) + np.uint64(0x9E3779B97F4A7C15))
    return int(value[0])
