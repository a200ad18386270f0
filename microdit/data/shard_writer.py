"""Encode chunks of records with the frozen encoders, and write the results to shards in a thread of its own.

`BatchEncoder` never waits for a GPU: pixels are copied as bytes from pinned memory and converted there, and results are copied back to
pinned memory while the next chunk is queued. Only `EncodedChunk.wait`, which the writing thread calls, waits. A batch that does not fit the
GPU's memory is halved. Encoding continues while `ShardsThread` packs, writes and checksums earlier chunks.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from microdit.data.decode import DecodedImage
from microdit.data.latent_statistics import LatentSums
from microdit.data.packing import CaptionPacking, LatentPacking, pack_features, pack_ids, pack_latents, pack_text
from microdit.data.pixels import normalise
from microdit.data.shards import EncodedRow, ShardWriter, checksums_of
from microdit.data.sources.base import Record
from microdit.data.stored_pictures import QUALITY
from microdit.encoders.autoencoder import Autoencoder
from microdit.encoders.text import TextEncoder
from microdit.encoders.vision import VisionEncoder
from microdit.errors import UserError
from microdit.io.files import aside_of, sha256_of, to_checked_json, write_aside

AHEAD = 2  # chunks that may wait to be written before encoding waits for them

R = TypeVar("R")


@dataclass(frozen=True)
class EncodedChunk:
    """Records with their encoded images and captions, batch by batch, which are complete on the CPU only after `wait`.

    `ids` holds the token ids of all captions, in the order of the records. `text` holds float32 batches with the numbers of their captions,
    and `latents` and `features` float32 batches with the numbers of their records and their resolution. With the packing `ids`, `text` is
    empty, and so is `features` without a vision encoder.
    """

    records: list[Record]
    buckets: list[int]
    ids: list[list[int]]
    text: list[tuple[list[int], Tensor]]
    latents: list[tuple[list[int], int, Tensor]]
    arrived: torch.cuda.Event | None
    features: list[tuple[list[int], int, Tensor]] = field(default_factory=list)

    def wait(self) -> None:
        """Wait until all results have been copied from the GPU."""
        if self.arrived is not None:
            self.arrived.synchronize()


class BatchEncoder:
    """Encodes images and captions in batches of `batch_size`, or of fewer once that many do not fit, which `warn` reports.

    The encoders must already be on `device`.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        device: torch.device,
        captions: CaptionPacking,
        batch_size: int,
        warn: Callable[[str], None],
        vision: VisionEncoder | None = None,
    ):
        self.autoencoder, self.text_encoder, self.device, self.captions, self.warn = autoencoder, text_encoder, device, captions, warn
        self.vision = vision
        self._sizes = {"images": batch_size, "captions": batch_size}

    def encode(self, records: list[Record], images: list[DecodedImage], resolutions: tuple[int, ...]) -> EncodedChunk:
        """Encode records. `images` holds each record's bucket and its pixels at every resolution, (H, W, 3)."""
        ids = self.text_encoder.tokenize([caption for record in records for caption in record.captions.values()])
        text = [] if self.captions == "ids" else list(self._text(ids))
        encoded = list(self._images(images, resolutions))
        latents = [(numbers, resolution, latents_BCHW) for numbers, resolution, latents_BCHW, _ in encoded]
        features = [(numbers, resolution, found) for numbers, resolution, _, found in encoded if found is not None]
        arrived = None
        if self.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self.device))
        return EncodedChunk(records, [bucket for bucket, _ in images], ids, text, latents, arrived, features)

    def _text(self, ids: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """Embed the captions, in batches of similar length."""
        by_length = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        return self._batches("captions", by_length, lambda batch: self._back(self._embed([ids[number] for number in batch])))

    @torch.no_grad()
    def _embed(self, ids: list[list[int]]) -> Tensor:
        return self.text_encoder.embed_full(ids) if self.captions == "full" else self.text_encoder.embed(ids)[0]

    def _images(self, images: list[DecodedImage], resolutions: tuple[int, ...]) -> Iterator[tuple[list[int], int, Tensor, Tensor | None]]:
        """Yield latents and features (None without a vision encoder) of the images, in batches of one bucket."""
        by_bucket: dict[int, list[int]] = {}
        for number, (bucket, _) in enumerate(images):
            by_bucket.setdefault(bucket, []).append(number)

        def encode(batch: list[int]) -> list[tuple[Tensor, Tensor | None]]:
            stacks = ([images[number][1][which] for number in batch] for which in range(len(resolutions)))
            return [self._encode(self._pixels(stack)) for stack in stacks]

        for numbers in by_bucket.values():
            for batch, encoded in self._batches("images", numbers, encode):
                for resolution, (latents_BCHW, features_BEYX) in zip(resolutions, encoded, strict=True):
                    yield batch, resolution, latents_BCHW, features_BEYX

    def _encode(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        latents_BCHW = self._back(self.autoencoder.encode(images_BCHW))
        return latents_BCHW, None if self.vision is None else self._back(self.vision.encode(images_BCHW))

    def _pixels(self, pixels: list[NDArray[np.uint8]]) -> Tensor:
        pixels_BHWC = torch.empty((len(pixels), *pixels[0].shape), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        np.stack(pixels, out=pixels_BHWC.numpy())
        return normalise(pixels_BHWC.to(self.device, non_blocking=True))

    def _back(self, tensor: Tensor) -> Tensor:
        return tensor.float().to("cpu", non_blocking=self.device.type == "cuda")  # into pinned memory

    def _batches(self, what: str, numbers: list[int], encode: Callable[[list[int]], R]) -> Iterator[tuple[list[int], R]]:
        """Yield batches of numbers with the results of `encode`, halving the batch size until they fit.

        Raises UserError if not even a single item fits.
        """
        first, refused = 0, False
        while first < len(numbers):
            batch = numbers[first : first + self._sizes[what]]
            try:
                result = encode(batch)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise UserError(self._too_small(what, error)) from error
                self._sizes[what], refused = len(batch) // 2, True
            else:
                if refused:
                    refused = False
                    self.warn(f"The GPU's memory holds fewer {what} at a time: {self._sizes[what]} from here on.")
                yield batch, result
                first += len(batch)
                continue
            torch.cuda.empty_cache()  # outside of `except`, because the exception keeps the tensors alive

    def _too_small(self, what: str, error: torch.OutOfMemoryError) -> str:
        dtype = str(self.autoencoder.dtype if what == "images" else self.text_encoder.dtype).removeprefix("torch.")
        return (
            f"The GPU's memory does not hold the encoders with one of the {what} in {dtype} ({str(error).splitlines()[0][:160]}): use "
            "--dtype bfloat16 (half of float32), smaller --resolutions, or --device cpu."
        )


@dataclass
class PartInWork:
    """A part of the source that becomes shard `number`: its rejected records, and its counts of captions and tokens.

    `fingerprint` is that of the part when reading began. `passed_over` counts the files in it that are neither images nor captions.
    `latents` holds sums of the latents by resolution, to which the writing thread adds.
    """

    number: int
    name: str
    fingerprint: str = ""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    passed_over: Mapping[str, int] = field(default_factory=dict)
    latents: dict[int, LatentSums] = field(default_factory=dict)


@dataclass(frozen=True)
class Packer:
    """Packs encoded chunks into rows of a shard."""

    resolutions: tuple[int, ...]
    latents: LatentPacking
    captions: CaptionPacking
    caption_weights: dict[str, float]
    features: bool = False
    quality: int = QUALITY

    def rows(self, chunk: EncodedChunk) -> Iterator[EncodedRow]:
        """Yield the rows of a chunk. Raises UserError if any number is not finite."""
        chunk.wait()
        texts, count = iter(self._pack_text(chunk)), len(chunk.records)
        latents = _pack_images(chunk.latents, count, "latents", lambda latents_CHW: pack_latents(latents_CHW, self.latents, self.quality))
        features = _pack_images(chunk.features, count, "features", pack_features)
        for record, bucket, *blobs in zip(chunk.records, chunk.buckets, latents, features, strict=True):
            weights = [self.caption_weights[name] for name in record.captions]
            captions = list(record.captions.values())
            yield EncodedRow(record.key, bucket, captions, weights, [next(texts) for _ in captions], *blobs)

    def _pack_text(self, chunk: EncodedChunk) -> list[bytes]:
        if self.captions == "ids":
            return [pack_ids(tokens) for tokens in chunk.ids]
        blobs = [b""] * len(chunk.ids)
        for numbers, text_BLE in chunk.text:
            for number, text_LE in zip(numbers, _finite(text_BLE.numpy(), "caption vectors"), strict=True):
                length = len(text_LE) if self.captions == "full" else len(chunk.ids[number])
                blobs[number] = pack_text(text_LE[:length], self.captions)
        return blobs


def _pack_images(
    batches: list[tuple[list[int], int, Tensor]], count: int, what: str, pack: Callable[[NDArray[np.float32]], bytes]
) -> list[dict[int, bytes]]:
    """Return the packed latents or features of `count` records, by resolution."""
    blobs: list[dict[int, bytes]] = [{} for _ in range(count)]
    for numbers, resolution, tensors in batches:
        for number, one in zip(numbers, _finite(tensors.numpy(), what), strict=True):
            blobs[number][resolution] = pack(one)
    return blobs


def _finite(numbers: NDArray[np.float32], what: str) -> NDArray[np.float32]:
    if not np.isfinite(numbers).all():
        raise UserError(f"Encoding gave {what} that are not finite: the encoder overflows in this dtype; use --dtype float32.")
    return numbers


class ShardsThread:
    """Packs and writes chunks in a thread, in the order in which they are `put`. A shard is complete once its entry is written.

    Errors of the thread are raised by a later `put`, or at the end of the `with` block; later shards are not written. The thread calls
    `on_written` with the numbers of records and parts that it has completed.
    """

    def __init__(self, folder: Path, packer: Packer, on_written: Callable[[int, int], None]):
        self.folder, self.packer, self.on_written = folder, packer, on_written
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._waiting: deque[Future[None]] = deque()
        self._writer: ShardWriter | None = None
        self._failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish what was put before, unless there was an error, and remove an incomplete shard."""
        try:
            while kind is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._thread.shutdown()
            if self._writer is not None:
                self._writer.abandon()

    def put(self, part: PartInWork, chunk: EncodedChunk, seen: int, last: bool) -> None:
        """Hand over a chunk, which accounts for `seen` records of its part. `last` is True for the last chunk of the part."""
        self._waiting.append(self._thread.submit(self._write, part, chunk, seen, last))
        while len(self._waiting) > AHEAD:
            self._waiting.popleft().result()

    def _write(self, part: PartInWork, chunk: EncodedChunk, seen: int, last: bool) -> None:
        if self._failed:
            return
        try:
            if self._writer is None:
                path = aside_of(self.folder / _shard_name(part.number))
                self._writer = ShardWriter(path, list(self.packer.resolutions), self.packer.features)
            for row in self.packer.rows(chunk):
                self._writer.write(row)
            for _, resolution, latents_BCHW in chunk.latents:
                part.latents.setdefault(resolution, LatentSums()).add(latents_BCHW.numpy())
            if last:
                self._writer.close()
                self._publish(self._writer, part)
                self._writer = None
            self.on_written(seen, int(last))
        except BaseException:
            self._failed = True
            raise

    def _publish(self, writer: ShardWriter, part: PartInWork) -> None:
        """Give the shard its final name, then write its entry."""
        path = self.folder / f"{_shard_name(part.number)}.arrow"
        entry = {
            "name": path.name,
            "part": part.name,
            "fingerprint": part.fingerprint,
            "rows": writer.rows,
            "seen": writer.rows + len(part.rejected),
            "rejected": dict(sorted(Counter(reason for _, reason in part.rejected).items())),
            "passed_over": dict(part.passed_over),
            "buckets": {str(bucket): writer.buckets[bucket] for bucket in sorted(writer.buckets)},
            "bytes": writer.path.stat().st_size,
            "sha256": sha256_of(writer.path),
            "checksums": checksums_of(writer.path)._asdict(),
            "latent_sums": {str(resolution): sums.entry() for resolution, sums in part.latents.items()},
            **{key: part.counts[key] for key in ("captions", "tokens", "captions_cut")},
        }
        writer.path.replace(path)
        if part.rejected:
            lines = "".join(json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in part.rejected)
            write_aside(self.folder / f"{_shard_name(part.number)}.rejected.jsonl", lines.encode())
        write_aside(shard_entry_path(self.folder, part.number), to_checked_json(entry))


def shard_entry_path(folder: Path, number: int) -> Path:
    """Return the file with a shard's entry for the manifest."""
    return folder / f"{_shard_name(number)}.json"


def remove_shard(folder: Path, number: int) -> bool:
    """Remove a shard. Returns whether it existed; of several ranks that remove it, only one is told so.

    The entry is removed first, because a shard without an entry does not count.
    """
    try:
        shard_entry_path(folder, number).unlink()
    except FileNotFoundError:
        return False
    for suffix in (".arrow", ".rejected.jsonl"):
        (folder / f"{_shard_name(number)}{suffix}").unlink(missing_ok=True)
    return True


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}"
