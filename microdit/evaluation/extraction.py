"""Features of many pictures: shared among processes, kept on the disk, so that whoever is stopped goes on and a set is seen once.

The pictures go through in blocks. A block's file is named by a hash of all that its features depend on (the network's weights, the
resizing, the pictures' bytes), so a file is right or not there: nothing can be out of date. One that is damaged is made again.

No process reads all pictures. First the parts of the set are dealt out, to be hashed, and the hashes are gathered: they name the blocks.
Then the blocks that are not there are dealt out, in runs, so that a process opens few parts again.

Shapes: N pictures, D features.
"""

import hashlib
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import safetensors
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from microdit.cli.terminal import progress
from microdit.data.decode import Rejected, decode, fit
from microdit.distributed import World
from microdit.errors import UserError
from microdit.evaluation.features import ImageFeatures
from microdit.io.files import write_aside

T = TypeVar("T")
BLOCK = 256  # pictures
DIGEST = 32  # bytes of a picture's hash
CHANGED = "The pictures changed while they were read: start again when nobody writes there."

Pictures = Callable[[], Iterable[bytes]]
"""A part of the pictures: the bytes of their files, from the first on whenever it is called."""


@dataclass(frozen=True)
class Features:
    """Of the pictures that could be read: `numbers_N` says which of those that came. `enlarged` of them were smaller than wanted.

    `counts`: how many pictures each part has.
    """

    features_ND: Tensor
    numbers_N: Tensor
    counts: tuple[int, ...]
    enlarged: int
    fingerprint: str  # of the pictures

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def left_out(self) -> int:
        return self.total - len(self.numbers_N)


def feature_cache() -> Path:
    """Where features of reference sets are kept: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "microdit" / "features"


def extract(
    network: ImageFeatures, what: str, parts: Sequence[Pictures], side: int | None, folder: Path, world: World, warn: Callable[[str], None]
) -> Features:
    """Of the pictures in their order, cut to squares of `side` pixels, if given. Every process must call this, and gets all.

    `what`: the pictures' name in lines of progress. `folder`: where blocks are kept, visible to all processes. Raises UserError if the
    pictures change meanwhile, or the folder cannot be written; on all processes, if on one.
    """
    hashes = _hashes(what, parts, world)
    counts = tuple(len(part) // DIGEST for part in hashes)
    together, step = b"".join(hashes), BLOCK * DIGEST
    of_blocks = [together[start : start + step] for start in range(0, len(together), step)]
    paths = [folder / f"{_key(network, side, digests)}.safetensors" for digests in of_blocks]
    there = _gathered([_read(path, warn) is not None for path in paths[world.rank :: world.size]], world, len(paths))
    missing = [number for number, found in enumerate(there) if not found]
    mine = missing[len(missing) * world.rank // world.size : len(missing) * (world.rank + 1) // world.size]
    wanted = sum(len(of_blocks[number]) // DIGEST for number in mine)
    with world.together(), progress(f"features of {what}, {network.name}", wanted) as advance:
        for block, contents in _blocks(parts, counts, mine):
            if b"".join(hashlib.sha256(content).digest() for content in contents) != of_blocks[block]:
                raise UserError(CHANGED)
            try:
                _write(paths[block], network, side, contents)
            except OSError as error:
                raise UserError(
                    f"Features of {what} cannot be kept in {folder} ({error.strerror}): make room there, or let it be written; those of "
                    "reference sets lie below XDG_CACHE_HOME, which may name another place."
                ) from error
            advance(len(contents))
    return _join(paths, counts, warn)


def pick(parts: Sequence[Pictures], counts: Sequence[int], numbers: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """The pictures of these numbers, which rise, and the numbers. Parts that hold none of them are not opened.

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
    """The numbers of these blocks, which rise, and their pictures."""
    numbers = [number for block in blocks for number in range(block * BLOCK, min((block + 1) * BLOCK, sum(counts)))]
    for block, pairs in groupby(pick(parts, counts, numbers), key=lambda pair: pair[0] // BLOCK):
        yield block, [content for _, content in pairs]


def _hashes(what: str, parts: Sequence[Pictures], world: World) -> list[bytes]:
    """Of the pictures of each part, one behind the other."""
    mine, hashed = parts[world.rank :: world.size], []
    with progress(f"look at {what}", len(mine)) as advance:
        for part in mine:
            digests = bytearray()
            for content in part():
                digests += hashlib.sha256(content).digest()
                advance(0, f"picture {len(digests) // DIGEST:,} of a part")
            hashed.append(bytes(digests))
            advance(1)
    return _gathered(hashed, world, len(parts))


def _gathered(mine: list[T], world: World, total: int) -> list[T]:
    """What the processes found of `total` items, of which each had every `world.size`-th."""
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
            continue  # counted by whoever reads: its number is not there
        if side is not None:
            enlarged += min(image.size) < side
            image = Image.fromarray(fit(image, side, side))
        images.append(image)
        numbers.append(number)
    features_ND = network(images) if images else torch.zeros(0, 0)
    tensors = {"features": features_ND.contiguous(), "numbers": torch.tensor(numbers, dtype=torch.long)}
    metadata = {"pictures": str(len(block)), "enlarged": str(enlarged), "checksum": _checksum(tensors)}
    write_aside(path, save(tensors, metadata))


def _read(path: Path, warn: Callable[[str], None]) -> tuple[Tensor, Tensor, int, int] | None:
    """Features, numbers, how many pictures the block has and how many were enlarged; None if it is not there, or damaged."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in ("features", "numbers")}
        if metadata["checksum"] != _checksum(tensors):
            raise ValueError("its content is not what was written")
        return tensors["features"], tensors["numbers"], int(metadata["pictures"]), int(metadata["enlarged"])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        warn(f"{path} is damaged ({error}): its features are computed again.")
        return None


def _join(blocks: list[Path], counts: tuple[int, ...], warn: Callable[[str], None]) -> Features:
    features, numbers, total, enlarged = [], [], 0, 0
    for path in blocks:
        block = _read(path, warn)
        assert block is not None, f"{path} was just written, and cannot be read"
        if len(block[1]):
            features.append(block[0])
        numbers.append(block[1] + total)
        total += block[2]
        enlarged += block[3]
    fingerprint = hashlib.sha256("".join(path.stem for path in blocks).encode()).hexdigest()[:16]
    features_ND = torch.cat(features) if features else torch.zeros(0, 0)
    return Features(features_ND, torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.long), counts, enlarged, fingerprint)


def _checksum(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()
