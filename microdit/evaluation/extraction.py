"""Features of many pictures: shared among processes, kept on the disk, so that whoever is stopped goes on and a set is seen once.

The pictures go through in blocks. A block's file is named by a hash of all that its features depend on (the network's weights, the
resizing, the pictures' bytes), so a file is right or not there: nothing can be out of date. One that is damaged is made again.

Shapes: N pictures, D features.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import safetensors
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from microdit.data.images import Rejected, decode, fit
from microdit.distributed import World
from microdit.evaluation.image_features import ImageFeatures
from microdit.files import write_aside

BLOCK = 256  # pictures


@dataclass(frozen=True)
class Features:
    """Of the pictures that could be read: `numbers_N` says which of those that came. `enlarged` of them were smaller than wanted."""

    features_ND: Tensor
    numbers_N: Tensor
    total: int
    enlarged: int
    fingerprint: str  # of the pictures

    @property
    def left_out(self) -> int:
        return self.total - len(self.numbers_N)


def feature_cache() -> Path:
    """Where features of reference sets are kept: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "microdit" / "features"


def extract(
    network: ImageFeatures,
    pictures: Iterable[bytes],
    side: int | None,
    folder: Path,
    world: World,
    warn: Callable[[str], None],
    on_picture: Callable[[int], None] | None = None,
) -> Features:
    """Of files' bytes, in their order, cut to squares of `side` pixels, if given. Every process must call this, and gets all.

    `folder`: where blocks are kept, visible to all processes. `on_picture(n)`: after n more, those that were there already included.
    """
    blocks: list[Path] = []
    for number, block in enumerate(_blocks(pictures)):
        blocks.append(folder / f"{_key(network, side, block)}.safetensors")
        if number % world.size == world.rank and _read(blocks[-1], warn) is None:
            _write(blocks[-1], network, side, block)
        if on_picture:
            on_picture(len(block))
    world.wait_for_all()
    return _join(blocks, warn)


def _blocks(pictures: Iterable[bytes]) -> Iterator[tuple[bytes, ...]]:
    rest = iter(pictures)
    while block := tuple(islice(rest, BLOCK)):
        yield block


def _key(network: ImageFeatures, side: int | None, block: tuple[bytes, ...]) -> str:
    digest = hashlib.sha256(f"{network.name} {network.fingerprint} {network.resize} {side}".encode())
    for content in block:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:32]


def _write(path: Path, network: ImageFeatures, side: int | None, block: tuple[bytes, ...]) -> None:
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


def _join(blocks: list[Path], warn: Callable[[str], None]) -> Features:
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
    return Features(features_ND, torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.long), total, enlarged, fingerprint)


def _checksum(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()
