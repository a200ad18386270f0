"""Decode image files to RGB pixels of the requested sizes, in worker processes.

Transparent images are composited on white, orientations are applied, colour profiles are converted to sRGB, 16 bits are reduced to 8, and
the first frame of an animation is taken. An image that cannot be used is rejected with a reason. Workers decode in the order of the
records, a few chunks ahead of the consumer. If a worker crashes inside a decoder, only the file that caused the crash is lost, and it is
named.

This module does not import torch, so that workers start fast and stay small.
"""

import importlib
import io
import math
import multiprocessing
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from microdit.data.colours import Stored, to_srgb, without_metadata
from microdit.data.sources.base import Record
from microdit.data.sources.svg import is_svg, read_svg, render_svg
from microdit.data.sources.untrusted_files import CAN_DRAW, Refused
from microdit.errors import UserError

# Recognised by content, not by file name. Pillow knows more formats, but EPS starts a program, and others are vector formats or rare. TGA
# is tried last, since it is recognised by a few plausible numbers only.
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "PCX", "SGI", "HEIF", "JXL", "TGA")
MAX_PIXELS = 100_000_000  # 10,000 x 10,000; anything larger may be a decompression bomb
MAX_ELONGATION = 100  # longer side / shorter side; resized to cover a square, a thinner picture would take any amount of memory
MAX_SCANS = 100  # of a JPEG, each of which passes over all pixels; encoders write about 10, and libtiff has the same limit
EXIF_ORIENTATION = 0x0112
ON_ITS_SIDE = (5, 6, 7, 8)  # orientations that swap height and width
NOMINAL_SIDE = 512  # pixels; the shorter side of a drawing where nothing else is asked for
LARGEST_RENDERED = 1024  # pixels; the longer side of a rendered drawing, which may take seconds, is larger only after resizing
DRAFT_MARGIN = 2  # a JPEG is decoded at a reduced size as long as that is at least this many times the requested size

AHEAD = 2  # chunks that workers decode before they are requested
MOST_BYTES = 256_000_000  # of the files in a chunk of more than one record; no chunk is started while so many are waiting
BUCKET_STEPS = (64, 32, 16)  # pixels; the sides of aspect-ratio buckets are multiples of the first step that allows more than squares
MAX_ASPECT = 2.0


def _formats() -> tuple[str, ...]:
    """Return the wanted formats that Pillow and its installed plugins read."""
    Image.init()
    for name, register in (("pillow_heif", "register_heif_opener"), ("pillow_jxl", "")):
        try:
            plugin = importlib.import_module(name)
        except ImportError:
            continue
        if register:
            getattr(plugin, register)()
    return tuple(name for name in _WANTED if name in Image.OPEN)


FORMATS = _formats()

DecodedImage = tuple[int, list[NDArray[np.uint8]]]  # bucket, pixels (H, W, 3) at every resolution


