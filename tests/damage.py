"""Files damaged on purpose, one bit at a time."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

ALL_BITS = range(8)


def flips(path: Path, places: Iterable[int] | None = None, bits: Iterable[int] | None = None) -> Iterator[int]:
    """Flip one bit of each byte in turn, another one from byte to byte, or each of `bits`. Yields the byte's place while it is flipped."""
    content = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at in range(len(content)) if places is None else places:
            for bit in [at * 5 % 8] if bits is None else bits:
                os.pwrite(file.fileno(), bytes([content[at] ^ 1 << bit]), at)
                yield at
                os.pwrite(file.fileno(), content[at : at + 1], at)
