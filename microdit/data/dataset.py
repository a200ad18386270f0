"""Read encoded sets: rows by number, and the batches of a training run, mixed from several sets.

Which samples a batch holds is decided in `order.py` from the step's number alone. A row that is not what was written is never used:
training stops and names it, or, if the recipe allows, takes another one in its place and counts.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from microdit.data.manifest import open_manifest
from microdit.data.packing import StoredRows, stack, unpack, unpack_ids
from microdit.data.sampler import BatchSampler, SampleRef, SamplerPhase
from microdit.data.shards import Checksums, DamagedShard, Shard, most_open
from microdit.distributed import World
from microdit.encoders.text import TextEncoder, load_text_encoder
from microdit.errors import UserError
from microdit.io.files import sha256_of

MAX_REPLACED = 0.01  # of the samples read: with more damage than this, and more than 100 rows, a run stops


@dataclass(frozen=True)
class Batch:
    """Float32 latents, (B, C, H, W); caption tokens, (B, L, E), zero where the mask (B, L) is False."""

    latents_BCHW: Tensor
    text_BLE: Tensor
    text_mask_BL: Tensor


@dataclass(frozen=True)
class StoredBatch:
    """A batch in the 8 or 16 bits in which it is stored: a quarter of the bytes to copy to a GPU, which `expand` then does there.

    `latents` (B, C, H * W); `text` (B, L, E), of which the first `text_lengths_B` tokens are the caption's; `sides` H and W.
    """

    latents: StoredRows
    sides: tuple[int, int]
    flipped_B: Tensor | None
    text: StoredRows
    text_lengths_B: Tensor

    def __len__(self) -> int:
        return len(self.text_lengths_B)

    def to(self, device: torch.device) -> "StoredBatch":
        """Without waiting, if it is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "StoredBatch":
        """A copy in memory from which a GPU reads by itself."""
        return self._each(Tensor.pin_memory)

    def split(self, size: int) -> "list[StoredBatch]":
        """Into micro-batches of `size`."""
        return [self._each(lambda tensor, at=start: tensor[at : at + size]) for start in range(0, len(self), size)]  # type: ignore[misc]

    def expand(self) -> Batch:
        """As float32, on the device where it is."""
        latents_BCHW = self.latents.expand().unflatten(2, self.sides)
        if self.flipped_B is not None:
            latents_BCHW = torch.where(self.flipped_B.view(-1, 1, 1, 1), latents_BCHW.flip(-1), latents_BCHW)
        text_BLE = self.text.expand()
        mask_BL = torch.arange(text_BLE.shape[1], device=text_BLE.device) < self.text_lengths_B[:, None]
        return Batch(latents_BCHW, text_BLE, mask_BL)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "StoredBatch":
        flipped_B = None if self.flipped_B is None else change(self.flipped_B)
        return StoredBatch(self.latents.map(change), self.sides, flipped_B, self.text.map(change), change(self.text_lengths_B))