class Rejected(Exception):  # noqa: N818
    """Raised for an image that cannot be used. Equal problems have the same `reason`, so that they can be counted."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class ImageFile:
    """An image file before decoding. `height` and `width` are those of the full image, upright. Raises Rejected.

    A drawing has no pixels of its own: `is_drawing` says so, and its nominal size is NOMINAL_SIDE.
    """

    def __init__(self, content: bytes):
        self.is_drawing = CAN_DRAW and is_svg(content)
        with _as_rejected(content):
            if self.is_drawing:
                self._body, self._view = read_svg(content)
                scale = NOMINAL_SIDE / min(self._view.width, self._view.height)
                self.width, self.height = round(self._view.width * scale), round(self._view.height * scale)
                return
            self._stored = without_metadata(content)
            self._image = _open(self._stored.content)
            self._orientation = self._image.getexif().get(EXIF_ORIENTATION, 1)
        self._on_its_side = self._orientation in ON_ITS_SIDE
        self.width, self.height = self._image.size[::-1] if self._on_its_side else self._image.size

    def decode(self, height: int | None = None, width: int | None = None) -> Image.Image:
        """Decode the image to 8-bit RGB, upright. Raises Rejected.

        If the image will be shrunk to `height` x `width`, the decoder scales a JPEG to a half, a quarter or an eighth of its size, in a
        fraction of the time. The antialiased resizing still starts from at least DRAFT_MARGIN times the requested size, so the result is
        within 4 of 255 of what the full image would give. A drawing is rendered at the requested size, up to LARGEST_RENDERED.
        """
        with _as_rejected():
            if self.is_drawing:
                return self._draw(height or self.height, width or self.width)
            if height and width:
                self._draft(DRAFT_MARGIN * height, DRAFT_MARGIN * width)
            self._image.load()
            image = ImageOps.exif_transpose(self._image) if self._orientation != 1 else self._image
            if image.mode == "F" or (image.mode == "I" and self._image.format != "PPM"):
                raise Rejected(f"pixels are {'floating-point' if image.mode == 'F' else '32-bit'} numbers of unknown range")
            return to_srgb(image, self._stored)

    def _draw(self, height: int, width: int) -> Image.Image:
        """Render a drawing so that it just covers height x width. It is rendered as a square, from which its own shape is cut."""
        scale = max(height / self.height, width / self.width)
        scale = min(scale, LARGEST_RENDERED / max(self.height, self.width))
        rows, columns = max(1, round(self.height * scale)), max(1, round(self.width * scale))
        side = max(rows, columns)
        png = render_svg(self._body, self._view, side)
        left, top = (side - columns) // 2, (side - rows) // 2
        image = Image.open(io.BytesIO(png), formats=["PNG"]).crop((left, top, left + columns, top + rows))
        return to_srgb(image, Stored(png))

    def _draft(self, height: int, width: int) -> None:
        least = (height, width) if self._on_its_side else (width, height)
        if min(self._image.width // least[0], self._image.height // least[1]) >= 2:
            self._image.draft(None, least)


def decode(content: bytes) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright. Raises Rejected."""
    return ImageFile(content).decode()


