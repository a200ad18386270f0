"""Encoded chunks to shards, in a thread of its own: encoding goes on while numbers are packed, written and checked."""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from microdit.data.encode_batches import EncodedChunk
from microdit.data.forms import CaptionForm, LatentForm, pack_ids, pack_latents, pack_text
from microdit.data.shards import Row, ShardWriter, checksums_of
from microdit.errors import UserError
from microdit.files import aside_of, sha256_of, to_checked_json, write_aside

AHEAD = 2  # chunks that wait to be packed before encoding waits for them


@dataclass
class PartInWork:
    """A part of the source that becomes shard `number`: what was rejected of it so far, and its counts of captions and tokens.

    `fingerprint` is the part's when its reading began.
    """

    number: int
    name: str
    fingerprint: str = ""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Packer:
    """Turns an encoded chunk into rows: numbers as bytes."""

    resolutions: tuple[int, ...]
    latents: LatentForm
    captions: CaptionForm
    caption_weights: dict[str, float]

    def rows(self, chunk: EncodedChunk) -> Iterator[Row]:
        """Raises UserError for numbers that are not finite."""
        chunk.wait()
        texts, latents = iter(self._pack_text(chunk)), self._pack_latents(chunk)
        for record, bucket, blobs in zip(chunk.records, chunk.buckets, latents, strict=True):
            weights = [self.caption_weights[name] for name in record.captions]
            captions = list(record.captions.values())
            yield Row(record.key, bucket, captions, weights, [next(texts) for _ in captions], blobs)

    def _pack_latents(self, chunk: EncodedChunk) -> list[dict[int, bytes]]:
        blobs: list[dict[int, bytes]] = [{} for _ in chunk.records]
        for numbers, resolution, latents_BCHW in chunk.latents:
            for number, latents_CHW in zip(numbers, _finite(latents_BCHW.numpy(), "latents"), strict=True):
                blobs[number][resolution] = pack_latents(latents_CHW, self.latents)
        return blobs

    def _pack_text(self, chunk: EncodedChunk) -> list[bytes]:
        if self.captions == "ids":
            return [pack_ids(tokens) for tokens in chunk.ids]
        blobs = [b""] * len(chunk.ids)
        for numbers, text_BLE in chunk.text:
            for number, text_LE in zip(numbers, _finite(text_BLE.numpy(), "caption vectors"), strict=True):
                length = len(text_LE) if self.captions == "full" else len(chunk.ids[number])
                blobs[number] = pack_text(text_LE[:length], self.captions)
        return blobs


def _finite(numbers: NDArray[np.float32], what: str) -> NDArray[np.float32]:
    if not np.isfinite(numbers).all():
        raise UserError(f"Encoding gave {what} that are no finite numbers: the encoder overflows in this dtype, take --dtype float32.")
    return numbers


class ShardsThread:
    """Packs chunks and writes them in the order in which they are `put`; a shard is whole once its manifest is there.

    Errors of the thread are raised by a later `put`, or at the end of the `with` block; shards behind them are not written.
    `on_written` is told, by that thread, how many records and parts more are done.
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
        """What was put is finished in any case: only the shard that lacks its end is given up."""
        try:
            while kind is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._thread.shutdown()
            if self._writer is not None:
                self._writer.abandon()

    def put(self, part: PartInWork, chunk: EncodedChunk, seen: int, last: bool) -> None:
        """`seen`: how many of the part's records the chunk stands for. `last`: the part ends with it."""
        self._waiting.append(self._thread.submit(self._write, part, chunk, seen, last))
        while len(self._waiting) > AHEAD:
            self._waiting.popleft().result()

    def _write(self, part: PartInWork, chunk: EncodedChunk, seen: int, last: bool) -> None:
        if self._failed:
            return
        try:
            if self._writer is None:
                path = aside_of(self.folder / _shard(part.number))
                self._writer = ShardWriter(path, list(self.packer.resolutions))
            for row in self.packer.rows(chunk):
                self._writer.write(row)
            if last:
                self._writer.close()
                self._publish(self._writer, part)
                self._writer = None
            self.on_written(seen, int(last))
        except BaseException:
            self._failed = True
            raise

    def _publish(self, writer: ShardWriter, part: PartInWork) -> None:
        """The shard gets its name, then its manifest."""
        path = self.folder / f"{_shard(part.number)}.arrow"
        manifest = {
            "name": path.name,
            "part": part.name,
            "fingerprint": part.fingerprint,
            "rows": writer.rows,
            "seen": writer.rows + len(part.rejected),
            "rejected": dict(sorted(Counter(reason for _, reason in part.rejected).items())),
            "buckets": {str(bucket): writer.buckets[bucket] for bucket in sorted(writer.buckets)},
            "bytes": writer.path.stat().st_size,
            "sha256": sha256_of(writer.path),
            "checksums": checksums_of(writer.path)._asdict(),
            **{key: part.counts[key] for key in ("captions", "tokens", "captions_cut")},
        }
        writer.path.replace(path)
        if part.rejected:
            lines = "".join(json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in part.rejected)
            write_aside(self.folder / f"{_shard(part.number)}.rejected.jsonl", lines.encode())
        write_aside(manifest_path(self.folder, part.number), to_checked_json(manifest))


def manifest_path(folder: Path, number: int) -> Path:
    return folder / f"{_shard(number)}.json"


def remove_shard(folder: Path, number: int) -> bool:
    """Whether there was one: of several ranks that remove it, one is told so. The manifest goes first, for without it there is no shard."""
    try:
        manifest_path(folder, number).unlink()
    except FileNotFoundError:
        return False
    for suffix in (".arrow", ".rejected.jsonl"):
        (folder / f"{_shard(number)}{suffix}").unlink(missing_ok=True)
    return True


def _shard(number: int) -> str:
    return f"shard-{number:05d}"
