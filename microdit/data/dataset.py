"""Read encoded data sets: rows by number, and the batches of a training run, mixed from several data sets.

The samples of a batch are chosen by `sampler.py` from the step number alone. A damaged row is never used: training stops and names it, or,
if the recipe allows it, replaces the row by another one and counts the replacement.
"""

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from microdit.data.latent_statistics import Statistics
from microdit.data.manifest import open_manifest
from microdit.data.packing import StoredRows, stack, unpack, unpack_ids
from microdit.data.sampler import BatchSampler, BlockOrder, Ints, SampleRef, SamplerPhase, ShardSizes
from microdit.data.shard_cache import FetchAhead, RemoteShard, ShardCache
from microdit.data.shards import Checksums, DamagedShard, Shard, most_open
from microdit.data.stored_pictures import PICTURES, DamagedPicture, unpack_picture
from microdit.distributed import World
from microdit.encoders.text import TextEncoder, load_text_encoder
from microdit.encoders.vision import feature_grid
from microdit.errors import UserError
from microdit.io.files import sha256_of
from microdit.io.places import Place, location

T = TypeVar("T")
MOST_OPEN_COPIES = 16  # of a set in an object store that no training reads, such as the held-out one
MOST_DECODERS, DECODER_NAME = 4, "picture-decoder"  # threads, each of which decodes about 400 JPEGs of 512 px a second
MAX_REPLACED = 0.01  # a run stops if more than this share of the samples, and more than 100, had to be replaced


@dataclass(frozen=True)
class Batch:
    """Latents (B, C, H, W) and caption vectors (B, L, E) in float32. Captions are zero where the mask (B, L) is False.

    `features_BEYX` are those of the images on their grid, where they were asked for.
    """

    latents_BCHW: Tensor
    text_BLE: Tensor
    text_mask_BL: Tensor
    features_BEYX: Tensor | None = None


