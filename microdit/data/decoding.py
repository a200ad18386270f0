"""Files to pixels in worker processes, in the order of the records, some chunks ahead of whoever takes them, across groups of records too.

A worker that dies over a file (a crash inside a decoder) costs that file, named, and nothing else.
"""

import math
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from typing import Self

import numpy as np
from numpy.typing import NDArray

from microdit.data.images import PictureFile, Rejected, fit
from microdit.data.sources import Record
from microdit.errors import UserError

AHEAD = 2  # chunks that workers decode before they are asked for
MOST_BYTES = 256_000_000  # of files in a chunk, if it has more than one; no chunk is begun beside so many
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


@dataclass
class _Piece:
    """Records that one worker decodes at a time, a share of a chunk."""

    records: list[Record]
    future: Future[list[Picture | str]]


@dataclass
class Chunk:
    """Records, each with its picture or the reason why there is none. `last`: the group ends with it."""

    records: list[Record]
    outcomes: list[Picture | str]
    last: bool


@dataclass
class _Begun:
    pieces: list[_Piece]
    bytes: int
    last: bool


class Decoder:
    """Decodes chunks of records, in this process (`workers` 0) or in others, which live until the `with` block ends."""

    def __init__(self, wanted: Wanted, workers: int):
        self.wanted, self.workers = wanted, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def chunks(self, groups: Iterable[Iterable[Record]], size: int) -> Iterator[Chunk]:
        """Chunks of `size` records, or of fewer where their files are large. No chunk holds records of two groups; the last one of a group
        may be empty. An error that a group raises comes behind all chunks before it.
        """
        chunks, waiting, failure = _chunked(groups, size), deque[_Begun](), None
        more = True
        while more or waiting:
            while more and len(waiting) <= (AHEAD if self.workers else 0) and sum(begun.bytes for begun in waiting) < MOST_BYTES:
                try:
                    waiting.append(self._begin(*next(chunks)))
                except StopIteration:
                    more = False
                except Exception as error:
                    more, failure = False, error
            if waiting:
                begun = waiting.popleft()
                pieces = begun.pieces
                outcomes = [outcome for number in range(len(pieces)) for outcome in self._result(pieces[number:], waiting)]
                yield Chunk([record for piece in pieces for record in piece.records], outcomes, begun.last)
        if failure is not None:
            raise failure

    def _begin(self, records: list[Record], last: bool) -> _Begun:
        """All workers have a share in a chunk."""
        share = max(1, math.ceil(len(records) / max(1, self.workers)))
        pieces = [_Piece(part, self._submit(part)) for first in range(0, len(records), share) if (part := records[first : first + share])]
        return _Begun(pieces, sum(len(record.image) for record in records), last)

    def _submit(self, records: list[Record]) -> Future[list[Picture | str]]:
        files = [record.image for record in records]
        future: Future[list[Picture | str]] = Future()
        if not self.workers:
            future.set_result(prepare(self.wanted, files))
            return future
        self._pool = self._pool or _pool(self.workers)
        try:
            return self._pool.submit(prepare, self.wanted, files)
        except BrokenProcessPool as error:  # a worker died over an earlier piece, whose turn comes first
            future.set_exception(error)
            return future

    def _result(self, pieces: list[_Piece], waiting: Iterable[_Begun]) -> list[Picture | str]:
        """Of the first piece. When a worker died, what comes behind begins anew, in other workers."""
        try:
            return pieces[0].future.result()
        except BrokenProcessPool:
            outcome = self._one_by_one(pieces[0].records)
            if self._pool is not None:
                self._pool.shutdown(wait=False)
            self._pool = None
            for piece in chain(pieces[1:], *(begun.pieces for begun in waiting)):
                piece.future = self._submit(piece.records)
            return outcome

    def _one_by_one(self, records: list[Record]) -> list[Picture | str]:
        """After a crash: each record in a process that may die of it."""
        outcomes: list[Picture | str] = []
        for record in records:
            with _pool(1) as pool:
                try:
                    outcomes += pool.submit(prepare, self.wanted, [record.image]).result()
                except BrokenProcessPool:
                    outcomes.append("decoder crashed")
        return outcomes


def _chunked(groups: Iterable[Iterable[Record]], size: int) -> Iterator[tuple[list[Record], bool]]:
    """Chunks, and whether their group ends with them."""
    for group in groups:
        chunk: list[Record] = []
        held = 0
        for record in group:
            if chunk and held + len(record.image) > MOST_BYTES:
                yield chunk, False
                chunk, held = [], 0
            chunk.append(record)
            held += len(record.image)
            if len(chunk) == size:
                yield chunk, False
                chunk, held = [], 0
        yield chunk, True


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not forked: a process with running threads, as torch's, must not be.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def prepare(wanted: Wanted, files: list[bytes]) -> list[Picture | str]:
    """Each file's pixels at every resolution, or why there are none."""
    return [_prepare_one(wanted, content) for content in files]


def _prepare_one(wanted: Wanted, content: bytes) -> Picture | str:
    try:
        file = PictureFile(content)
        bucket = wanted.bucket_of(file.height, file.width)
        shapes = wanted.buckets[bucket].values()
        image = file.decode(max(height for height, _ in shapes), max(width for _, width in shapes))
    except Rejected as verdict:
        return verdict.reason
    if min(file.height, file.width) < wanted.min_side:
        return f"a side is shorter than {wanted.min_side} pixels"
    return bucket, [fit(image, height, width) for height, width in shapes]


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