class EncodedDataset:
    """A folder written by `encode_source`. The card and files' sizes are checked at opening, shards and rows when they are read; `verify`
    reads everything.

    >>> data = EncodedDataset(Path("data/mine"))
    >>> len(data), data.latent_shape(), data.verify()
    (12, (8, 8, 8), [])
    """

    def __init__(self, folder: Path, resolution: int | None = None, world: World | None = None):
        """`resolution` may be left out if the set has only one. The processes of `world` must all come here. Raises UserError."""
        self.folder = folder
        self.manifest = open_manifest(folder, world)
        resolutions = self.manifest["settings"]["resolutions"]
        if resolution not in resolutions and (resolution is not None or len(resolutions) > 1):
            raise UserError(f"{folder} holds the resolutions {', '.join(map(str, resolutions))}: name one of them (data.resolution).")
        self.resolution: int = resolution or resolutions[0]
        self.most_open = most_open()  # shards, of which the least recently used is closed
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._damaged: dict[int, str] = {}

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    @property
    def bucket_sizes(self) -> list[int]:
        """Rows in each bucket."""
        return [int(ends[-1]) for ends in self._ends]

    @property
    def largest_bucket(self) -> int:
        """The one with the most rows."""
        sizes = self.bucket_sizes
        return max(range(len(sizes)), key=lambda bucket: sizes[bucket])

    def latent_shape(self, bucket: int = 0) -> tuple[int, int, int]:
        """(C, H, W) of the latents in a bucket."""
        height, width = self.manifest["sizes"][bucket][str(self.resolution)]
        down = self.manifest["downsampling"]
        return self.manifest["latent_channels"], height // down, width // down

    def summary(self) -> dict[str, Any]:
        """What a model trained on this must know to draw pictures."""
        keep = ("source", "autoencoder", "text_encoder", "text_channels")
        sizes = [size[str(self.resolution)] for size in self.manifest["sizes"]]
        squarest = min(range(len(sizes)), key=lambda bucket: abs(math.log(sizes[bucket][0] / sizes[bucket][1])))
        shape = {
            "latent_shape": list(self.latent_shape(squarest)),
            "resolution": self.resolution,
            "captions": self.manifest["settings"]["captions"],
        }
        return {**{key: self.manifest[key] for key in keep}, **shape}

    def read(self, bucket: int, number: int, draw: float = 0.0) -> tuple[memoryview, memoryview]:
        """The stored latents and one of the captions, by `draw`, of row `number` of a bucket. Raises DamagedShard."""
        ends = self._ends[bucket]
        which = int(np.searchsorted(ends, number, side="right"))
        row = number - (int(ends[which - 1]) if which else 0)
        shard = self._shard(which)
        if len(self._ends) > 1:
            row = shard.row_in_bucket(bucket, row)
        return shard.latents(row, self.resolution, bucket), shard.text(row, draw, bucket)

    def latents(self, blobs: list[memoryview], bucket: int) -> Tensor:
        """(B, C, H, W) float32 of stored latents."""
        channels, height, width = self.latent_shape(bucket)
        return unpack(blobs, height * width, self.manifest["settings"]["latents"])[0].view(-1, channels, height, width)

    def text(self, blobs: list[memoryview]) -> tuple[Tensor, Tensor]:
        """Of stored captions: (B, L, E) float32, zeros where the mask (B, L) is False."""
        stored, lengths_B = self.stored_text(blobs)
        text_BLE = stored.expand()
        return text_BLE, torch.arange(text_BLE.shape[1]) < lengths_B[:, None]

    def stored_latents(self, blobs: list[memoryview], bucket: int) -> StoredRows:
        """(B, C, H * W)."""
        _, height, width = self.latent_shape(bucket)
        return stack(blobs, height * width, self.manifest["settings"]["latents"])[0]

    def stored_text(self, blobs: list[memoryview], multiple: int = 1) -> tuple[StoredRows, Tensor]:
        """(B, L, E), L a `multiple`, and how many tokens each caption has, (B,). Token numbers are embedded."""
        form = self.manifest["settings"]["captions"]
        if form != "ids":
            return stack(blobs, self.manifest["text_channels"], form, multiple)
        with torch.no_grad():
            text_BLE, mask_BL = self._text_encoder.embed([unpack_ids(blob) for blob in blobs])
        missing = -text_BLE.shape[1] % multiple
        return StoredRows(torch.nn.functional.pad(text_BLE, (0, 0, 0, missing)), None), mask_BL.sum(dim=1)

    def column(self, name: str) -> list[Any]:
        """`key`, `captions` or `weights` of all rows, shard by shard."""
        return [value for number in range(len(self.manifest["shards"])) for value in self._shard(number).column(name)]

    def verify(self) -> list[str]:
        """The names of the shards whose content is not what was written (their checksums differ)."""
        return [shard["name"] for shard in self.manifest["shards"] if sha256_of(self.folder / shard["name"]) != shard["sha256"]]

    @cached_property
    def _ends(self) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        """Return, for each bucket, the number of its rows up to the end of each shard."""
        buckets = range(len(self.manifest["sizes"]))
        return [np.cumsum([shard["buckets"].get(str(bucket), 0) for shard in self.manifest["shards"]]) for bucket in buckets]

    def _shard(self, number: int) -> Shard:
        """Opened at its first use, so that a set of thousands starts at once."""
        shard = self._shards.pop(number, None)
        self._shards[number] = shard = self._open(number) if shard is None else shard  # now the last one that was used
        while len(self._shards) > self.most_open:
            self._shards.popitem(last=False)
        return shard

    def _open(self, number: int) -> Shard:
        if number in self._damaged:  # whoever looks for a row near a damaged one asks again and again
            raise DamagedShard(self._damaged[number])
        entry = self.manifest["shards"][number]
        checksums = Checksums(**entry["checksums"]) if self.manifest["format"] > 2 else None
        try:
            return Shard(self.folder / entry["name"], entry["bytes"], entry["rows"], self.manifest["settings"]["resolutions"], checksums)
        except DamagedShard as damage:
            self._damaged[number] = str(damage)
            raise

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        """Needed where only token numbers are stored."""
        wanted = self.manifest["text_encoder"]
        encoder = load_text_encoder(wanted["name"])
        if encoder.fingerprint != wanted["fingerprint"]:
            raise UserError(f"The text encoder {wanted['name']} is not the one that {self.folder} was encoded for: encode it again.")
        return encoder


