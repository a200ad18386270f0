"""Cold reads of large data sets: 100, 1,000 and 10,000 shards of the paper's shape.

    python benchmarks/scale_reading.py

Shards are sparse files: each has its real length (3,700 rows, latents at 256 and 512 px, captions of about 25 tokens, all in 8 bits:
171 MB) and its index, but only the rows that the first STEPS batches of one rank will read, and one short row for opening it.
"""

import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from fabricated import plan_of
from page_cache import bytes_read, forget
from scale_row import SHARD_ROWS, SHARDS, SIZES, Row

from microdit.data.dataset import EncodedDataset, MixedDataset
from microdit.data.manifest import write_manifest
from microdit.data.packing import bytes_of_row
from microdit.data.sampler import BatchSampler, SampleRef, SamplerPhase
from microdit.data.shard_index import Blobs, ShardIndex
from microdit.data.shards import BATCH_ROWS, CHECKSUM_BYTES, MOST_OPEN, Checksums, Shard, most_open, seal

BATCH, RANKS, STEPS = 2048, 8, 25
CHANNELS = 1024
LATENTS = {256: 4 * bytes_of_row(32 * 32, "int8"), 512: 4 * bytes_of_row(64 * 64, "int8")}
BANDWIDTH = 0.86e9  # bytes a second, shared by the ranks
MOST_TIMES, MOST_SECONDS, MOST_MEMORY = 4, 20, 100_000  # times the wanted bytes; of the first batch; bytes for each open shard


def rows(place: Path) -> list[Row]:
    """Return the table's rows about reading."""
    measured = {name: measure(place / name.replace(" ", ""), int(SHARDS * share)) for name, share in SIZES.items()}
    each = list(measured.values())

    def row(what: str, figure: Callable[["Measured"], str], bar: str, holds: Callable[["Measured"], bool]) -> Row:
        return Row(what, {name: figure(one) for name, one in measured.items()}, bar, all(map(holds, each)))

    return [
        row(
            "opening a cold shard of 171 MB and reading one row: bytes read, for each byte wanted",
            lambda m: f"{m.opening / 1e3:.0f} kB, {m.opening / m.one_row:.1f} x",
            f"at most {MOST_TIMES} x",
            lambda m: m.one_row <= m.opening <= MOST_TIMES * m.one_row,
        ),
        row(
            f"first cold batch of a rank of {RANKS}, {BATCH // RANKS} samples: bytes read, for each byte wanted",
            lambda m: f"{m.first_read / 1e6:.1f} MB, {m.first_read / m.first_wanted:.1f} x",
            f"at most {MOST_TIMES} x",
            lambda m: m.first_wanted <= m.first_read <= MOST_TIMES * m.first_wanted,
        ),
        row(
            f"{STEPS} cold steps of such a rank: bytes read, for each byte wanted",
            lambda m: f"{m.all_read / 1e6:.0f} MB, {m.all_read / m.all_wanted:.1f} x",
            f"at most {MOST_TIMES} x",
            lambda m: m.all_wanted <= m.all_read <= MOST_TIMES * m.all_wanted,
        ),
        row(
            "opening the set: its card, and the sizes of its shards",
            lambda m: f"{m.manifest_seconds:.2f} s",
            "under 5 s",
            lambda m: m.manifest_seconds < 5,
        ),
        row(
            f"from nothing to the first batch, {RANKS} ranks at {BANDWIDTH / 1e9} GB/s together (bytes reckoned, the rest measured)",
            lambda m: f"-> {m.start_seconds:.1f} s",
            f"under {MOST_SECONDS} s",
            lambda m: m.start_seconds < MOST_SECONDS,
        ),
        row(
            "all shards read from once: descriptors, memory",
            lambda m: f"{m.descriptors:,}, {m.memory / 1e6:.0f} MB",
            f"at most {MOST_OPEN:,} and half of 'ulimit -n', {MOST_MEMORY / 1e3:.0f} kB each",
            lambda m: m.descriptors <= most_open() and m.memory <= MOST_MEMORY * m.descriptors,
        ),
    ]


@dataclass(frozen=True)
class Measured:
    """The bytes, seconds and counts measured at one size."""

    opening: int
    one_row: int
    first_read: int
    first_wanted: int
    all_read: int
    all_wanted: int
    manifest_seconds: float
    first_seconds: float
    descriptors: int
    memory: int

    @property
    def start_seconds(self) -> float:
        return self.manifest_seconds + self.first_seconds + RANKS * self.first_read / BANDWIDTH


