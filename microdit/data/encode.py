"""Encode once: a source's pictures to latents, its captions to token vectors, in shards that are whole or absent.

Notable:
- each part of the source becomes one shard, whichever process encodes it: 1 rank or 64 give the same files, and a run that was killed
  goes on behind the last whole shard;
- memory holds a few batches, whatever the size of the source; files are decoded in worker processes meanwhile;
- every record is either kept or rejected with a reason, and the card says how many of each.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from microdit.data.card import CARD, FORMAT, write_card
from microdit.data.decoding import Decoder, Wanted
from microdit.data.forms import CaptionForm, LatentForm, pack_ids, pack_latents, pack_text
from microdit.data.pixels import normalise
from microdit.data.shards import Row, ShardWriter
from microdit.data.sources import Part, Record, Source
from microdit.encoders.autoencoder import Autoencoder
from microdit.encoders.text import TextEncoder
from microdit.errors import UserError
from microdit.files import sha256_of, write_aside

CHUNK_BATCHES = 4  # batches in a chunk: captions are sorted by length inside it, so that little is padded
MAX_CAPTION = 4000  # characters; text encoders take 32 to 512 tokens

Progress = Callable[[int, int], None]  # so many more records, so many more parts


@dataclass(frozen=True)
class EncodeSettings:
    """How to encode. `min_side` rejects smaller pictures; `buckets` keeps aspect ratios, roughly, instead of cutting squares."""

    resolutions: tuple[int, ...]
    latents: LatentForm = "int8"
    captions: CaptionForm = "int8"
    min_side: int = 0
    buckets: bool = False
    batch_size: int = 64
    workers: int = 0


def encode_source(
    source: Source,
    out: Path,
    settings: EncodeSettings,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder,
    rank: int = 0,
    world: int = 1,
    on_progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Encode this rank's parts into the folder `out`; the rank that finds all shards whole completes it and gets the card, others None.

    Raises UserError if `out` exists, if an unfinished one has other settings, if nothing was kept, or if the disk refuses.
    """
    wanted = Wanted.of(settings.resolutions, settings.min_side, settings.buckets, autoencoder.downsampling)
    plan = {
        "format": FORMAT,
        "source": source.name,
        "license": source.license,
        "parts": [part.name for part in source.parts],
        "caption_weights": source.caption_weights,
        "settings": {**asdict(settings), "resolutions": list(settings.resolutions), "workers": None},
        "sizes": [{str(r): list(size) for r, size in bucket.items()} for bucket in wanted.buckets],
        "latent_channels": autoencoder.channels,
        "downsampling": autoencoder.downsampling,
        "text_channels": text_encoder.channels,
        "max_tokens": text_encoder.max_tokens,
        "autoencoder": {"name": autoencoder.name, "fingerprint": autoencoder.fingerprint},
        "text_encoder": {"name": text_encoder.name, "fingerprint": text_encoder.fingerprint},
    }
    if out.exists():
        raise UserError(f"{out} exists already: delete it, or choose another --out.")
    folder = out.with_name(f".{out.name}.part")
    try:
        _begin(folder, plan)
        encoder = _Encoder(source, settings, wanted, autoencoder, text_encoder)
        for number in range(rank, len(source.parts), world):
            if not _manifest(folder, number).is_file():
                encoder.encode_part(source.parts[number], folder, number, on_progress)
            elif on_progress:
                on_progress(0, 1)
        return _complete(folder, out, plan)
    except OSError as error:
        raise UserError(
            f"Encoding into {folder} stopped: {error}. Put that right (make room, if the disk is full), and run the same command to go on."
        ) from error


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Make the folder, or find that an earlier run with the same plan began it."""
    path = folder / "plan.json"
    content = json.dumps(plan, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_aside(path, content.encode())
    begun = json.loads(path.read_text())
    different = [key for key in plan if begun.get(key) != json.loads(content)[key]]
    if different:
        raise UserError(
            f"{folder} was begun with other settings ({', '.join(different)} differ): delete it, or use the same settings to go on."
        )


def _manifest(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.json"


def _complete(folder: Path, out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """When all shards are there: write the card, give the folder its name. Two ranks may do so at once: both write the same."""
    manifests = [_manifest(folder, number) for number in range(len(plan["parts"]))]
    try:
        if not all(path.is_file() for path in manifests):
            return None
        shards = [json.loads(path.read_text()) for path in manifests]
        if not any(shard["rows"] for shard in shards):
            rejected = sum((Counter(shard["rejected"]) for shard in shards), Counter())
            raise UserError(f"The source {plan['source']} gave no picture that could be kept; rejected: {dict(rejected) or 'none either'}.")
        card = write_card(folder, plan, shards)
        folder.rename(out)
    except FileNotFoundError:
        if not (out / CARD).is_file():
            raise
        return None  # another rank was faster
    return card


class _Encoder:
    """The frozen encoders and what is asked of them."""

    def __init__(self, source: Source, settings: EncodeSettings, wanted: Wanted, autoencoder: Autoencoder, text_encoder: TextEncoder):
        self.source, self.settings, self.wanted = source, settings, wanted
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self.decoder = Decoder(wanted, settings.workers)

    def encode_part(self, part: Part, folder: Path, number: int, on_progress: Progress | None) -> None:
        """Write shard `number`, then its manifest: only with a manifest is it whole."""
        name = f"shard-{number:05d}"
        writer = ShardWriter(folder / f".{name}.{os.getpid()}.part", list(self.settings.resolutions))
        rejected: list[tuple[str, str]] = []
        tally: Counter[str] = Counter()
        try:
            for records, decoded in self.decoder.chunks(self._usable(part, rejected), self.settings.batch_size * CHUNK_BATCHES):
                kept = []
                for record, outcome in zip(records, decoded, strict=True):
                    if isinstance(outcome, str):
                        rejected.append((record.key, outcome))
                    else:
                        kept.append((record, outcome))
                for row in self._encode([record for record, _ in kept], [outcome for _, outcome in kept], tally):
                    writer.write(row)
                if on_progress:
                    on_progress(len(records), 0)
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        self._publish(writer, folder, name, part, rejected, tally)
        if on_progress:
            on_progress(0, 1)

    def _publish(
        self, writer: ShardWriter, folder: Path, name: str, part: Part, rejected: list[tuple[str, str]], tally: Counter[str]
    ) -> None:
        path = folder / f"{name}.arrow"
        manifest = {
            "name": path.name,
            "part": part.name,
            "rows": writer.rows,
            "seen": writer.rows + len(rejected),
            "rejected": dict(sorted(Counter(reason for _, reason in rejected).items())),
            "buckets": {str(bucket): writer.buckets[bucket] for bucket in sorted(writer.buckets)},
            "bytes": writer.path.stat().st_size,
            "sha256": sha256_of(writer.path),
            **{key: tally[key] for key in ("captions", "tokens", "captions_cut")},
        }
        writer.path.replace(path)
        if rejected:
            lines = "".join(json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in rejected)
            write_aside(folder / f"{name}.rejected.jsonl", lines.encode())
        write_aside(folder / f"{name}.json", json.dumps(manifest).encode())

    def _usable(self, part: Part, rejected: list[tuple[str, str]]) -> Iterator[Record]:
        """The records of a part whose text can be used; the others are rejected here."""
        seen: set[str] = set()
        for record in part.records():
            problem = record.problem or ("duplicate key" if record.key in seen else "")
            seen.add(record.key)
            captions = {name: _clean(record.captions[name]) for name in self.source.caption_weights if record.captions.get(name)}
            captions = {name: text for name, text in captions.items() if text}
            problem = problem or ("" if captions else "no caption")
            if problem:
                rejected.append((record.key, problem))
            else:
                yield Record(record.key, captions, record.image)

    def _encode(self, records: list[Record], pictures: list[tuple[int, list[NDArray[np.uint8]]]], tally: Counter[str]) -> Iterator[Row]:
        """`pictures` holds each record's bucket and its pixels at every resolution, (H, W, 3)."""
        texts = iter(self._encode_text([caption for record in records for caption in record.captions.values()], tally))
        latents = self._encode_pictures(pictures)
        for record, (bucket, _), blobs in zip(records, pictures, latents, strict=True):
            weights = [self.source.caption_weights[name] for name in record.captions]
            captions = list(record.captions.values())
            yield Row(record.key, bucket, captions, weights, [next(texts) for _ in captions], blobs)

    def _encode_pictures(self, pictures: list[tuple[int, list[NDArray[np.uint8]]]]) -> list[dict[int, bytes]]:
        """For each picture, its latents' bytes by resolution. Batches hold pictures of one bucket."""
        blobs: list[dict[int, bytes]] = [{} for _ in pictures]
        by_bucket: dict[int, list[int]] = {}
        for index, (bucket, _) in enumerate(pictures):
            by_bucket.setdefault(bucket, []).append(index)
        for indices in by_bucket.values():
            for batch in _slices(indices, self.settings.batch_size):
                for which, resolution in enumerate(self.settings.resolutions):
                    pixels_BCHW = normalise(np.stack([pictures[i][1][which] for i in batch]))
                    latents_BCHW = self.autoencoder.encode(pixels_BCHW).float().cpu().numpy()
                    for index, latents_CHW in zip(batch, latents_BCHW, strict=True):
                        blobs[index][resolution] = pack_latents(latents_CHW, self.settings.latents)
        return blobs

    def _encode_text(self, captions: list[str], tally: Counter[str]) -> list[bytes]:
        """Each caption's bytes. Batches hold captions of about one length."""
        form = self.settings.captions
        ids = self.text_encoder.tokenize(captions)
        tally.update(
            captions=len(ids), tokens=sum(map(len, ids)), captions_cut=sum(len(tokens) >= self.text_encoder.max_tokens for tokens in ids)
        )
        if form == "ids":
            return [pack_ids(tokens) for tokens in ids]
        blobs = [b""] * len(ids)
        by_length = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        for batch in _slices(by_length, self.settings.batch_size):
            text_BLE = self._embed([ids[index] for index in batch])
            for index, text_LE in zip(batch, text_BLE.float().cpu().numpy(), strict=True):
                length = len(text_LE) if form == "full" else len(ids[index])
                blobs[index] = pack_text(text_LE[:length], form)
        return blobs

    def _embed(self, ids: list[list[int]]) -> Tensor:
        with torch.no_grad():
            return self.text_encoder.embed_full(ids) if self.settings.captions == "full" else self.text_encoder.embed(ids)[0]


def _clean(caption: str) -> str:
    """One line of printable text, at most MAX_CAPTION characters; empty if it is no Unicode text at all (lone surrogates)."""
    if not caption.isascii() and any("\ud800" <= character <= "\udfff" for character in caption[:MAX_CAPTION]):
        return ""
    return " ".join("".join(c if c.isprintable() else " " for c in caption[:MAX_CAPTION]).split())


def _slices(items: list[int], size: int) -> Iterator[list[int]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
