"""Training data read from an object store that is slowed to 50 MB/s and 30 ms: waits, the time to the first batch, and memory.

    python benchmarks/store.py [--only start|waits] [--minutes 3]

The store is a real S3 server on this machine (moto's), with a proxy before it that limits the bytes of all connections together and delays
each answer. The sets hold random numbers. Each row is printed with its bar. Takes about ten minutes on two cores, and 2 GB of memory.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from microdit.data.dataset import EncodedDataset, MixedDataset
from microdit.data.sampler import SamplerPhase
from microdit.data.shard_cache import BLOCK, ShardCache
from microdit.data.transfer import push
from microdit.io import places
from microdit.io.places import Place
from microdit.training.prefetch import Prefetcher
from microdit.training.trainer import AHEAD
from tests.data.random_sets import random_set
from tests.io.store_server import CREDENTIALS, SLOW, Proxy, shared_server

BANDWIDTH, LATENCY = 50e6, 0.03  # bytes a second, seconds
WANTED = 30e6  # bytes a second that the loop uses
MINUTE = 60.0
FIRST_BATCH = 10.0  # seconds
SMALL, LARGE = 100, 10_000  # shards, of the measurement of starts
SHARDS, ROWS = 400, 250  # of the measurement of waits: 1.7 GB
MOST_GROWTH = 20e6  # bytes of memory between the first minute and the end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="length of the measurement of waits")
    parser.add_argument("--only", choices=("start", "waits"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, _slow_store(Path(folder)) as (bucket, slow):
        if args.only != "waits":
            _measure_start(Path(folder), bucket, slow)
        if args.only != "start":
            _measure_waits(Path(folder), bucket, slow, args.minutes)


def _measure_start(folder: Path, bucket: Place, slow: str) -> None:
    """Print the seconds from opening a set to its first batch, from an empty cache of 3% of the set, for few shards and for many."""
    for shards in (SMALL, LARGE):
        random_set(folder / f"{shards}", shards, rows=16, tokens=32)
        size = sum(path.stat().st_size for path in (folder / f"{shards}").glob("*.arrow"))
        _use(bucket, None)
        push(folder / f"{shards}", bucket / f"{shards}")
        _use(bucket, slow)
        memory, began = _memory(), time.monotonic()
        cache = ShardCache(folder / f"cache-{shards}", max(0.03 * size, 20 * size / shards) / 1e9)
        data = EncodedDataset(bucket / f"{shards}", cache=cache)
        mixture = MixedDataset([data], [SamplerPhase(10**6, 256, (1,))], 0, block_bytes=BLOCK * cache.bytes)
        mixture.stored(0)
        seconds = time.monotonic() - began
        mixture.close()
        print(
            f"{shards:6,} shards, {size / 1e6:.0f} MB: first batch after {seconds:.1f} s (bar: {FIRST_BATCH:g} s), "
            f"{(_memory() - memory) / 1e6:.0f} MB of memory",
            flush=True,
        )


def _measure_waits(folder: Path, bucket: Place, slow: str, minutes: float) -> None:
    """Print for how long a loop that uses WANTED bytes a second waits, with a cache of 8% of the set."""
    random_set(folder / "set", SHARDS, ROWS, tokens=256)
    size = sum(path.stat().st_size for path in (folder / "set").glob("*.arrow"))
    _use(bucket, None)
    push(folder / "set", bucket / "set")
    _use(bucket, slow)
    cache = ShardCache(folder / "cache", 0.08 * size / 1e9)
    data = EncodedDataset(bucket / "set", cache=cache)
    batch, row = 64, size / (SHARDS * ROWS)
    steps = int(minutes * MINUTE * WANTED / (batch * row))
    mixture = MixedDataset([data], [SamplerPhase(steps, batch, (1,))], 0, block_bytes=BLOCK * cache.bytes)
    began, early, late, longest, memory, most = time.monotonic(), 0.0, 0.0, 0.0, 0.0, 0
    due, spent = began, time.process_time()
    with Prefetcher(mixture.stored, range(steps), AHEAD, 300, mixture.where) as reader:
        for _ in range(steps):
            asked = time.monotonic()
            reader.next()
            waited = time.monotonic() - asked
            if asked - began < MINUTE:
                early, memory = early + waited, _memory()
            else:
                late, longest = late + waited, max(longest, waited)
            most = max(most, sum(path.stat().st_size for path in cache.folder.glob("*.arrow") if path.exists()))
            due = max(due, asked) + batch * row / WANTED  # the loop computes
            time.sleep(max(0.0, due - time.monotonic()))
    seconds, spent = time.monotonic() - began, time.process_time() - spent
    mixture.close()
    print(
        f"{size / 1e6:.0f} MB in {SHARDS} shards, cache of {cache.bytes / 1e6:.0f} MB (at most {most / 1e6:.0f} were used), "
        f"{steps * batch * row / seconds / 1e6:.1f} MB/s for {seconds:.0f} s, "
        f"with {spent / seconds:.0%} of a core; {os.getloadavg()[1]:.1f} processes wanted this machine's {os.cpu_count()} cores"
    )
    print(f"  waits in the first minute: {early:.2f} s; after it: {late:.3f} s in all, {longest * 1e3:.0f} ms at most (bar: none)")
    print(f"  memory after the first minute: {(_memory() - memory) / 1e6:+.1f} MB (bar: less than {MOST_GROWTH / 1e6:.0f})")


@contextmanager
def _slow_store(folder: Path) -> Iterator[tuple[Place, str]]:
    """Start the server and the slow proxy; yield a bucket, and the proxy's address."""
    os.environ.update(CREDENTIALS)
    store = shared_server(folder / "store")
    command = [sys.executable, "-m", "tests.io.store_server", str(folder), store, str(BANDWIDTH), str(LATENCY)]
    proxy = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    try:
        while not (folder / SLOW).exists():
            time.sleep(0.05)
        os.environ["AWS_ENDPOINT_URL"] = store
        yield Place(f"s3://{Proxy(store).make_bucket()}"), (folder / SLOW).read_text()
    finally:
        proxy.kill()
        proxy.wait()


def _use(bucket: Place, slow: str | None) -> None:
    """Reach the store through the slow proxy, or directly."""
    if slow is None:
        os.environ["AWS_ENDPOINT_URL"] = os.environ.setdefault("DIRECT_STORE", os.environ["AWS_ENDPOINT_URL"])
    else:
        os.environ["AWS_ENDPOINT_URL"] = slow
    places._file_system.cache_clear()


def _memory() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