def measure(folder: Path, shards: int) -> Measured:
    index = lay_out()
    places = wanted_places(shards)
    lengths = index.blobs["text"].lengths.astype(int) + index.blobs["latents_256"].lengths.astype(int)
    wanted = [sum(int(lengths[place.row % SHARD_ROWS]) for place in step) for step in places]
    fabricate(folder, shards, index, {place.row for step in places for place in step})
    files = sorted(folder.glob("*.arrow"))

    number, row = divmod(places[0][0].row, SHARD_ROWS)
    forget([files[number]])
    entry = json.loads((folder / "card.json").read_text())["shards"][number]
    before = bytes_read()
    shard = Shard(files[number], entry["bytes"], SHARD_ROWS, list(LATENTS), Checksums(**entry["checksums"]))
    shard.latents(row, 256), shard.text(row, 0)
    opening, one_row = bytes_read() - before, int(lengths[row])
    del shard

    forget([folder / "card.json", *files])
    started = time.perf_counter()
    mixture = MixedDataset([EncodedDataset(folder, 256)], [phase()], seed=0)
    opened = time.perf_counter()
    before = bytes_read()
    mixture.stored(0, 0, RANKS)
    first, first_read = time.perf_counter(), bytes_read() - before
    for step in range(1, STEPS):
        mixture.stored(step, 0, RANKS)
    all_read = bytes_read() - before
    del mixture

    encoded, descriptors, memory = EncodedDataset(folder, 256), open_descriptors(), own_memory()
    for number in range(shards):
        encoded.read(0, number * SHARD_ROWS)
    descriptors, memory = open_descriptors() - descriptors, own_memory() - memory
    del encoded
    shutil.rmtree(folder)
    seconds = {"manifest_seconds": opened - started, "first_seconds": first - opened}
    return Measured(opening, one_row, first_read, wanted[0], all_read, sum(wanted), **seconds, descriptors=descriptors, memory=memory)


# --- the fabricated set


def phase() -> SamplerPhase:
    return SamplerPhase(10**6, BATCH, (1,))


def wanted_places(shards: int) -> list[list[SampleRef]]:
    """Return the samples that rank 0 reads, step by step."""
    order = BatchSampler(((shards * SHARD_ROWS,),), 0, (phase(),))
    return [order.batch(step)[0::RANKS] for step in range(STEPS)]


def lay_out() -> ShardIndex:
    """Return the index of a shard, laid out as by `ShardWriter`: column by column in each record batch. Row 0's caption is short."""
    tokens = np.random.default_rng(0).normal(25, 8, SHARD_ROWS).round().clip(5, 77).astype(np.int64)
    tokens[0] = 1
    lengths = {"text": tokens * bytes_of_row(CHANNELS, "int8") + CHECKSUM_BYTES}
    lengths |= {f"latents_{side}": np.full(SHARD_ROWS, size + CHECKSUM_BYTES) for side, size in LATENTS.items()}
    positions: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in lengths}
    end = 504  # the schema
    for first in range(0, SHARD_ROWS, BATCH_ROWS):
        end += 16_000  # the batch's message, its keys, captions, weights and buckets
        for name in lengths:
            these = lengths[name][first : first + BATCH_ROWS]
            end += 8 * len(these)  # the column's offsets
            positions[name].append(end + np.cumsum(these) - these)
            end += int(these.sum())
    blobs = {name: Blobs(np.concatenate(positions[name]), lengths[name]) for name in lengths}
    return ShardIndex(np.zeros(SHARD_ROWS, np.int64), np.arange(SHARD_ROWS + 1), np.ones(SHARD_ROWS), blobs)


def fabricate(folder: Path, shards: int, index: ShardIndex, numbers: set[int]) -> None:
    """Write a data set of sparse shards, in which these rows and the first row of each shard can be read."""
    folder.mkdir()
    last = max(int(blobs.positions[-1] + blobs.lengths[-1]) for blobs in index.blobs.values())
    content = index.to_bytes()
    checksums = Checksums("", "", "", "", xxhash.xxh3_128_hexdigest(content), len(content))
    wanted: list[list[int]] = [[0] for _ in range(shards)]
    for number in numbers:
        wanted[number // SHARD_ROWS].append(number % SHARD_ROWS)
    filling = np.random.default_rng(1).bytes(int(index.blobs["text"].lengths.max()))
    entries = []
    for number in range(shards):
        path = folder / f"shard-{number:05d}.arrow"
        with path.open("wb", buffering=0) as file:
            for row in wanted[number]:
                for column in ("text", "latents_256"):
                    position, length = (int(numbers[row]) for numbers in (index.blobs[column].positions, index.blobs[column].lengths))
                    os.pwrite(file.fileno(), seal(filling[: length - CHECKSUM_BYTES], row, 0), position)
            os.pwrite(file.fileno(), content, last)
        counts = {"seen": SHARD_ROWS, "captions": SHARD_ROWS, "tokens": 25 * SHARD_ROWS, "captions_cut": 0, "rejected": {}}
        entries.append({"name": path.name, "rows": SHARD_ROWS, "buckets": {"0": SHARD_ROWS}, "bytes": last + len(content), **counts})
        entries[-1] |= {"part": path.stem, "fingerprint": "0" * 64, "sha256": "0" * 64, "checksums": checksums._asdict()}
    write_manifest(folder, plan_of({side: side // 8 for side in LATENTS}, "int8", "int8", (77, CHANNELS)), entries)


# --- what this process holds


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def own_memory() -> int:
    """Return the bytes of anonymous memory of this process."""
    gc.collect()
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=".") as place:
        for one in rows(Path(place)):
            print(f"{'holds' if one.holds else 'FAILS'}  {one.what}: {', '.join(f'{k}: {v}' for k, v in one.figures.items())} ({one.bar})")
