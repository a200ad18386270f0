"""Read pictures from folders of the MDS format, which the library `mosaicml-streaming` writes and the paper's code uses.

A folder holds shards and an `index.json` with their names and columns. A shard is a number of samples, their offsets, a description, and
the samples one after the other; it may be compressed, and is read as a stream, with one sample in memory. Columns of pickled objects are
never opened.
"""

import io
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from PIL import Image

from microdit.data.sources.base import END, Part, Record, Source
from microdit.data.sources.compressed import CompressedStream, Stream
from microdit.data.sources.lists import caption_column, check_captions
from microdit.data.sources.metadata import from_fields, url_in
from microdit.data.sources.samples import NO_IMAGE
from microdit.data.sources.untrusted_files import (
    LARGEST_FILE,
    LARGEST_TEXT,
    TOO_LARGE,
    FoundFiles,
    Refused,
    kind_of,
    open_file,
    read_file,
    roots_of,
    sum_of_kinds,
)
from microdit.errors import UserError
from microdit.io.untrusted_text import parse_json, parse_json_object

INDEX = "index.json"
DAMAGED = "shard is damaged from here on"
IMAGES = ("jpeg", "png", "pil", "bytes")  # encodings of columns that may hold pictures
IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "picture")
TEXTS = ("str", "json")
LATENTS = re.compile(r"latents_(\d{2,4})")  # columns of the paper's code, by resolution in pixels
MOST_SAMPLES = 50_000_000  # of a shard
MOST_PIXELS = 100_000_000


@dataclass(frozen=True)
class MdsShard:
    """A shard as the index describes it. `sizes` are the bytes of the columns' values, None where they differ."""

    file: str
    columns: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]
    samples: int


def is_mds(folder: Path) -> bool:
    """Return whether a folder is one of the MDS format."""
    shards = _index_of(folder).get("shards") if (folder / INDEX).is_file() else None
    return isinstance(shards, list) and bool(shards) and isinstance(shards[0], dict) and shards[0].get("format") == "mds"


def mds_source(folder: Path, found: FoundFiles, captions: dict[str, float] | None = None) -> Source:
    """Return a source with one part for each shard of a folder, whose files are `found`.

    Raises UserError if the index is damaged, or if its columns hold no pictures or no captions.
    """
    shards = read_shards(folder)
    columns = dict(zip(shards[0].columns, shards[0].encodings, strict=True))
    image = _image_column(columns, folder)
    texts = [name for name, encoding in columns.items() if encoding in TEXTS]
    weights = captions or {caption_column(texts, str(folder / INDEX)): 1.0}
    check_captions(texts, weights, str(folder / INDEX))
    parts = [
        Part(shard.file, partial(_read, folder, shard, image, tuple(weights)), partial(iter, (folder / INDEX, folder / shard.file)))
        for shard in shards
    ]
    names = {INDEX, *(shard.file for shard in shards)}
    others = Counter(kind_of(name) for name in map(os.fsdecode, found.others.to_pylist()) if name not in names)
    images = Counter(listed.problem or kind_of(listed.file) for listed in found.images[:])
    return Source(folder.absolute().name, parts, weights, passed_over=sum_of_kinds(found.passed_over, images, others))


def read_shards(folder: Path) -> list[MdsShard]:
    """Return the shards that the index of a folder describes. Raises UserError if it is damaged."""
    try:
        return [_shard_of(entry, folder) for entry in _index_of(folder)["shards"]]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} is damaged, or of another format than MDS: {error!r}. Fetch it again.") from error


def _index_of(folder: Path) -> dict[str, Any]:
    """Return the index of a folder; empty if it cannot be read."""
    content, _ = read_file(folder / INDEX, roots_of(folder))
    try:
        return parse_json_object(content)
    except ValueError:
        return {}


def _shard_of(entry: dict[str, Any], folder: Path) -> MdsShard:
    raw, zipped = entry["raw_data"]["basename"], (entry.get("zip_data") or {}).get("basename")
    file = zipped if zipped and not (folder / raw).is_file() else raw
    if entry["format"] != "mds" or not all(isinstance(name, str) for name in (file, *entry["column_names"])):
        raise ValueError(f"a shard of the format {entry['format']}")
    sizes = tuple(size if size is None else int(size) for size in entry["column_sizes"])
    shard = MdsShard(file, tuple(entry["column_names"]), tuple(entry["column_encodings"]), sizes, int(entry["samples"]))
    if not len(shard.columns) == len(shard.encodings) == len(shard.sizes) or not 0 <= shard.samples <= MOST_SAMPLES:
        raise ValueError("columns without encodings or sizes")
    return shard


def _image_column(columns: dict[str, str], folder: Path) -> str:
    fitting = [name for name, encoding in columns.items() if encoding.partition(":")[0] in IMAGES]
    for name in (*IMAGE_NAMES, *fitting):
        if name in fitting and (name in IMAGE_NAMES or len(fitting) == 1):
            return name
    described = ", ".join(f"{name} ({encoding})" for name, encoding in columns.items())
    what = "several columns" if fitting else "no column"
    advice = "Latents and caption vectors are imported by 'microdit data import-latents'" if any(map(LATENTS.fullmatch, columns)) else ""
    raise UserError(f"{folder / INDEX} has {what} of pictures: {described}. {advice or 'Use a folder with the pictures'}.")


