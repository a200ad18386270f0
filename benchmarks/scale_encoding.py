"""The costs of starting an encoding that grow with images and processes: a common start, listing a folder, and reading its listing.

python benchmarks/scale_encoding.py
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scale_row import PICTURES, SIZES, Row

from microdit.data.encode import EncodeSettings, encode_source, unfinished
from microdit.data.sources.base import Part, Source
from microdit.data.sources.builtin import scenes_source
from microdit.data.sources.folders import listed_once
from microdit.data.sources.open import open_source
from microdit.encoders.autoencoder import Pixels
from microdit.encoders.text import MiniLM, TextEncoder

FORK = multiprocessing.get_context("fork")
TRIALS = 20
PROCESSES = dict(zip(SIZES, (2, 8, 64), strict=True))
MOST_SECONDS = 30 * 60  # once, on one process
MOST_BYTES = 150  # of memory for each file: twice its name, and numbers, while names are sorted
FOLDER = 1000  # files of each
FEW = 37_000  # files of the smaller listing
FILL_SECONDS = 20  # in which those of the larger one are made
IN_MEMORY = Path("/dev/shm")  # where a hundred thousand files are made in seconds: listing them is Python's work, not the disk's
CAPTION = "a photograph of something, told in as many words as captions that a model has written tend to have, which is about sixty: " * 2


def rows(place: Path) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else place) as listings:
        return [_starts(place / "starts"), *_listings(Path(listings) / "listings")]


def _starts(place: Path) -> Row:
    """Start processes on one encoding at the same moment. It has few parts, so that most find a folder that others are completing."""
    records, encoder = [*scenes_source(8).parts[0].records()], MiniLM()
    source = Source("scenes", [Part(record.key, partial(iter, [record])) for record in records])
    dead = {}
    for size, processes in PROCESSES.items():
        trials = [_dead_of_trial(place / f"{size}-{number}", source, encoder, processes) for number in range(TRIALS)]
        dead[size] = f"{sum(died > 0 for died in trials)} of {TRIALS} trials of {processes}"
    shutil.rmtree(place)
    holds = all(figure.startswith("0 ") for figure in dead.values())
    return Row("encodings begun by several processes together that fail", dead, "none", holds)


def _dead_of_trial(out: Path, source: Source, encoder: TextEncoder, ranks: int) -> int:
    """Count the processes that fail; all of them, if the data set is not complete in the end."""
    barrier = FORK.Barrier(ranks)

    def encode(rank: int) -> None:
        torch.set_num_threads(1)
        barrier.wait()
        encode_source(source, out, EncodeSettings((16,), captions="ids"), Pixels(), encoder, (rank, ranks))

    processes = [FORK.Process(target=encode, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    whole = (out / "card.json").is_file() and not unfinished(out).exists()
    return sum(process.exitcode != 0 for process in processes) if whole else ranks


class Listed(NamedTuple):
    """The costs of listing a folder, and of taking over a listing: seconds, and bytes of memory at the peak."""

    seconds: float
    bytes: int
    seconds_taken_over: float
    bytes_taken_over: int


def _listings(place: Path) -> list[Row]:
    """Measure listings of FEW files, and of a tenth of the paper's, or of as many as can be created in FILL_SECONDS."""
    plain, with_list = {}, {}
    counts = [FEW, int(PICTURES * SIZES["10 x"])]
    for number in range(2):
        folder, started = place / str(number), time.perf_counter()
        count = counts[number]
        _fill(folder, count)
        counts[1] = min(counts[1], count + int(count * FILL_SECONDS / (time.perf_counter() - started)))
        plain[count] = _in_a_process(partial(_list, folder, place / "set"))
        _write_list(folder, count)
        with_list[count] = _in_a_process(partial(_list, folder, place / "set"))
        shutil.rmtree(folder)
    shutil.rmtree(place)
    return [*_rows_of("a folder of 37 M pictures", plain), *_rows_of("metadata.jsonl of 37 M lines, and its pictures", with_list)]


def _rows_of(what: str, listed: dict[int, Listed]) -> list[Row]:
    """Extrapolate: seconds per file of the larger listing, and memory per file from the difference of both."""
    (few, small), (many, large) = listed.items()
    seconds, others = large.seconds / many, large.seconds_taken_over / many
    grown, grown_others = (
        max(0.0, after - before) / (many - few)
        for before, after in ((small.bytes, large.bytes), (small.bytes_taken_over, large.bytes_taken_over))
    )

    def figures(measured: list[str], reckoned: str) -> dict[str, str]:
        return dict(zip(SIZES, [*measured, f"-> {reckoned}"], strict=True))

    both = (f"{few:,}", small), (f"{many:,}", large)
    of_lister = [f"{files}: {each.seconds:.1f} s, {each.bytes / 1e6:.0f} MB" for files, each in both]
    of_others = [f"{files}: {each.seconds_taken_over:.1f} s, {each.bytes_taken_over / 1e6:.0f} MB" for files, each in both]
    holds = seconds * PICTURES < MOST_SECONDS and grown < MOST_BYTES
    holds_others = others * PICTURES < MOST_SECONDS and grown_others < MOST_BYTES
    bar = f"{MOST_SECONDS // 60} min, {MOST_BYTES} bytes a file"
    return [
        Row(f"{what}, on the first rank", figures(of_lister, _reckoned(seconds, grown)), bar, holds),
        Row(f"{what}, on every other rank", figures(of_others, _reckoned(others, grown_others)), bar, holds_others),
    ]


def _reckoned(seconds: float, grown: float) -> str:
    return f"{seconds * PICTURES / 60:.1f} min, {grown * PICTURES / 1e9:.1f} GB ({grown:.0f} bytes a file)"


def _fill(folder: Path, count: int) -> None:
    """Create empty files: listing an image reads only its name."""
    for first in range(0, count, FOLDER):
        inside = folder / f"{first // FOLDER:08d}"
        inside.mkdir(parents=True)
        for number in range(first, min(count, first + FOLDER)):
            os.close(os.open(inside / f"{number:012d}.jpg", os.O_CREAT | os.O_WRONLY))


def _write_list(folder: Path, count: int) -> None:
    with (folder / "metadata.jsonl").open("w") as file:
        for number in range(count):
            name = f"{number // FOLDER:08d}/{number:012d}.jpg"
            file.write(json.dumps({"file_name": name, "text": f"{number} {CAPTION}"}) + "\n")


def _list(folder: Path, out: Path) -> Listed:
    """Act as the first process, which is at work when the other one starts."""
    with listed_once(out, unfinished(out), 64) as list_once:
        seconds, grown = _measured(lambda: open_source(str(folder), list_once=list_once))
        taken_over = _in_a_process(partial(_take_over, folder, out))
    shutil.rmtree(unfinished(out))
    return Listed(seconds, grown, *taken_over)


def _take_over(folder: Path, out: Path) -> tuple[float, int]:
    with listed_once(out, unfinished(out), 64) as list_once:
        return _measured(lambda: open_source(str(folder), list_once=list_once))


def _measured(work: Callable[[], object]) -> tuple[float, int]:
    """Return the seconds, and the largest growth of this process in bytes."""
    before, started = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(), time.perf_counter()
    work()
    return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _in_a_process(work: Callable[[], Any]) -> Any:
    """Return the result of `work` in a new process, whose memory is as it was before."""
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: send.send(work()))
    process.start()
    send.close()
    result = receive.recv()
    process.join()
    return result


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        for row in rows(Path(place)):
            print(row.what, *row.figures.values(), f"bar: {row.bar}", "holds" if row.holds else "FAILS", sep=" | ")


if __name__ == "__main__":
    main()
