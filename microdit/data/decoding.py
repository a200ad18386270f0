"""Files to pixels in worker processes, in the order of the records, a few chunks ahead of whoever takes them.

A worker that dies over a file (a crash inside a decoder) costs that file, named, and nothing else.
"""

import math
import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from microdit.data.images import Rejected, decode, fit
from microdit.data.sources import Record
from microdit.errors import UserError

AHEAD = 2  # chunks a worker has waiting
BUCKET_STEP = 64  # pixels: sides of aspect-ratio buckets are multiples of it
MAX_ASPECT = 2.0

Picture = tuple[int, list[NDArray[np.uint8]]]  # bucket, pixels (H, W, 3) at every resolution


@dataclass(frozen=True)
class Wanted:
    """`buckets` holds, for each aspect ratio, the (height, width) at every resolution; one square without aspect-ratio buckets."""

    buckets: list[dict[int, tuple[int, int]]]
    min_side: int

    @classmethod
    def of(cls, resolutions: tuple[int, ...], min_side: int, aspect_buckets: bool, downsampling: int) -> "Wanted":
        """Raises UserError for a resolution that the autoencoder cannot take."""
        for resolution in resolutions:
            if resolution % downsampling:
                raise UserError(
                    f"--resolutions {resolution} must be a multiple of {downsampling}, the pixels a latent of this autoencoder."
                )
        if not aspect_buckets:
            return cls([{resolution: (resolution, resolution) for resolution in resolutions}], min_side)
        return cls(_aspect_buckets(resolutions), min_side)

    def bucket_of(self, height: int, width: int) -> int:
        """The bucket whose aspect ratio is nearest, on the scale of ratios."""
        largest = max(self.buckets[0])
        return min(
            range(len(self.buckets)),
            key=lambda b: abs(math.log(self.buckets[b][largest][0] / self.buckets[b][largest][1]) - math.log(height / width)),
        )


class Decoder:
    """Decodes chunks of records, in this process (`workers` 0) or in others."""

    def __init__(self, wanted: Wanted, workers: int):
        self.wanted, self.workers = wanted, workers

    def chunks(self, records: Iterator[Record], size: int) -> Iterator[tuple[list[Record], list[Picture | str]]]:
        """Chunks of `size` records, each with its picture or the reason why there is none."""
        if self.workers == 0:
            while chunk := list(islice(records, size)):
                yield chunk, prepare(self.wanted, [record.image for record in chunk])
            return
        small = max(1, size // self.workers)  # so that all workers have a share in the first chunk
        pool = self._pool()
        waiting: deque[tuple[list[Record], Future[list[Picture | str]]]] = deque()
        try:
            done: tuple[list[Record], list[Picture | str]] = ([], [])
            while True:
                while len(waiting) < AHEAD * self.workers and (chunk := list(islice(records, small))):
                    waiting.append((chunk, pool.submit(prepare, self.wanted, [record.image for record in chunk])))
                if not waiting:
                    break
                chunk, future = waiting.popleft()
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    outcome = self._one_by_one(chunk)
                    pool.shutdown(wait=False)
                    pool = self._pool()
                    waiting = deque((c, pool.submit(prepare, self.wanted, [record.image for record in c])) for c, _ in waiting)
                done[0].extend(chunk)
                done[1].extend(outcome)
                if len(done[0]) >= size:
                    yield done[0][:size], done[1][:size]
                    done = (done[0][size:], done[1][size:])
            if done[0]:
                yield done
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _one_by_one(self, records: list[Record]) -> list[Picture | str]:
        """After a crash: each record in a process that may die of it."""
        outcomes: list[Picture | str] = []
        for record in records:
            with self._pool(1) as pool:
                try:
                    outcomes += pool.submit(prepare, self.wanted, [record.image]).result()
                except BrokenProcessPool:
                    outcomes.append("decoder crashed")
        return outcomes

    def _pool(self, workers: int | None = None) -> ProcessPoolExecutor:
        # Not forked: a process with running threads, as torch's, must not be.
        return ProcessPoolExecutor(workers or self.workers, mp_context=multiprocessing.get_context("spawn"))


def prepare(wanted: Wanted, files: list[bytes]) -> list[Picture | str]:
    """Each file's pixels at every resolution, or why there are none."""
    return [_prepare_one(wanted, content) for content in files]


def _prepare_one(wanted: Wanted, content: bytes) -> Picture | str:
    try:
        image = decode(content)
    except Rejected as verdict:
        return verdict.reason
    if min(image.size) < wanted.min_side:
        return f"a side is shorter than {wanted.min_side} pixels"
    bucket = wanted.bucket_of(image.height, image.width)
    return bucket, [fit(image, height, width) for height, width in wanted.buckets[bucket].values()]


def _aspect_buckets(resolutions: tuple[int, ...]) -> list[dict[int, tuple[int, int]]]:
    """Shapes of about resolution**2 pixels with sides that are multiples of 64, up to 2:1 either way.

    The smallest resolution decides which ratios there are; at the others the same bucket has the nearest such shape.
    """
    least = min(resolutions)
    shapes = set()
    for side in range(BUCKET_STEP, 2 * least, BUCKET_STEP):
        other = max(BUCKET_STEP, round(least**2 / side / BUCKET_STEP) * BUCKET_STEP)
        if max(side / other, other / side) <= MAX_ASPECT:
            shapes |= {(side, other), (other, side)}
    return [
        {resolution: (_scaled(h, resolution / least), _scaled(w, resolution / least)) for resolution in resolutions}
        for h, w in sorted(shapes)
    ]


def _scaled(side: int, factor: float) -> int:
    return max(BUCKET_STEP, round(side * factor / BUCKET_STEP) * BUCKET_STEP)
