"""Encode once: a source's pictures to latents, its captions to token vectors, in shards that are whole or absent.

Files are decoded in worker processes (decoding.py), the encoders work in this thread (encode_batches.py), and what they give is packed and
written in another (packing.py): none of them waits for the next, also where one part ends and another begins.

Notable:
- each part of the source becomes one shard, whichever process encodes it: 1 rank or 64 give the same files, and a run that was killed
  goes on behind the last whole shard;
- memory holds a few batches, whatever the size of the source;
- every record is either kept or rejected with a reason, and the card says how many of each.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from microdit.data.card import CARD, FORMAT, write_card
from microdit.data.decoding import Decoder, Picture, Wanted
from microdit.data.encode_batches import BatchEncoder
from microdit.data.forms import CaptionForm, LatentForm
from microdit.data.packing import Packer, PartInWork, ShardsThread, manifest_path
from microdit.data.sources import Part, Record, Source
from microdit.devices import DTYPES
from microdit.encoders.autoencoder import Autoencoder
from microdit.encoders.text import TextEncoder
from microdit.errors import UserError
from microdit.files import from_checked_json, to_checked_json, write_aside

CPU = torch.device("cpu")
CHUNK_BATCHES = 4  # batches in a chunk: captions are sorted by length inside it, so that little is padded
MAX_CAPTION = 4000  # characters; text encoders take 32 to 512 tokens

Progress = Callable[[int, int], None]  # so many more records, so many more parts


@dataclass(frozen=True)
class EncodeSettings:
    """How to encode. `min_side` rejects smaller pictures; `buckets` keeps aspect ratios, roughly, instead of cutting squares.

    `dtype` is what the encoders compute in. An encoding can go on with another device, batch size or number of workers.
    """

    resolutions: tuple[int, ...]
    latents: LatentForm = "int8"
    captions: CaptionForm = "int8"
    min_side: int = 0
    buckets: bool = False
    dtype: str = "float32"
    device: torch.device = CPU
    batch_size: int = 64
    workers: int = 0

    def planned(self) -> dict[str, Any]:
        """What must be the same for an encoding to go on."""
        return _planned({**asdict(self), "resolutions": list(self.resolutions)})


def default_batch_size(device: torch.device, resolutions: tuple[int, ...]) -> int:
    """64, but on CUDA as many as take the memory of 128 pictures of 256 pixels a side: about 12 GB for SDXL's encoder in bfloat16, reckoned
    from its largest layers."""
    if device.type != "cuda":
        return 64
    return min(256, max(1, 128 * 256**2 // max(resolutions) ** 2))


def encode_source(
    source: Source,
    out: Path,
    settings: EncodeSettings,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder,
    share: tuple[int, int] = (0, 1),
    on_progress: Progress | None = None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any] | None:
    """Encode this process's share of the parts (its number, their count) into the folder `out`. The encoders move to the settings' device.

    The process that finds all shards whole completes the folder and gets the card, others None. `warn` is told of batches that do not fit
    the GPU, `on_progress`, by a thread, of what is written. Raises UserError if `out` exists, if an unfinished one has other settings, if
    nothing was kept, if the disk refuses, or if not even one picture fits the GPU.
    """
    wanted = Wanted.of(settings.resolutions, settings.min_side, settings.buckets, autoencoder.downsampling)
    plan = {
        "format": FORMAT,
        "source": source.name,
        "license": source.license,
        "parts": [part.name for part in source.parts],
        "caption_weights": source.caption_weights,
        "settings": settings.planned(),
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
        mine = range(share[0], len(source.parts), share[1])
        missing = [number for number in mine if not manifest_path(folder, number).is_file()]
        told = on_progress or (lambda records, parts: None)
        told(0, len(mine) - len(missing))
        if settings.device.type == "cuda":
            torch.cuda.set_device(settings.device)
        autoencoder.to(settings.device, DTYPES[settings.dtype])
        text_encoder.to(settings.device, DTYPES[settings.dtype])
        encoder = BatchEncoder(autoencoder, text_encoder, settings.device, settings.captions, settings.batch_size, warn)
        packer = Packer(settings.resolutions, settings.latents, settings.captions, source.caption_weights)
        with Decoder(wanted, settings.workers) as decoder, ShardsThread(folder, packer, told) as shards:
            _encode_parts(source, missing, settings, decoder, encoder, shards)
        return _complete(folder, out, plan)
    except OSError as error:
        raise UserError(
            f"Encoding into {folder} stopped: {error}. Put that right (make room, if the disk is full), and run the same command to go on; "
            "or choose another --out."
        ) from error


def _encode_parts(
    source: Source, numbers: list[int], settings: EncodeSettings, decoder: Decoder, encoder: BatchEncoder, shards: ShardsThread
) -> None:
    parts = [PartInWork(number, source.parts[number].name) for number in numbers]
    usable = (_usable(source.parts[part.number], source.caption_weights, part.rejected) for part in parts)
    size = settings.batch_size * CHUNK_BATCHES
    chunks = decoder.chunks(usable, size)
    for part in parts:
        for records, outcomes in chunks:
            kept: list[tuple[Record, Picture]] = []
            for record, outcome in zip(records, outcomes, strict=True):
                if isinstance(outcome, str):
                    part.rejected.append((record.key, outcome))
                else:
                    kept.append((replace(record, image=b""), outcome))  # the file is not needed any more
            encoded = encoder.encode([record for record, _ in kept], [picture for _, picture in kept], settings.resolutions)
            lengths = [len(tokens) for tokens in encoded.ids]
            cut = sum(length >= encoder.text_encoder.max_tokens for length in lengths)
            part.counts.update(captions=len(lengths), tokens=sum(lengths), captions_cut=cut)
            last = len(records) < size
            shards.put(part, encoded, len(records), last)
            if last:
                break


def _usable(part: Part, caption_weights: dict[str, float], rejected: list[tuple[str, str]]) -> Iterator[Record]:
    """The records of a part whose text can be used; the others are rejected here."""
    seen: set[str] = set()
    for record in part.records():
        problem = record.problem or ("duplicate key" if record.key in seen else "")
        seen.add(record.key)
        captions = {name: _clean(record.captions[name]) for name in caption_weights if record.captions.get(name)}
        captions = {name: text for name, text in captions.items() if text}
        problem = problem or ("" if captions else "no caption")
        if problem:
            rejected.append((record.key, problem))
        else:
            yield Record(record.key, captions, record.image)


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Make the folder, or find that an earlier run with the same plan began it."""
    path = folder / "plan.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_aside(path, to_checked_json(plan))
    begun, now = _flat(_read_begun(path, f"delete {folder}")), _flat(from_checked_json(to_checked_json(plan)))
    different = [key for key in now if begun.get(key) != now[key]]
    if "format" in different:
        raise UserError(f"{folder} was begun by another version of microdit: delete it, or let that version finish it.")
    if different:
        went = f" It was begun with --dtype {begun['dtype']}." if "dtype" in different else ""
        raise UserError(
            f"{folder} was begun with other settings ({', '.join(different)} differ): delete it, or use the same settings to go on.{went}"
        )


