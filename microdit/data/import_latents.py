"""Import latents and caption vectors that the code of 2407.15811 has encoded, as an encoded set, without encoding anything again.

Its `precompute.py` writes MDS shards with the columns `caption`, `caption_latents` (the text encoder's whole context, in float16 or
float32), and `latents_256` and `latents_512` (times the autoencoder's scaling factor). Each shard becomes one of ours. The encoders that
are named must be those that were used: the number of values must fit, and captions are embedded again and compared.

Shape legend: B batch, C channels, H W height and width, L caption tokens, E channels of a token.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from microdit.data.decode import TargetSizes
from microdit.data.encode import EncodeSettings, make_set, plan_of, usable
from microdit.data.encode_plan import EncodeEvents, OnProgress
from microdit.data.manifest import Manifest
from microdit.data.packing import CaptionPacking, NumberPacking
from microdit.data.shard_writer import EncodedChunk, Packer, PartInWork, ShardsThread
from microdit.data.sources.base import Part, Record, Source
from microdit.data.sources.mds import INDEX, LATENTS, MdsShard, read_shards, records_of_shard, text_of, values_of
from microdit.data.sources.untrusted_files import TOO_LARGE
from microdit.encoders.autoencoder import Autoencoder
from microdit.encoders.text import TextEncoder
from microdit.errors import UserError
from microdit.io.places import Place

CAPTION = "caption"
VECTORS = "caption_latents"
CHUNK = 256  # records
COMPARED = 16  # captions that are embedded again
ALIKE = 0.95  # least cosine of stored and repeated vectors: the authors encode in bfloat16, whose cosines are above 0.99
WRONG_SIZE = "latents or caption vectors of another size"
NOT_FINITE = "latents or caption vectors that are not finite"


def latents_source(folder: Path) -> tuple[Source, tuple[int, ...]]:
    """Return a source with one part for each shard, and the resolutions of its latents. A record's `image` holds its stored numbers.

    Raises UserError if the folder has no index, or one without latents, captions and their vectors.
    """
    if not (folder / INDEX).is_file():
        raise UserError(f"There is no {INDEX} in {folder}: give the folder of MDS shards that the paper's precompute.py wrote.")
    shards = read_shards(folder)
    columns = shards[0].columns
    resolutions = tuple(sorted(int(found[1]) for name in columns if (found := LATENTS.fullmatch(name))))
    missing = [name for name in (CAPTION, VECTORS, *(() if resolutions else ("latents_256",))) if name not in columns]
    if missing:
        raise UserError(f"{folder / INDEX} has no column {', '.join(missing)}; it has {', '.join(columns)}. See 'microdit data encode'.")
    if any(shard.columns != columns for shard in shards):
        raise UserError(f"{folder / INDEX} lists shards with different columns: import them one by one, from folders of their own.")
    parts = [
        Part(shard.file, partial(_records, folder, shard, resolutions), partial(iter, (folder / INDEX, folder / shard.file)))
        for shard in shards
    ]
    return Source(folder.absolute().name, parts), resolutions


def import_latents(
    folder: Path,
    out: Path | Place,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder,
    packing: tuple[NumberPacking, CaptionPacking] = ("fp16", "full"),
    share: tuple[int, int] = (0, 1),
    events: EncodeEvents | None = None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> Manifest | None:
    """Import this process's share of a folder's shards into `out`, an encoded set. The return value is that of `encode_source`.

    Raises UserError as `encode_source` and `latents_source` do, and if the first captions, embedded again, differ from what is stored.
    """
    events = events or EncodeEvents()
    source, resolutions = latents_source(folder)
    settings = EncodeSettings(resolutions, *packing)
    shapes = _Shapes(autoencoder, text_encoder, resolutions)
    _compare(source, shapes, text_encoder, folder)
    plan = plan_of(source, settings, TargetSizes.of(resolutions, 0, False, autoencoder.downsampling), autoencoder, text_encoder)
    packer = Packer(resolutions, *packing, source.caption_weights)

    def make_shards(unfinished: Path, missing: list[int], on_progress: OnProgress) -> None:
        with ShardsThread(unfinished, packer, on_progress) as shards:
            for number in missing:
                _import_part(PartInWork(number, source.parts[number].name), source, shapes, text_encoder, shards)

    return make_set(source, out, plan, make_shards, share, events, warn)


class _Shapes:
    """The shapes of what a record stores: latents of each resolution, (C, H, W), and the caption's vectors, (L, E)."""

    def __init__(self, autoencoder: Autoencoder, text_encoder: TextEncoder, resolutions: Sequence[int]):
        sides = {resolution: resolution // autoencoder.downsampling for resolution in resolutions}
        self.resolutions = tuple(resolutions)
        self.shapes = [(autoencoder.channels, side, side) for side in sides.values()] + [(text_encoder.max_tokens, text_encoder.channels)]

    def numbers(self, record: Record) -> list[np.ndarray] | str:
        """Return the latents by resolution and the caption's vectors, or what is wrong with them."""
        sizes, content = _sizes(record.image, len(self.shapes))
        found = []
        for size, shape in zip(sizes, self.shapes, strict=True):
            kind = {2: "<f2", 4: "<f4"}.get(size // int(np.prod(shape)) if size % int(np.prod(shape)) == 0 else 0)
            if kind is None:
                return WRONG_SIZE
            found.append(np.frombuffer(content[:size], kind).reshape(shape).astype(np.float32))
            content = content[size:]
        return found if all(np.isfinite(numbers).all() for numbers in found) else NOT_FINITE


def _import_part(part: PartInWork, source: Source, shapes: _Shapes, text_encoder: TextEncoder, shards: ShardsThread) -> None:
    records = usable(source.parts[part.number], source.caption_weights, part)
    while True:
        refused = len(part.rejected)
        batch = list(islice(records, CHUNK))
        seen = len(batch) + len(part.rejected) - refused
        kept: list[tuple[Record, list[np.ndarray]]] = []
        for record in batch:
            numbers = shapes.numbers(record)
            if isinstance(numbers, str):
                part.rejected.append((record.key, numbers))
            else:
                kept.append((record, numbers))
        last = len(batch) < CHUNK
        shards.put(part, _chunk(kept, shapes, text_encoder, part), seen, last)
        if last:
            return


def _chunk(kept: list[tuple[Record, list[np.ndarray]]], shapes: _Shapes, text_encoder: TextEncoder, part: PartInWork) -> EncodedChunk:
    records = [record for record, _ in kept]
    ids = text_encoder.tokenize([record.captions[CAPTION] for record in records]) if records else []
    lengths = [len(tokens) for tokens in ids]
    part.counts.update(captions=len(ids), tokens=sum(lengths), captions_cut=sum(n >= text_encoder.max_tokens for n in lengths))
    everyone = list(range(len(kept)))
    stacked = [torch.from_numpy(np.stack([numbers[place] for _, numbers in kept])) for place in range(len(shapes.shapes)) if kept]
    latents = [(everyone, resolution, stack) for resolution, stack in zip(shapes.resolutions, stacked, strict=False)]
    return EncodedChunk(records, [0] * len(kept), ids, [(everyone, stacked[-1])] if kept else [], latents if kept else [], None)


def _compare(source: Source, shapes: _Shapes, text_encoder: TextEncoder, folder: Path) -> None:
    """Raise UserError if the text encoder does not give the vectors that are stored with the first captions."""
    found = (
        (record, shapes.numbers(record)) for part in source.parts for record in usable(part, source.caption_weights, PartInWork(0, ""))
    )
    first = [(record, numbers[-1]) for record, numbers in islice(found, COMPARED) if not isinstance(numbers, str)]
    if not first:
        raise UserError(
            f"{folder} holds {WRONG_SIZE} than those of {text_encoder.name}, (tokens, channels) = {shapes.shapes[-1]}, and of the "
            f"autoencoder, (channels, height, width) = {shapes.shapes[0]}: name the encoders that made them."
        )
    ids = text_encoder.tokenize([record.captions[CAPTION] for record, _ in first])
    again_BLE = text_encoder.embed_full(ids).float().cpu()
    stored_BLE = torch.from_numpy(np.stack([vectors for _, vectors in first]))
    cosine = min(
        _cosine(again[: len(tokens)], stored[: len(tokens)]) for again, stored, tokens in zip(again_BLE, stored_BLE, ids, strict=True)
    )
    if not cosine >= ALIKE:
        raise UserError(
            f"The caption vectors in {folder} are not those of {text_encoder.name}: of {len(first)} captions embedded again, one has a "
            f"cosine of {cosine:.2f} with what is stored, where the same encoder gives over {ALIKE}. Name the encoder that made them."
        )


def _cosine(ours_LE: Tensor, theirs_LE: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(ours_LE.flatten(), theirs_LE.flatten(), dim=0))


def _records(folder: Path, shard: MdsShard, resolutions: Sequence[int]) -> Iterator[Record]:
    wanted = [*(f"latents_{resolution}" for resolution in resolutions), VECTORS]

    def record(key: str, sample: bytes | None) -> Record:
        if sample is None:
            return Record(key, {}, b"", TOO_LARGE)
        values = {name: (encoding, value) for name, encoding, value in values_of(sample, shard)}
        encoding, caption = values[CAPTION]
        text = text_of(caption, encoding)
        stored = [values[name][1] for name in wanted]
        return Record(key, {CAPTION: text if isinstance(text, str) else ""}, _joined(stored))

    return records_of_shard(folder, shard, record)


def _joined(values: Sequence[bytes]) -> bytes:
    """Return several values as one: their sizes, then their contents."""
    return np.array([len(value) for value in values], "<u4").tobytes() + b"".join(values)


def _sizes(joined: bytes, count: int) -> tuple[list[int], bytes]:
    return np.frombuffer(joined, "<u4", count).tolist(), joined[4 * count :]