def fit(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Resize the image (bicubic, antialiased) until it just covers height x width, and crop its centre: (height, width, 3)."""
    scale = max(width / image.width, height / image.height)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if covering != image.size:
        image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


@dataclass(frozen=True)
class TargetSizes:
    """The sizes to which images are decoded.

    Each bucket holds the (height, width) of one aspect ratio at every resolution. Without aspect-ratio buckets there is one, of squares.
    Images with a side shorter than `min_side` pixels are rejected.
    """

    buckets: list[dict[int, tuple[int, int]]]
    min_side: int

    @classmethod
    def of(cls, resolutions: tuple[int, ...], min_side: int, aspect_buckets: bool, downsampling: int) -> "TargetSizes":
        """Choose the sizes for these resolutions.

        Raises UserError if one is no multiple of the autoencoder's `downsampling`, or if aspect ratios cannot be kept at such sizes.
        """
        for resolution in resolutions:
            if resolution % downsampling:
                raise UserError(
                    f"--resolutions {resolution} must be a multiple of {downsampling}, the number of pixels per latent of this autoencoder."
                )
        if not aspect_buckets:
            return cls([{resolution: (resolution, resolution) for resolution in resolutions}], min_side)
        steps = [step for step in BUCKET_STEPS if step % (2 * downsampling) == 0 or step == BUCKET_STEPS[0]]  # models join 2 x 2 latents
        for step in steps:
            buckets = _aspect_buckets(resolutions, step)
            if len(buckets) > 1:
                return cls(buckets, min_side)
        raise UserError(
            f"--buckets keeps no aspect ratio at --resolutions {min(resolutions)}: sides in steps of {steps[-1]} pixels, the smallest for "
            "this autoencoder, allow squares only. Use a larger resolution, or leave out --buckets."
        )

    def bucket_of(self, height: int, width: int) -> int:
        """Return the bucket whose aspect ratio is nearest on a logarithmic scale."""
        largest = max(self.buckets[0])
        return min(
            range(len(self.buckets)),
            key=lambda b: abs(math.log(self.buckets[b][largest][0] / self.buckets[b][largest][1]) - math.log(height / width)),
        )


@dataclass
class _Piece:
    """The share of a chunk that one worker decodes at a time."""

    records: list[Record]
    future: Future[list[DecodedImage | str]]


@dataclass
class Chunk:
    """Records, each with its image or the reason why there is none. `last` is True for the last chunk of a group."""

    records: list[Record]
    outcomes: list[DecodedImage | str]
    last: bool


@dataclass
class _StartedChunk:
    pieces: list[_Piece]
    bytes: int
    last: bool


class Decoder:
    """Decodes records in chunks, in this process (`workers` 0) or in others, which live until the `with` block ends."""

    def __init__(self, sizes: TargetSizes, workers: int):
        self.sizes, self.workers = sizes, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def chunks(self, groups: Iterable[Iterable[Record]], size: int) -> Iterator[Chunk]:
        """Yield chunks of `size` records, or of fewer where their files are large.

        No chunk holds records of two groups; the last chunk of a group may be empty. An error that a group raises is raised after all
        chunks before it.
        """
        chunks, waiting, failure = _chunked(groups, size), deque[_StartedChunk](), None
        more = True
        while more or waiting:
            while more and len(waiting) <= (AHEAD if self.workers else 0) and sum(started.bytes for started in waiting) < MOST_BYTES:
                try:
                    waiting.append(self._start(*next(chunks)))
                except StopIteration:
                    more = False
                except Exception as error:
                    more, failure = False, error
            if waiting:
                started = waiting.popleft()
                pieces = started.pieces
                outcomes = [outcome for number in range(len(pieces)) for outcome in self._result(pieces[number:], waiting)]
                yield Chunk([record for piece in pieces for record in piece.records], outcomes, started.last)
        if failure is not None:
            raise failure

    def _start(self, records: list[Record], last: bool) -> _StartedChunk:
        """Start decoding a chunk, of which every worker gets a share."""
        share = max(1, math.ceil(len(records) / max(1, self.workers)))
        pieces = [_Piece(part, self._submit(part)) for first in range(0, len(records), share) if (part := records[first : first + share])]
        return _StartedChunk(pieces, sum(len(record.image) for record in records), last)

    def _submit(self, records: list[Record]) -> Future[list[DecodedImage | str]]:
        files = [record.image for record in records]
        future: Future[list[DecodedImage | str]] = Future()
        if not self.workers:
            future.set_result(prepare(self.sizes, files))
            return future
        self._pool = self._pool or _pool(self.workers)
        try:
            return self._pool.submit(prepare, self.sizes, files)
        except BrokenProcessPool as error:  # a worker crashed on an earlier piece, which is handled first
            future.set_exception(error)
            return future

    def _result(self, pieces: list[_Piece], waiting: Iterable[_StartedChunk]) -> list[DecodedImage | str]:
        """Return the outcomes of the first piece. If a worker has crashed, everything behind it is started again in new workers."""
        try:
            return pieces[0].future.result()
        except BrokenProcessPool:
            outcome = self._one_by_one(pieces[0].records)
            if self._pool is not None:
                self._pool.shutdown(wait=False)
            self._pool = None
            for piece in chain(pieces[1:], *(started.pieces for started in waiting)):
                piece.future = self._submit(piece.records)
            return outcome

    def _one_by_one(self, records: list[Record]) -> list[DecodedImage | str]:
        """Decode each record in a process of its own, after a crash."""
        outcomes: list[DecodedImage | str] = []
        for record in records:
            with _pool(1) as pool:
                try:
                    outcomes += pool.submit(prepare, self.sizes, [record.image]).result()
                except BrokenProcessPool:
                    outcomes.append("decoder crashed")
        return outcomes


def prepare(sizes: TargetSizes, files: list[bytes]) -> list[DecodedImage | str]:
    """Decode each file at every resolution. Returns the reason instead for files that cannot be used."""
    return [_prepare_one(sizes, content) for content in files]


def _chunked(groups: Iterable[Iterable[Record]], size: int) -> Iterator[tuple[list[Record], bool]]:
    """Yield chunks, and whether each is the last of its group."""
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
    # Spawned, because a process with running threads, such as those of torch, must not be forked.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _prepare_one(sizes: TargetSizes, content: bytes) -> DecodedImage | str:
    try:
        file = ImageFile(content)
        bucket = sizes.bucket_of(file.height, file.width)
        shapes = sizes.buckets[bucket].values()
        image = file.decode(max(height for height, _ in shapes), max(width for _, width in shapes))
        if not file.is_drawing and min(file.height, file.width) < sizes.min_side:
            return f"a side is shorter than {sizes.min_side} pixels"
        with _as_rejected():
            return bucket, [fit(image, height, width) for height, width in shapes]
    except Rejected as rejected:
        return rejected.reason


def _aspect_buckets(resolutions: tuple[int, ...], step: int) -> list[dict[int, tuple[int, int]]]:
    """Return shapes of about resolution**2 pixels whose sides are multiples of `step`, with aspect ratios of up to 2:1 either way.

    The smallest resolution determines the ratios; at the others, each bucket has the nearest such shape.
    """
    least = min(resolutions)
    shapes = set()
    for side in range(step, 2 * least, step):
        other = max(step, round(least**2 / side / step) * step)
        if max(side / other, other / side) <= MAX_ASPECT:
            shapes |= {(side, other), (other, side)}
    return [
        {resolution: (_scaled(h, resolution / least, step), _scaled(w, resolution / least, step)) for resolution in resolutions}
        for h, w in sorted(shapes)
    ]


def _scaled(side: int, factor: float, step: int) -> int:
    return max(step, round(side * factor / step) * step)


@contextmanager
def _as_rejected(content: bytes = b"") -> Iterator[None]:
    """Turn whatever Pillow raises into Rejected. `content` tells what a file is that is not opened.

    The traceback is dropped: its frames keep the file in memory, in a reference cycle from Python 3.12 on.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of large sizes, for which `_open` has its own limit
            yield
    except Rejected:
        raise
    except UnidentifiedImageError as error:
        raise Rejected(_unknown(content)) from error.with_traceback(None)
    except Refused as refused:  # a drawing
        raise Rejected(refused.reason) from None
    except Image.DecompressionBombError as error:  # raised at twice Pillow's own limit
        raise Rejected(f"more than {MAX_PIXELS:,} pixels") from error.with_traceback(None)
    except MemoryError as error:
        raise Rejected("picture needs more memory than there is") from error.with_traceback(None)
    except Exception as error:  # Pillow's decoders raise exceptions of many types
        raise Rejected("picture is damaged") from error.with_traceback(None)


def _unknown(content: bytes) -> str:
    """Return what a file is that has none of the formats."""
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        return "HEIC picture, which needs pip install 'microdit[heif]'"
    if is_svg(content):
        return "SVG drawing, which needs pip install 'microdit[svg]'"
    if content.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL picture, which needs pip install pillow-jxl-plugin"
    return "no picture of a kind that is read"


def _open(content: bytes) -> Image.Image:
    if not content:
        raise Rejected("file is empty")
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    _check_size(*image.size)
    if image.format in ("JPEG", "MPO"):
        _check_scans(content)
    else:
        image.load()  # for other formats, only this tells the size and the orientation
        _check_size(*image.size)
    return image


def _check_size(width: int, height: int) -> None:
    """Raise Rejected for an image that is too thin to be resized, or has too many pixels."""
    if max(width, height) > MAX_ELONGATION * min(width, height):
        raise Rejected(f"one side is more than {MAX_ELONGATION} times the other")
    if width * height > MAX_PIXELS:
        raise Rejected(f"more than {MAX_PIXELS:,} pixels")


def _check_scans(content: bytes) -> None:
    """Raise Rejected for a JPEG of more than MAX_SCANS scans: a few bytes each, they can keep a decoder busy for minutes."""
    # Metadata may hold the marker by chance, so only where it is frequent are the segments followed.
    if content.count(_START_OF_SCAN) > MAX_SCANS and next(islice(_scans(content), MAX_SCANS, None), None) is not None:
        raise Rejected(f"JPEG has more than {MAX_SCANS} scans")


def _scans(content: bytes) -> Iterator[int]:
    """Yield where each scan of a JPEG begins, up to the end of the image (ITU-T T.81, annex B)."""
    place = 2  # behind the start of the image
    while (found := _MARKER.search(content, place)) and found[0] != _END_OF_IMAGE:
        if found[0] == _START_OF_SCAN:
            yield found.start()
        place = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")  # the segment's length includes itself


_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]", re.DOTALL)  # 00 is a byte 255 of data; the others have no segment
