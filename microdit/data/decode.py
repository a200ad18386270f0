"""A file's bytes to an RGB picture of a wanted size, and every way in which that can fail, in words. Knows no torch: workers import it.

Alpha is laid on white, EXIF rotations are applied, 16 bits become 8, CMYK becomes RGB, of an animation the first frame is taken.

Pictures to tensors in [-1, 1] and back.

Files to pixels in worker processes, in the order of the records, some chunks ahead of whoever takes them, across groups of records too.

A worker that dies over a file (a crash inside a decoder) costs that file, named, and nothing else.
"""

import io
import math
import multiprocessing
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from microdit.data.sources.base import Record
from microdit.errors import UserError

# Told by content, whatever a file is called. Pillow knows more: EPS starts a program, and others are no pictures of pixels, or seldom seen.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 100_000_000  # 10,000 x 10,000; beyond lie decompression bombs
BAND_PIXELS = 1_000_000  # that are laid on white at a time
EXIF_ORIENTATION = 0x0112
ON_ITS_SIDE = (5, 6, 7, 8)  # orientations in which height and width change places
DRAFT_MARGIN = 2  # a JPEG is decoded smaller as long as it stays this many times as large as what is wanted


class Rejected(Exception):  # noqa: N818
    """This picture cannot be used. `reason` is the same sentence for all pictures with the same trouble, so that it can be counted."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class ImageFile:
    """A file's picture, before it is decoded. `height` and `width` are those of the whole picture, upright. Raises Rejected."""

    def __init__(self, content: bytes):
        with _troubles_named():
            self._image = _open(content)
            self._orientation = self._image.getexif().get(EXIF_ORIENTATION, 1)
        self._on_its_side = self._orientation in ON_ITS_SIDE
        self.width, self.height = self._image.size[::-1] if self._on_its_side else self._image.size

    def decode(self, height: int | None = None, width: int | None = None) -> Image.Image:
        """The picture, RGB, 8 bits, upright. Raises Rejected.

        For what will be shrunk to `height` x `width`, a JPEG is decoded to a half, a quarter or an eighth of its size by the decoder's own
        scaling, which takes a fraction of the time. At least DRAFT_MARGIN times the wanted size is left to the antialiased resizing: the
        result is within 4 of 255 of what the whole picture would give.
        """
        with _troubles_named():
            if height and width:
                self._draft(DRAFT_MARGIN * height, DRAFT_MARGIN * width)
            self._image.load()
            return _to_rgb(ImageOps.exif_transpose(self._image) if self._orientation != 1 else self._image)

    def _draft(self, height: int, width: int) -> None:
        least = (height, width) if self._on_its_side else (width, height)
        if min(self._image.width // least[0], self._image.height // least[1]) >= 2:
            self._image.draft(None, least)


def decode(content: bytes) -> Image.Image:
    """The file's picture, RGB, 8 bits, upright. Raises Rejected."""
    return ImageFile(content).decode()


def fit(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Resize (bicubic, antialiased) until the picture just covers height x width, cut the middle: (height, width, 3)."""
    scale = max(width / image.width, height / image.height)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if covering != image.size:
        image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


@contextmanager
def _troubles_named() -> Iterator[None]:
    """Whatever Pillow raises becomes a Rejected, without the traceback: its frames hold the file, in a cycle from Python 3.12 on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, and sizes that Pillow finds suspicious: `_open` knows its own bound
            yield
    except Rejected:
        raise
    except UnidentifiedImageError as error:
        raise Rejected(f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture") from error.with_traceback(None)
    except Image.DecompressionBombError as error:  # twice as large
        raise Rejected(f"more than {MAX_PIXELS:,} pixels") from error.with_traceback(None)
    except Exception as error:  # Pillow's decoders raise whatever their format's parser stumbles over
        raise Rejected("picture is damaged") from error.with_traceback(None)


def _open(content: bytes) -> Image.Image:
    if not content:
        raise Rejected("file is empty")
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Rejected(f"more than {MAX_PIXELS:,} pixels")
    if image.format not in ("JPEG", "MPO"):
        image.load()  # others say only then how large they are, and which way up
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, in one of Pillow's several ways
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Rejected("pixels are floating-point numbers of unknown range")
    return _on_white(image) if image.has_transparency_data else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Of a picture that may be transparent, in bands of some rows: whole, it would be in memory four times."""
    rgb = Image.new("RGB", image.size)
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        rgb.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB"), (0, top))
    return rgb


AHEAD = 2  # chunks that workers decode before they are asked for
MOST_BYTES = 256_000_000  # of files in a chunk, if it has more than one; no chunk is begun beside so many
BUCKET_STEP = 64  # pixels: sides of aspect-ratio buckets are multiples of it
MAX_ASPECT = 2.0

DecodedImage = tuple[int, list[NDArray[np.uint8]]]  # bucket, pixels (H, W, 3) at every resolution


@dataclass(frozen=True)
class TargetSizes:
    """`buckets` holds, for each aspect ratio, the (height, width) at every resolution; one square without aspect-ratio buckets."""

    buckets: list[dict[int, tuple[int, int]]]
    min_side: int

    @classmethod
    def of(cls, resolutions: tuple[int, ...], min_side: int, aspect_buckets: bool, downsampling: int) -> "TargetSizes":
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
    future: Future[list[DecodedImage | str]]


@dataclass
class Chunk:
    """Records, each with its picture or the reason why there is none. `last`: the group ends with it."""

    records: list[Record]
    outcomes: list[DecodedImage | str]
    last: bool


@dataclass
class _Begun:
    pieces: list[_Piece]
    bytes: int
    last: bool


class Decoder:
    """Decodes chunks of records, in this process (`workers` 0) or in others, which live until the `with` block ends."""

    def __init__(self, wanted: TargetSizes, workers: int):
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

    def _submit(self, records: list[Record]) -> Future[list[DecodedImage | str]]:
        files = [record.image for record in records]
        future: Future[list[DecodedImage | str]] = Future()
        if not self.workers:
            future.set_result(prepare(self.wanted, files))
            return future
        self._pool = self._pool or _pool(self.workers)
        try:
            return self._pool.submit(prepare, self.wanted, files)
        except BrokenProcessPool as error:  # a worker died over an earlier piece, whose turn comes first
            future.set_exception(error)
            return future

    def _result(self, pieces: list[_Piece], waiting: Iterable[_Begun]) -> list[DecodedImage | str]:
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

    def _one_by_one(self, records: list[Record]) -> list[DecodedImage | str]:
        """After a crash: each record in a process that may die of it."""
        outcomes: list[DecodedImage | str] = []
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


def prepare(wanted: TargetSizes, files: list[bytes]) -> list[DecodedImage | str]:
    """Each file's pixels at every resolution, or why there are none."""
    return [_prepare_one(wanted, content) for content in files]


def _prepare_one(wanted: TargetSizes, content: bytes) -> DecodedImage | str:
    try:
        file = ImageFile(content)
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
