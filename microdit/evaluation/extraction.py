"""Features of large image sets, computed by all processes together and cached on disk, so that an interrupted run resumes.

Images are processed in blocks. The name of a block's file is a hash of everything its features depend on (the network's weights, the
resizing and the images' bytes), so a cached file is never stale. A damaged one is computed again.

No process reads all images. First each process hashes its share of the set's parts, and the gathered hashes name the blocks. Then the
missing blocks are distributed in contiguous ranges, so that each process reopens few parts.

Shapes: N images, D features.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import safetensors
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from microdit.data.decode import Rejected, decode, fit
from microdit.distributed import World
from microdit.errors import UserError
from microdit.evaluation.features import ImageFeatures
from microdit.io.console import QUIET, Reporter
from microdit.io.files import cache_folder, write_aside

T = TypeVar("T")
BLOCK = 256  # images
DIGEST = 32  # bytes of an image's hash
CHANGED = "The images changed while they were being read: start again when nothing writes to them."

Pictures = Callable[[], Iterable[bytes]]
"""A part of an image set: each call returns the bytes of its files, from the first one on."""


@dataclass(frozen=True)
class Features:
    """Features of the images that could be read.

    `numbers_N` holds their positions in the set, `counts` the number of images in each part. `enlarged` images were smaller than the
    requested side.
    """

    features_ND: Tensor
    numbers_N: Tensor
    counts: tuple[int, ...]
    enlarged: int
    fingerprint: str  # of the images and the network

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def left_out(self) -> int:
        return self.total - len(self.numbers_N)


def feature_cache() -> Path:
    """Return the folder that caches features of reference sets, below XDG_CACHE_HOME or ~/.cache."""
    return cache_folder() / "features"


def extract(
    network: ImageFeatures,
    what: str,
    parts: Sequence[Pictures],
    side: int | None,
    folder: Path,
    world: World,
    reporter: Reporter = QUIET,
) -> Features:
    """Return the features of all images in order, on every process. Each image is cropped to `side` pixels square unless that is None.

    Every process must call this. `what` names the images in progress lines. `folder` stores the blocks and must be visible to all
    processes. Raises UserError, on all processes, if the images change meanwhile or the folder is not writable.
    """
    hashes = _hashes(what, parts, world, reporter)
    counts = tuple(len(part) // DIGEST for part in hashes)
    together, step = b"".join(hashes), BLOCK * DIGEST
    of_blocks = [together[start : start + step] for start in range(0, len(together), step)]
    paths = [folder / f"{_key(network, side, digests)}.safetensors" for digests in of_blocks]
    there = _gathered([_read(path, reporter) is not None for path in paths[world.rank :: world.size]], world, len(paths))
    missing = [number for number, found in enumerate(there) if not found]
    mine = missing[len(missing) * world.rank // world.size : len(missing) * (world.rank + 1) // world.size]
    images = sum(len(of_blocks[number]) // DIGEST for number in mine)
    with world.together(), reporter.progress(f"features of {what}, {network.name}", images) as advance:
        for block, contents in _blocks(parts, counts, mine):
            if b"".join(hashlib.sha256(content).digest() for content in contents) != of_blocks[block]:
                raise UserError(CHANGED)
            try:
                _write(paths[block], network, side, contents)
            except OSError as error:
                raise UserError(
                    f"Features of {what} cannot be written to {folder} ({error.strerror}): free some space or fix its permissions. The "
                    "cache for reference sets is below XDG_CACHE_HOME, which may point elsewhere."
                ) from error
            advance(len(contents))
    return _join(paths, counts, reporter)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a cache file of tensors and metadata, with a checksum over all of them."""
    metadata = dict(metadata or {})
    write_aside(path, save(dict(tensors), {**metadata, "checksum": _checksum(tensors, metadata)}))


def read_tensors(path: Path, names: Iterable[str], reporter: Reporter) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return the tensors and the metadata of `write_tensors`. None if there is no such file, or, after a warning, if it is damaged."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
            tensors = {name: file.get_tensor(name) for name in names}
        if metadata.pop("checksum") not in (_checksum(tensors, metadata), _checksum_of_values(tensors)):
            raise ValueError("its checksum differs")
        return tensors, metadata
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        reporter.warn(f"{path} is damaged ({error}): what it held is computed again.")
        return None