@dataclass(frozen=True)
class StoredBatch:
    """A batch in the 8 or 16 bits in which it is stored, as little as a quarter of the bytes of float32 to copy to a GPU.

    `latents` is (B, C, H * W) with `sides` (H, W); those of `flipped_B` are to be mirrored. `text` is (B, L, E), of which the first
    `text_lengths_B` tokens belong to the caption. `features` is (B, Y * X, E) with `feature_sides` (Y, X). `expand` makes a `Batch` of it,
    on the device where it is.
    """

    latents: StoredRows
    sides: tuple[int, int]
    flipped_B: Tensor | None
    text: StoredRows
    text_lengths_B: Tensor
    features: StoredRows | None = None
    feature_sides: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.text_lengths_B)

    def to(self, device: torch.device) -> "StoredBatch":
        """Copy the batch to a device, asynchronously if it is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "StoredBatch":
        """Copy the batch to pinned memory."""
        return self._each(Tensor.pin_memory)

    def split(self, size: int) -> "list[StoredBatch]":
        """Split the batch into micro-batches of `size`."""
        return [self._each(lambda tensor, at=start: tensor[at : at + size]) for start in range(0, len(self), size)]  # type: ignore[misc]

    def expand(self) -> Batch:
        """Return the batch in float32, on its device."""
        latents_BCHW = self._mirrored(self.latents.expand().unflatten(2, self.sides))
        text_BLE = self.text.expand()
        mask_BL = torch.arange(text_BLE.shape[1], device=text_BLE.device) < self.text_lengths_B[:, None]
        features_BEYX = None if self.features is None else self._mirrored(self.features.expand().mT.unflatten(2, self.feature_sides))
        return Batch(latents_BCHW, text_BLE, mask_BL, features_BEYX)

    def _mirrored(self, maps_BCHW: Tensor) -> Tensor:
        if self.flipped_B is None:
            return maps_BCHW
        return torch.where(self.flipped_B.view(-1, 1, 1, 1), maps_BCHW.flip(-1), maps_BCHW)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "StoredBatch":
        return replace(
            self,
            latents=self.latents.map(change),
            flipped_B=None if self.flipped_B is None else change(self.flipped_B),
            text=self.text.map(change),
            text_lengths_B=change(self.text_lengths_B),
            features=None if self.features is None else self.features.map(change),
        )


class EncodedDataset:
    """A folder written by `encode_source`, on this machine or in an object store.

    The manifest and the sizes of the files are checked when it is opened, shards and rows when they are read. `verify` checks everything.

    >>> data = EncodedDataset(Path("data/mine"))
    >>> len(data), data.latent_shape(), data.verify()
    (12, (8, 8, 8), [])
    """

    def __init__(
        self, folder: Path | Place | str, resolution: int | None = None, world: World | None = None, cache: ShardCache | None = None
    ):
        """Open the data set at one of its resolutions, which may be omitted if there is only one.

        Shards in an object store are copied into `cache` when they are used, by default the user's. All processes of `world` must call this
        together. Raises UserError.
        """
        self.folder = location(folder)
        self.manifest = open_manifest(self.folder, world)
        self.cache = (cache or ShardCache()) if isinstance(self.folder, Place) else None
        resolutions = self.manifest["settings"]["resolutions"]
        if resolution not in resolutions and (resolution is not None or len(resolutions) > 1):
            raise UserError(f"{folder} holds the resolutions {', '.join(map(str, resolutions))}: name one of them (data.resolution).")
        self.resolution: int = resolution or resolutions[0]
        # Open shards; beyond, the least recently used one is closed. An open one takes room on the disk when its copy has been deleted.
        self.most_open = most_open() if self.cache is None else MOST_OPEN_COPIES
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._damaged: dict[int, str] = {}
        self._first_sentence = 0.0

    def use_first_sentences(self, share: float) -> None:
        """Let `read` return the first sentence in place of a caption of several in this share of its draws.

        Raises UserError if the set does not hold first sentences, and the share is not 0.
        """
        if share and not self.manifest["settings"].get("first_sentences"):
            raise UserError(
                f"data.first_sentence is {share:g}, and {self.folder} holds whole captions only: encode it again with "
                "--first-sentences, or leave the setting out."
            )
        self._first_sentence = share

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    @property
    def bucket_sizes(self) -> list[int]:
        """The number of rows in each bucket."""
        return [int(ends[-1]) for ends in self._ends]

    @property
    def largest_bucket(self) -> int:
        """The bucket with the most rows."""
        sizes = self.bucket_sizes
        return max(range(len(sizes)), key=lambda bucket: sizes[bucket])

    def latent_shape(self, bucket: int = 0) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the latents in a bucket."""
        height, width = self.manifest["sizes"][bucket][str(self.resolution)]
        down = self.manifest["downsampling"]
        return self.manifest["latent_channels"], height // down, width // down

    @property
    def latent_statistics(self) -> Statistics | None:
        """Mean and standard deviation of each channel of the latents; None for sets encoded by versions that did not measure them."""
        return self.manifest.get("latents", {}).get(str(self.resolution))

    def feature_shape(self, bucket: int = 0) -> tuple[int, int, int]:
        """Return the shape (E, Y, X) of the features of images in a bucket, in a set that has features."""
        features, (height, width) = self.manifest["features"], self.manifest["sizes"][bucket][str(self.resolution)]
        return features["channels"], *feature_grid(height, width, features["cell"])

    def summary(self) -> dict[str, Any]:
        """Return what a model trained on this data set needs to generate images: encoders, latent shape, resolution, source."""
        keep = ("source", "autoencoder", "text_encoder", "text_channels")
        shape = {
            "latent_shape": list(self.latent_shape(self._squarest)),
            "resolution": self.resolution,
            "captions": self.manifest["settings"]["captions"],
        }
        return {**{key: self.manifest[key] for key in keep}, **shape}

    @property
    def shortest_side(self) -> int:
        """The shorter side, in pixels, of images that a model of this set generates by default."""
        return int(min(self._sizes[self._squarest]))

    def read(self, bucket: int, number: int, draw: float = 0.0) -> tuple[memoryview, memoryview]:
        """Return the stored latents of row `number` of a bucket, and one of its captions, chosen by `draw`. Raises DamagedShard.

        Pictures are decoded: the latents are a byte for each pixel and channel.
        """
        latents, text, where = self.read_undecoded(bucket, number, draw)
        return self.decode(latents, bucket, where), text

    def read_undecoded(self, bucket: int, number: int, draw: float = 0.0) -> tuple[memoryview, memoryview, str]:
        """Return what `read` returns with pictures as they are stored, and where the row is, for messages. Raises DamagedShard."""

        def take(shard: Shard, row: int) -> tuple[memoryview, memoryview, str]:
            return (
                shard.latents(row, self.resolution, bucket),
                shard.text(row, draw, bucket, self._first_sentence),
                f"row {row} of {shard.path}",
            )

        return self._from_shard(bucket, number, take)

    @property
    def stores_pictures(self) -> bool:
        """Whether the latents are stored as JPEG or WebP."""
        return self.manifest["settings"]["latents"] in PICTURES

    def decode(self, latents: memoryview, bucket: int, where: str) -> memoryview:
        """Decode a stored picture; other latents remain as they are. Any thread may call this. Raises DamagedShard, which names `where`."""
        if not self.stores_pictures:
            return latents
        _, height, width = self.latent_shape(bucket)
        try:
            return unpack_picture(latents, height, width, self.manifest["settings"]["latents"])
        except DamagedPicture as damage:
            raise DamagedShard(f"{where} cannot be decoded: it holds {damage}") from None

    def shards_of(self, bucket: int, numbers: Ints) -> Ints:
        """Return the numbers of the shards that hold rows of a bucket."""
        return np.searchsorted(self._ends[bucket], numbers, side="right")

    def remote(self, number: int) -> RemoteShard:
        """Return the address of a shard in an object store, with its size and SHA-256."""
        assert isinstance(self.folder, Place)
        entry = self.manifest["shards"][number]
        return RemoteShard(self.folder / entry["name"], entry["bytes"], entry["sha256"])

    def shard_sizes(self) -> ShardSizes:
        """Return the rows of each shard by bucket, and its bytes, by which a block order is made."""
        rows = np.stack([np.diff(ends, prepend=0) for ends in self._ends], axis=1)
        return ShardSizes(rows, np.asarray([shard["bytes"] for shard in self.manifest["shards"]]))

    def close_shards(self, digests: set[str]) -> None:
        """Close the shards with these SHA-256."""
        for number in [number for number in self._shards if self.manifest["shards"][number]["sha256"] in digests]:
            self._close(number)

    def read_features(self, bucket: int, number: int) -> memoryview:
        """Return the stored features of row `number` of a bucket, in a set that has features. Raises DamagedShard."""
        return self._from_shard(bucket, number, lambda shard, row: shard.features(row, self.resolution, bucket))

    def latents(self, blobs: list[memoryview], bucket: int) -> Tensor:
        """Unpack stored latents to float32, (B, C, H, W)."""
        channels, height, width = self.latent_shape(bucket)
        return unpack(blobs, height * width, self.manifest["settings"]["latents"])[0].view(-1, channels, height, width)

    def text(self, blobs: list[memoryview]) -> tuple[Tensor, Tensor]:
        """Unpack stored captions to float32, (B, L, E), with zeros where the mask (B, L), also returned, is False."""
        stored, lengths_B = self.stored_text(blobs)
        text_BLE = stored.expand()
        return text_BLE, torch.arange(text_BLE.shape[1]) < lengths_B[:, None]

    def stored_latents(self, blobs: list[memoryview], bucket: int) -> StoredRows:
        """Combine stored latents into a batch, (B, C, H * W)."""
        _, height, width = self.latent_shape(bucket)
        return stack(blobs, height * width, self.manifest["settings"]["latents"])[0]

    def stored_text(self, blobs: list[memoryview], multiple: int = 1) -> tuple[StoredRows, Tensor]:
        """Combine stored captions into a batch, (B, L, E), with L a multiple of `multiple`. Token ids are embedded.

        Also returns the number of tokens of each caption, (B,).
        """
        packing = self.manifest["settings"]["captions"]
        if packing != "ids":
            return stack(blobs, self.manifest["text_channels"], packing, multiple)
        with torch.no_grad():
            text_BLE, mask_BL = self._text_encoder.embed([unpack_ids(blob) for blob in blobs])
        missing = -text_BLE.shape[1] % multiple
        return StoredRows(torch.nn.functional.pad(text_BLE, (0, 0, 0, missing)), None), mask_BL.sum(dim=1)

    def stored_features(self, blobs: list[memoryview], bucket: int) -> StoredRows:
        """Combine stored features into a batch, (B, Y * X, E)."""
        return stack(blobs, self.feature_shape(bucket)[0], "fp16")[0]

    def column(self, name: str) -> list[Any]:
        """Return the column `key`, `captions` or `weights` of all rows, shard by shard."""
        return [value for number in range(len(self.manifest["shards"])) for value in self._shard(number).column(name)]

    def spread(self, count: int) -> Iterator[tuple[int, memoryview, list[str]]]:
        """Yield the bucket, the stored latents and the captions of `count` rows (or all), evenly spread over the set."""
        ends, count = np.cumsum([shard["rows"] for shard in self.manifest["shards"]]), min(count, len(self))
        columns: dict[int, tuple[list[int], list[list[str]]]] = {}  # of the shard that is being read
        for number in range(count):
            position = number * len(self) // count
            which = int(np.searchsorted(ends, position, side="right"))
            row, shard = position - (int(ends[which - 1]) if which else 0), self._shard(which)
            if which not in columns:
                columns = {which: (shard.column("bucket"), shard.column("captions"))}
            buckets, captions = columns[which]
            latents = shard.latents(row, self.resolution, buckets[row])
            yield buckets[row], self.decode(latents, buckets[row], f"row {row} of {shard.path}"), captions[row]

    def verify(self) -> list[str]:
        """Return the names of damaged shards, whose checksums differ."""
        shards = self.manifest["shards"]
        return [shard["name"] for number, shard in enumerate(shards) if self._digest(number) != shard["sha256"]]

    def _digest(self, number: int) -> str:
        """Return the SHA-256 of a shard; empty if its bytes in an object store are others."""
        if not isinstance(self.folder, Place):
            return sha256_of(self.folder / self.manifest["shards"][number]["name"])
        assert self.cache is not None
        try:
            return sha256_of(self.cache.copy(self.remote(number)))
        except DamagedShard:
            return ""

    @cached_property
    def _ends(self) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        """The number of rows up to the end of each shard, for each bucket."""
        buckets = range(len(self.manifest["sizes"]))
        return [np.cumsum([shard["buckets"].get(str(bucket), 0) for shard in self.manifest["shards"]]) for bucket in buckets]

    @property
    def _sizes(self) -> list[list[int]]:
        """The height and width in pixels of each bucket."""
        return [size[str(self.resolution)] for size in self.manifest["sizes"]]

    @property
    def _squarest(self) -> int:
        """The bucket whose shape is nearest to a square."""
        sizes = self._sizes
        return min(range(len(sizes)), key=lambda bucket: abs(math.log(sizes[bucket][0] / sizes[bucket][1])))

    def _close(self, number: int) -> None:
        self._shards.pop(number, None)

    def _from_shard(self, bucket: int, number: int, take: Callable[[Shard, int], T]) -> T:
        """Return what `take` reads of the shard that holds row `number` of a bucket, at the row's number in that shard."""
        which = int(self.shards_of(bucket, np.asarray([number]))[0])
        row = number - (int(self._ends[bucket][which - 1]) if which else 0)

        def taken() -> T:
            shard = self._shard(which)
            return take(shard, shard.row_in_bucket(bucket, row) if len(self._ends) > 1 else row)

        try:
            return taken()
        except DamagedShard:
            if self.cache is None or which in self._damaged:
                raise
            self._close(which)
            self.cache.drop(self.remote(which))  # it was right when it came; the disk changed it
            return taken()

    def _shard(self, number: int) -> Shard:
        """Return a shard. Shards are opened at their first use, so that data sets of thousands of shards start at once."""
        shard = self._shards.pop(number, None)
        self._shards[number] = shard = self._open(number) if shard is None else shard  # now the most recently used one
        while len(self._shards) > self.most_open:
            self._shards.popitem(last=False)
        return shard

    def _open(self, number: int) -> Shard:
        if number in self._damaged:  # the search for a replacement tries the same shard again and again
            raise DamagedShard(self._damaged[number])
        try:
            return self._open_file(number)
        except DamagedShard as damage:
            self._damaged[number] = str(damage)
            raise

    def _open_file(self, number: int) -> Shard:
        entry = self.manifest["shards"][number]
        checksums = Checksums(**entry["checksums"]) if self.manifest["format"] > 2 else None

        def opened(path: Path) -> Shard:
            columns = self.manifest["settings"]["resolutions"], checksums, "features" in self.manifest
            return Shard(path, entry["bytes"], entry["rows"], *columns)

        if self.cache is None or isinstance(self.folder, Path):
            return opened(self.folder / entry["name"])
        remote, was_damaged = self.remote(number), False
        while True:
            path = self.cache.copy(remote)
            try:
                return opened(path)
            except DamagedShard:
                if path.exists():  # it was not just taken away by another process
                    if was_damaged:
                        raise
                    was_damaged = True
                    self.cache.drop(remote)

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        """The text encoder that embeds captions of which only token ids are stored."""
        expected = self.manifest["text_encoder"]
        encoder = load_text_encoder(expected["name"])
        if encoder.fingerprint != expected["fingerprint"]:
            raise UserError(f"The text encoder {expected['name']} is not the one that {self.folder} was encoded for: encode it again.")
        return encoder