def _read_begun(path: Path, fix: str) -> dict[str, Any]:
    """The plan, or the manifest of a shard. Raises UserError."""
    try:
        return from_checked_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {fix}, and run the same command again.") from error


def _flat(plan: dict[str, Any]) -> dict[str, Any]:
    """With the settings among the rest."""
    return {**_planned(plan.get("settings", {})), **{key: value for key, value in plan.items() if key != "settings"}}


def _planned(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what may change on the way."""
    free = ("device", "batch_size", "workers")
    return {key: value for key, value in settings.items() if key not in free}


def _complete(folder: Path, out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """When all shards are there: write the card, give the folder its name. Two ranks may do so at once: both write the same."""
    manifests = [manifest_path(folder, number) for number in range(len(plan["parts"]))]
    try:
        if not all(path.is_file() for path in manifests):
            return None
        shards = [_read_begun(path, "delete it") for path in manifests]
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


def _clean(caption: str) -> str:
    """One line of printable text, at most MAX_CAPTION characters; empty if it is no Unicode text at all (lone surrogates)."""
    if not caption.isascii() and any("\ud800" <= character <= "\udfff" for character in caption[:MAX_CAPTION]):
        return ""
    return " ".join("".join(c if c.isprintable() else " " for c in caption[:MAX_CAPTION]).split())
