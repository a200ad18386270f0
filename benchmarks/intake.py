"""How much memory does reading a source take? Prints a line for each case, measured in a process of its own.

    python benchmarks/intake.py

1. Parquet: row groups of 20 and 400 MB of pictures, each in one page, with and without compression.
2. Captions joined from a file of JSON lines: building the index on the disk, and looking up 100,000 records. --rows 20000000 takes a few
   minutes and 6 GB of the disk.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from microdit.data.sources.base import Record
from microdit.data.sources.joined_captions import open_joined
from microdit.data.sources.open import open_source

PICTURE = 400_000  # bytes
LOOKED_UP = 100_000  # records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000, 2_000_000], help="rows of the files that are joined")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        print(f"{'row group, MB':>16}{'compression':>16}{'memory, MB':>16}{'seconds':>16}")
        for compression in ("NONE", "SNAPPY", "ZSTD", "BROTLI"):
            for pictures in (50, 1000):
                path = Path(place) / f"{compression}-{pictures}.parquet"
                in_new_process(write_table, path, pictures, compression)
                memory, seconds = in_new_process(read_table, path)
                print(f"{pictures * PICTURE / 1e6:16,.0f}{compression.lower():>16}{memory:16,.0f}{seconds:16.1f}")
        print(f"\n{'rows joined':>16}{'file, MB':>16}{'index, MB':>16}{'memory, MB':>16}{'index, s':>16}{'look-ups/s':>16}")
        for rows in args.rows:
            file, index, memory, seconds, speed = in_new_process(join, Path(place) / f"{rows}.jsonl", rows)
            print(f"{rows:16,}{file:16,.0f}{index:16,.0f}{memory:16,.0f}{seconds:16.0f}{speed:16,.0f}")


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def write_table(path: Path, pictures: int, compression: str) -> None:
    generator = np.random.default_rng(0)
    columns = {"image": [generator.bytes(PICTURE) for _ in range(pictures)], "text": ["words"] * pictures}
    pq.write_table(pa.table(columns), path, row_group_size=pictures, compression=compression)


def read_table(path: Path) -> tuple[float, float]:
    source, before, started = open_source(str(path)), peak_megabytes(), time.perf_counter()
    for part in source.parts:
        for record in part.records():
            assert not record.problem
    return peak_megabytes() - before, time.perf_counter() - started


def join(path: Path, rows: int) -> tuple[float, float, float, float, float]:
    with path.open("w") as file:
        file.writelines(_lines(rows))
    captions = open_joined(str(path), path.parent)
    before, started = peak_megabytes(), time.perf_counter()
    assert captions.counts()["rows_unmatched"] == rows
    built = time.perf_counter() - started
    wanted = np.random.default_rng(0).integers(0, rows, LOOKED_UP)
    started = time.perf_counter()
    found = sum(bool(record.captions) for record in captions.records("part", (Record(f"{n:09}", {}, b"") for n in wanted), replaces=True))
    assert found == LOOKED_UP
    speed = LOOKED_UP / (time.perf_counter() - started)
    sizes = path.stat().st_size / 1e6, captions.index.stat().st_size / 1e6
    path.unlink()
    captions.index.unlink()
    return *sizes, peak_megabytes() - before, built, speed


def _lines(rows: int) -> Iterator[str]:
    words = "a longer description, as a vision model may have written it, of its colours and shapes"
    return (f'{{"key": "{number:09}", "caption": "picture {number}: {words}"}}\n' for number in range(rows))


if __name__ == "__main__":
    main()
