"""How large are pictures stored as JPEG or WebP, how far are they from the exact pixels, and how fast are they decoded?

    python benchmarks/stored_pictures.py [SOURCE ...] [--resolution 512]

By default of three photographs: two of scikit-learn (enlarged from a height of 427 pixels) and one of matplotlib. SOURCE is as for
`microdit data encode`; the first 100 pictures of each count. Errors are root mean squares in steps of 8-bit pixels, of which there are 255.
"""

import argparse
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microdit.data.decode import decode, fit
from microdit.data.packing import NumberPacking, pack_latents, unpack
from microdit.data.sources.open import open_source
from microdit.data.stored_pictures import PICTURES, pack_picture, unpack_picture

QUALITIES = (80, 90, 95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=str)
    parser.add_argument("--resolution", type=int, default=512)
    args = parser.parse_args()
    side = args.resolution
    pictures = [fit(decode(content), side, side) for content in contents(args.sources)]
    exact = [(picture.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1) for picture in pictures]
    print(f"{len(pictures)} pictures of {side} x {side}: mean bytes, root mean square error, milliseconds of one core to decode")
    exactly: tuple[NumberPacking, ...] = ("fp16", "int8")
    for numbers in exactly:
        blobs = [pack_latents(one, numbers) for one in exact]
        back = [127.5 * unpack([memoryview(blob)], side * side, numbers)[0][0].numpy().reshape(3, side, side) + 127.5 for blob in blobs]
        print(row(numbers, blobs, back, pictures))
    for packing in PICTURES:
        for quality in QUALITIES:
            blobs = [pack_picture(one, packing, quality) for one in exact]
            start = time.process_time()
            decoded = [np.frombuffer(unpack_picture(memoryview(blob), side, side, packing), np.uint8) for blob in blobs]
            milliseconds = 1000 * (time.process_time() - start) / len(blobs)
            back = [pixels.reshape(3, side, side).astype(np.float32) for pixels in decoded]
            print(row(f"{packing} {quality}", blobs, back, pictures), f"{milliseconds:7.1f}")


def contents(sources: list[str]) -> Iterator[bytes]:
    if not sources:
        from matplotlib.cbook import get_sample_data

        found = find_spec("sklearn")
        if found is None or found.origin is None:
            raise SystemExit("Two of the photographs come with scikit-learn: pip install scikit-learn, or name a SOURCE.")
        folder = Path(found.origin).parent / "datasets" / "images"
        yield from ((folder / name).read_bytes() for name in ("china.jpg", "flower.jpg"))
        yield Path(get_sample_data("grace_hopper.jpg", asfileobj=False)).read_bytes()
    for source in sources:
        records = (record for part in open_source(source).parts for record in part.records() if not record.problem)
        yield from (record.image for record in islice(records, 100))


def row(name: str, blobs: list[bytes], back_CHW: list[NDArray[Any]], pictures_HWC: list[NDArray[np.uint8]]) -> str:
    squares = [np.mean((one.transpose(1, 2, 0) - picture) ** 2) for one, picture in zip(back_CHW, pictures_HWC, strict=True)]
    return f"{name:12}{np.mean([len(blob) for blob in blobs]):10,.0f}{np.sqrt(np.mean(squares)):8.2f}"


if __name__ == "__main__":
    main()