class MixedDataset:
    """The batches of a training run, from one set or several."""

    def __init__(
        self,
        sets: list[EncodedDataset],
        phases: list[SamplerPhase],
        seed: int,
        flip: bool = False,
        on_damage: Literal["stop", "skip"] = "stop",
        warn: Callable[[str], None] = print,
    ):
        """Raises UserError if the sets do not fit together."""
        check_compatible(sets)
        for encoded in sets:
            encoded.most_open = most_open(len(sets))
        self.sets, self.flip, self.on_damage, self.warn = sets, flip, on_damage, warn
        self.replaced = 0  # damaged rows in whose place another was taken
        self._read = 0
        self._place: SampleRef | None = None  # what is being read now
        self._seed = seed
        self._order = BatchSampler(tuple(tuple(s.bucket_sizes) for s in sets), seed, tuple(phases))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The samples of a step, or a rank's share: every `world`-th. Raises UserError for a damaged row, unless it may be skipped."""
        return self.stored(step, rank, world).expand()

    def stored(self, step: int, rank: int = 0, world: int = 1, caption_multiple: int = 1) -> StoredBatch:
        """`batch`, as it is stored. Captions are padded to a multiple of `caption_multiple` tokens."""
        places = self._order.batch(step)[rank::world]
        samples = []
        self._read += len(places)
        for place in places:
            self._place = place
            try:
                samples.append(self.sets[place.set].read(place.bucket, place.row, place.draw))
            except DamagedShard as damage:
                samples.append(self._replacement(self.sets[place.set], place, damage))
        latents = self.sets[0].stored_latents([latents for latents, _ in samples], places[0].bucket)
        _, *sides = self.sets[0].latent_shape(places[0].bucket)
        flipped_B = None
        if self.flip:
            generator = np.random.default_rng([self._seed, step, 1])
            flipped_B = torch.from_numpy(generator.random(len(places) * world) < 0.5)[rank::world]
        text, lengths_B = self.sets[0].stored_text([text for _, text in samples], caption_multiple)
        return StoredBatch(latents, (sides[0], sides[1]), flipped_B, text, lengths_B)

    def where(self) -> str:
        """What is being read now, in words, for whoever waits for it."""
        place = self._place
        return "nothing yet" if place is None else f"row {place.row} of {self.sets[place.set].folder}"

    def _replacement(self, encoded: EncodedDataset, place: SampleRef, damage: DamagedShard) -> tuple[memoryview, memoryview]:
        """The next whole row of the same set and bucket."""
        if self.on_damage == "stop":
            raise UserError(f"{damage}. Encode that part again, or go on without it: data.on_damage=skip.") from damage
        self.replaced += 1
        if self.replaced > max(100, MAX_REPLACED * self._read):
            raise UserError(f"{self.replaced} of {self._read} samples were damaged, last: {damage}. Encode the data again.") from damage
        self.warn(f"{damage}; another sample takes its place ({self.replaced} so far).")
        size = encoded.bucket_sizes[place.bucket]
        for distance in range(1, min(size, 100_000)):
            try:
                return encoded.read(place.bucket, (place.row + distance) % size)
            except DamagedShard:
                continue
        raise UserError(f"{encoded.folder} has no whole row near a damaged one ({damage}): encode it again.") from damage


def check_compatible(sets: list[EncodedDataset]) -> None:
    """Raises UserError if sets are not of the same encoders, shapes and forms."""
    first = sets[0]
    for other in sets[1:]:
        for key in ("autoencoder", "text_encoder", "sizes", "latent_channels", "text_channels"):
            if first.manifest[key] != other.manifest[key]:
                values = f"{key} is {first.manifest[key]} in one and {other.manifest[key]} in the other"
                raise UserError(f"{first.folder} and {other.folder} cannot be mixed: {values}.")
        for key in ("latents", "captions"):
            forms = [s.manifest["settings"][key] for s in (first, other)]
            if forms[0] != forms[1]:
                raise UserError(f"{first.folder} and {other.folder} cannot be mixed: {key} are stored as {forms[0]} and {forms[1]}.")