def pick(parts: Sequence[Pictures], counts: Sequence[int], numbers: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Yield (number, image) for these increasing numbers. Parts that hold none of them are not opened.

    Raises UserError if a part has become shorter than its count.
    """
    start = 0
    for part, count in zip(parts, counts, strict=True):
        wanted = numbers[bisect_left(numbers, start) : bisect_left(numbers, start + count)]
        start += count
        if not wanted:
            continue
        chosen, seen = set(wanted), -1
        for seen, content in zip(range(start - count, wanted[-1] + 1), part(), strict=False):
            if seen in chosen:
                yield seen, content
        if seen != wanted[-1]:
            raise UserError(CHANGED)


def _blocks(parts: Sequence[Pictures], counts: Sequence[int], blocks: Iterable[int]) -> Iterator[tuple[int, list[bytes]]]:
    """Yield (block, its images) for these increasing block numbers."""
    numbers = [number for block in blocks for number in range(block * BLOCK, min((block + 1) * BLOCK, sum(counts)))]
    for block, pairs in groupby(pick(parts, counts, numbers), key=lambda pair: pair[0] // BLOCK):
        yield block, [content for _, content in pairs]


def _hashes(what: str, parts: Sequence[Pictures], world: World, reporter: Reporter) -> list[bytes]:
    """Return, for each part, the concatenated hashes of its images."""
    mine, hashed = parts[world.rank :: world.size], []
    with reporter.progress(f"hash {what}", len(mine)) as advance:
        for part in mine:
            digests = bytearray()
            for content in part():
                digests += hashlib.sha256(content).digest()
                advance(0, f"image {len(digests) // DIGEST:,} of a part")
            hashed.append(bytes(digests))
            advance(1)
    return _gathered(hashed, world, len(parts))


def _gathered(mine: list[T], world: World, total: int) -> list[T]:
    """Gather the results for `total` items, of which each process handled every `world.size`-th."""
    shares = world.gather(mine)
    return [shares[number % world.size][number // world.size] for number in range(total)]


def _key(network: ImageFeatures, side: int | None, digests: bytes) -> str:
    head = f"{network.name} {network.fingerprint} {network.resize} {side}"
    return hashlib.sha256(head.encode() + digests).hexdigest()[:32]


def _write(path: Path, network: ImageFeatures, side: int | None, block: Sequence[bytes]) -> None:
    images: list[Image.Image] = []
    numbers, enlarged = [], 0
    for number, content in enumerate(block):
        try:
            image = decode(content)
        except Rejected:
            continue  # readers count it: its number is missing
        if side is not None:
            enlarged += min(image.size) < side
            image = Image.fromarray(fit(image, side, side))
        images.append(image)
        numbers.append(number)
    features_ND = network(images) if images else torch.zeros(0, 0)
    tensors = {"features": features_ND.contiguous(), "numbers": torch.tensor(numbers, dtype=torch.long)}
    write_tensors(path, tensors, {"pictures": str(len(block)), "enlarged": str(enlarged)})


def _read(path: Path, reporter: Reporter) -> tuple[Tensor, Tensor, int, int] | None:
    """Return a block's features, image numbers, image count and count of enlarged images; None if it is missing or damaged."""
    found = read_tensors(path, ("features", "numbers"), reporter)
    if found is None:
        return None
    tensors, metadata = found
    return tensors["features"], tensors["numbers"], int(metadata["pictures"]), int(metadata["enlarged"])


def _join(blocks: list[Path], counts: tuple[int, ...], reporter: Reporter) -> Features:
    features, numbers, total, enlarged = [], [], 0, 0
    for path in blocks:
        block = _read(path, reporter)
        assert block is not None, f"{path} was just written and cannot be read"
        if len(block[1]):
            features.append(block[0])
        numbers.append(block[1] + total)
        total += block[2]
        enlarged += block[3]
    fingerprint = hashlib.sha256("".join(path.stem for path in blocks).encode()).hexdigest()[:16]
    features_ND = torch.cat(features) if features else torch.zeros(0, 0)
    return Features(features_ND, torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.long), counts, enlarged, fingerprint)


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    shapes = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in sorted(tensors.items())]
    return hashlib.sha256(json.dumps([shapes, sorted(metadata.items()), _checksum_of_values(tensors)]).encode()).hexdigest()


def _checksum_of_values(tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum that the files of earlier versions hold."""
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()