_Blobs = tuple[memoryview, memoryview, memoryview | None]  # latents and a caption; features, if asked for


class MixedDataset:
    """The batches of a training run, from one or several encoded data sets."""

    def __init__(
        self,
        sets: list[EncodedDataset],
        phases: list[SamplerPhase],
        seed: int,
        flip: bool = False,
        on_damage: Literal["stop", "skip"] = "stop",
        warn: Callable[[str], None] = print,
        block_bytes: float | None = None,
    ):
        """Combine `sets` for training `phases`. Raises UserError if the data sets are incompatible.

        `flip` mirrors half of the samples. Damaged rows stop the run, or are replaced with a warning if `on_damage` is "skip". With
        `block_bytes`, samples are shuffled within blocks of shards of that size. Shards in object stores are copied ahead into the cache
        that the sets share.
        """
        check_compatible(sets)
        for encoded in sets:
            encoded.most_open = most_open(len(sets))  # copies are closed when the order needs them no more
        self.sets, self.flip, self.on_damage, self.warn = sets, flip, on_damage, warn
        self.replaced = 0  # number of damaged rows replaced so far
        self._read = 0
        self._current: SampleRef | None = None  # the sample that is being read
        self._seed = seed
        blocks = None if block_bytes is None else BlockOrder(tuple(s.shard_sizes() for s in sets), block_bytes)
        self._sampler = BatchSampler(tuple(tuple(s.bucket_sizes) for s in sets), seed, tuple(phases), blocks)
        cache = next((s.cache for s in sets if s.cache is not None), None)
        self._ahead = None if cache is None else FetchAhead(cache, self._remote_shards, self._sampler.steps)
        self._decoders = ThreadPoolExecutor(min(MOST_DECODERS, os.cpu_count() or 1), DECODER_NAME) if sets[0].stores_pictures else None

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Return the samples of a step, or the share of one of `world` ranks: every `world`-th sample, from number `rank` on.

        Raises UserError for a damaged row, unless `on_damage` is "skip".
        """
        return self.stored(step, rank, world).expand()

    def stored(self, step: int, rank: int = 0, world: int = 1, caption_multiple: int = 1, features: bool = False) -> StoredBatch:
        """Return the samples of `batch` as they are stored, with their `features` if asked.

        Captions are padded to a multiple of `caption_multiple` tokens.
        """
        if self._ahead is not None and (done := self._ahead.at(step)):
            for encoded in self.sets:
                encoded.close_shards(set(done))
        chosen = self._sampler.batch(step)[rank::world]
        self._read += len(chosen)
        stored = (self._take(sample, features) for sample in chosen)
        # Only decoding is done by other threads: one that hangs while it reads would keep the process from ending.
        outcomes = map(_decoded, stored) if self._decoders is None else self._decoders.map(_decoded, stored)
        samples = [
            self._replacement(self.sets[sample.set], sample, features, outcome) if isinstance(outcome, DamagedShard) else outcome
            for sample, outcome in zip(chosen, outcomes, strict=True)
        ]
        first, bucket = self.sets[0], chosen[0].bucket
        latents = first.stored_latents([latents for latents, _, _ in samples], bucket)
        _, *sides = first.latent_shape(bucket)
        flipped_B = None
        if self.flip:
            generator = np.random.default_rng([self._seed, step, 1])
            flipped_B = torch.from_numpy(generator.random(len(chosen) * world) < 0.5)[rank::world]
        text, lengths_B = first.stored_text([text for _, text, _ in samples], caption_multiple)
        batch = StoredBatch(latents, (sides[0], sides[1]), flipped_B, text, lengths_B)
        if not features:
            return batch
        blobs = [blob for *_, blob in samples if blob is not None]
        return replace(batch, features=first.stored_features(blobs, bucket), feature_sides=first.feature_shape(bucket)[1:])

    def close(self) -> None:
        """Stop copying shards ahead, and decoding."""
        if self._ahead is not None:
            self._ahead.close()
        if self._decoders is not None:
            self._decoders.shutdown(wait=False, cancel_futures=True)

    def _take(self, sample: SampleRef, features: bool) -> "_Undecoded | DamagedShard":
        """Read a sample as it is stored. Damage is returned, to be dealt with in the order of the samples."""
        self._current = sample
        try:
            return _read(self.sets[sample.set], sample, features)
        except DamagedShard as damage:
            return damage

    def _remote_shards(self, step: int) -> Iterator[RemoteShard]:
        """Yield the shards in object stores that hold samples of a step."""
        bucket, sets, rows = self._sampler.rows(step)
        for number, encoded in enumerate(self.sets):
            if encoded.cache is not None:
                shards = encoded.shards_of(bucket, rows[sets == number])
                yield from map(encoded.remote, dict.fromkeys(shards.tolist()))

    def where(self) -> str:
        """Describe the sample that is being read, for a message about a slow read."""
        sample = self._current
        return "nothing yet" if sample is None else f"row {sample.row} of {self.sets[sample.set].folder}"

    def _replacement(self, encoded: EncodedDataset, sample: SampleRef, features: bool, damage: DamagedShard) -> _Blobs:
        """Read the next intact row of the same data set and bucket."""
        if self.on_damage == "stop":
            raise UserError(f"{damage}. Encode that part again, or continue without it: data.on_damage=skip.") from damage
        self.replaced += 1
        if self.replaced > max(100, MAX_REPLACED * self._read):
            raise UserError(f"{self.replaced} of {self._read} samples were damaged, last: {damage}. Encode the data again.") from damage
        self.warn(f"{damage}; another sample takes its place ({self.replaced} so far).")
        size = encoded.bucket_sizes[sample.bucket]
        for distance in range(1, min(size, 100_000)):
            try:
                outcome = _decoded(_read(encoded, sample._replace(row=(sample.row + distance) % size, draw=0.0), features))
            except DamagedShard:
                continue
            if not isinstance(outcome, DamagedShard):
                return outcome
        raise UserError(f"{encoded.folder} has no intact row near a damaged one ({damage}): encode it again.") from damage


@dataclass(frozen=True)
class _Undecoded:
    """A sample as it is stored, and where that is."""

    encoded: EncodedDataset
    bucket: int
    blobs: _Blobs
    where: str


def _read(encoded: EncodedDataset, sample: SampleRef, features: bool) -> _Undecoded:
    latents, text, where = encoded.read_undecoded(sample.bucket, sample.row, sample.draw)
    found = encoded.read_features(sample.bucket, sample.row) if features else None
    return _Undecoded(encoded, sample.bucket, (latents, text, found), where)


def _decoded(stored: _Undecoded | DamagedShard) -> _Blobs | DamagedShard:
    if isinstance(stored, DamagedShard):
        return stored
    latents, text, features = stored.blobs
    try:
        return stored.encoded.decode(latents, stored.bucket, stored.where), text, features
    except DamagedShard as damage:
        return damage


def check_compatible(sets: list[EncodedDataset]) -> None:
    """Check that data sets have the same encoders, shapes and packing. Raises UserError."""
    first = sets[0]
    for other in sets[1:]:
        for key in ("autoencoder", "text_encoder", "sizes", "latent_channels", "text_channels"):
            if first.manifest[key] != other.manifest[key]:
                values = f"{key} is {first.manifest[key]} in one and {other.manifest[key]} in the other"
                raise UserError(f"{first.folder} and {other.folder} cannot be mixed: {values}.")
        for key in ("latents", "captions"):
            one, two = (s.manifest["settings"][key] for s in (first, other))
            if one != two:
                raise UserError(f"{first.folder} and {other.folder} cannot be mixed: {key} are stored as {one} and {two}.")