def _read(folder: Path, shard: MdsShard, image: str, wanted: Sequence[str]) -> Iterator[Record]:
    return records_of_shard(folder, shard, lambda key, sample: _record(key, sample, shard, image, wanted))


def records_of_shard(folder: Path, shard: MdsShard, record: Callable[[str, bytes | None], Record]) -> Iterator[Record]:
    """Yield `record(key, sample)` for each sample of a shard, and a record with a problem where the shard cannot be read any further.

    A sample is None if it is too large.
    """
    row = 0
    try:
        with open_file(folder / shard.file, roots_of(folder)) as file:
            for sample in _samples(_uncompressed(file, shard.file), shard):
                yield record(f"{shard.file}/{row}", sample)
                row += 1
    except Refused as refused:
        yield Record(f"{shard.file}/{row}{END}", {}, b"", refused.reason)
    except (pa.ArrowException, OSError, EOFError, ValueError, struct.error):
        yield Record(f"{shard.file}/{row}{END}", {}, b"", DAMAGED)


def _uncompressed(file: BinaryIO, name: str) -> Stream:
    suffix = Path(name).suffix
    if suffix == ".gz":
        return CompressedStream(file, "gzip")
    if suffix == ".bz2":
        return CompressedStream(file, "bzip2")
    if suffix == ".zstd":
        return CompressedStream(file, "zstd")
    if suffix != ".mds":
        raise Refused(f"shard is compressed as {suffix[:10]}, which is not read")
    return file


def _samples(stream: Any, shard: MdsShard) -> Iterator[bytes | None]:
    """Yield each sample, or None in place of one that is too large. Raises ValueError or EOFError where the shard is damaged."""
    (count,) = struct.unpack("<I", _exactly(stream, 4))
    if count != shard.samples:
        raise ValueError("another number of samples than the index says")
    offsets_N = np.frombuffer(_exactly(stream, 4 * (count + 1)), "<u4")
    place = 4 + 4 * (count + 1)
    for number in range(count):
        begin, end = int(offsets_N[number]), int(offsets_N[number + 1])
        if not place <= begin <= end:
            raise ValueError("offsets that do not rise")
        _skip(stream, begin - place)
        if end - begin > LARGEST_FILE + LARGEST_TEXT:
            _skip(stream, end - begin)
            yield None
        else:
            yield _exactly(stream, end - begin)
        place = end


def _record(key: str, sample: bytes | None, shard: MdsShard, image: str, wanted: Sequence[str]) -> Record:
    if sample is None:
        return Record(key, {}, b"", TOO_LARGE)
    fields: dict[str, Any] = {}
    picture = b""
    for name, encoding, value in values_of(sample, shard):
        if name == image:
            picture = _from_pil(value) if encoding == "pil" else value
        elif encoding in TEXTS:
            fields[name] = text_of(value, encoding)
    captions, problem = from_fields(fields, wanted)
    return Record(key, captions, picture, problem if picture else NO_IMAGE, url=url_in(fields))


def values_of(sample: bytes, shard: MdsShard) -> Iterator[tuple[str, str, bytes]]:
    """Yield name, encoding and content of each value: first come the sizes of those whose size differs, then all contents."""
    varying = sum(size is None for size in shard.sizes)
    sizes = iter(struct.unpack_from(f"<{varying}I", sample))
    place = 4 * varying
    for name, encoding, fixed in zip(shard.columns, shard.encodings, shard.sizes, strict=True):
        size = next(sizes) if fixed is None else fixed
        if size < 0 or place + size > len(sample):
            raise ValueError("a value reaches beyond its sample")
        yield name, encoding, sample[place : place + size]
        place += size


def text_of(value: bytes, encoding: str) -> Any:
    try:
        text = value.decode()
        return parse_json(text) if encoding == "json" else text
    except UnicodeDecodeError:
        return "\ud800"  # a lone surrogate, which is reported as not UTF-8
    except ValueError:
        return None


def _from_pil(value: bytes) -> bytes:
    """Return a picture that was stored as its pixels as a PNG file; nothing if it makes no sense."""
    if len(value) < 12:
        return b""
    width, height, length = struct.unpack_from("<3I", value)
    mode, pixels = value[12 : 12 + length], value[12 + length :]
    if (
        length > 4
        or mode not in (b"L", b"RGB", b"RGBA")
        or width * height * len(mode) != len(pixels)
        or not 0 < width * height <= MOST_PIXELS
    ):
        return b""
    content = io.BytesIO()
    Image.frombytes(mode.decode(), (width, height), pixels).save(content, "PNG", compress_level=1)
    return content.getvalue()


def _exactly(stream: Any, size: int) -> bytes:
    content: bytes = stream.read(size)
    if len(content) < size:
        raise EOFError("the shard ends too early")
    return content


def _skip(stream: Any, size: int) -> None:
    while size and (skipped := len(stream.read(min(size, 1 << 20)))):
        size -= skipped
    if size:
        raise EOFError("the shard ends too early")
