"""Shards of an unfinished encoding whose part of the source is not what it was when they were made.

Encode once: a source's pictures to latents, its captions to token vectors, in shards that are whole or absent.

Files are decoded in worker processes (decoding.py), the encoders work in this thread (encode_batches.py), and what they give is packed and
written in another (packing.py): none of them waits for the next, also where one part ends and another begins.

Notable:
- each part of the source becomes one shard, whichever process encodes it: 1 rank or 64 give the same files, and a run that was killed
  goes on behind the last whole shard, and encodes anew what has changed in the source since;
- memory holds a few batches, whatever the size of the source;
- every record is either kept or rejected with a reason, and the card says how many of each.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from microdit.data.decode import DecodedImage, Decoder, TargetSizes
from microdit.data.manifest import FORMAT, MANIFEST, read_manifest, write_manifest
from microdit.data.packing import CaptionPacking, LatentPacking
from microdit.data.shard_writer import BatchEncoder, Packer, PartInWork, ShardsThread, remove_shard, shard_entry_path
from microdit.data.sources.base import Part, Record, Source, checked
from microdit.data.sources.folders import TURN
from microdit.devices import DTYPES
from microdit.encoders.autoencoder import Autoencoder
from microdit.encoders.text import TextEncoder
from microdit.errors import UserError
from microdit.io.files import from_checked_json, to_checked_json, write_aside
from microdit.io.locks import in_turn, is_held, locked, refuse_locked

MOST_NAMED = 5


def changed_shards(folder: Path, parts: Sequence[Part]) -> dict[int, str]:
    """The numbers of shards that were not made of these parts as they are now, with the names of the parts they were made of."""
    changed = {}
    for path in sorted(folder.glob("shard-*.json")):
        number = int(path.stem.removeprefix("shard-"))
        try:
            manifest = from_checked_json(path.read_bytes())
            made_of = str(manifest["part"]), manifest["fingerprint"]
        except FileNotFoundError:  # another rank has removed it, or has completed the folder
            continue
        except (ValueError, KeyError, TypeError):  # damaged, or an earlier version's, which did not say
            made_of = path.name, None
        if number >= len(parts) or made_of != (parts[number].name, parts[number].fingerprint()):
            changed[number] = made_of[0]
    return changed


def remove_changed(folder: Path, parts: Sequence[Part]) -> list[str]:
    """Remove these shards, and name the parts. Every rank does so for all before it begins: none may take another's for whole."""
    return [name for number, name in changed_shards(folder, parts).items() if remove_shard(folder, number)]


def in_words(names: list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


CPU = torch.device("cpu")
CHUNK_BATCHES = 4  # batches in a chunk: captions are sorted by length inside it, so that little is padded

Progress = Callable[[int, int], None]  # so many more records, so many more parts


@dataclass(frozen=True)
class EncodeSettings:
    """How to encode. `min_side` rejects smaller pictures; `buckets` keeps aspect ratios, roughly, instead of cutting squares.

    `dtype` is what the encoders compute in. An encoding can go on with another device, batch size or number of workers.
    """

    resolutions: tuple[int, ...]
    latents: LatentPacking = "int8"
    captions: CaptionPacking = "int8"
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

    The process that finds all shards whole completes the folder and gets the card, others None: also those of several that come when all is
    done. `warn` is told of that, of batches that do not fit the GPU and of parts that have changed since they were encoded, `on_progress`,
    by a thread, of what is written. Raises UserError if `out` exists, if an unfinished one has other settings, another process is at it or
    the others see another source, if nothing was kept, if a part changed meanwhile, if the disk refuses, or if not even one picture fits
    the GPU.
    """
    wanted = TargetSizes.of(settings.resolutions, settings.min_side, settings.buckets, autoencoder.downsampling)
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
    folder = unfinished(out)
    try:
        with ExitStack() as held:
            if _is_done(out, plan, share, warn):
                return None
            folder.mkdir(parents=True, exist_ok=True)
            with in_turn(folder / TURN):
                if _is_done(out, plan, share, warn):  # whoever had the folder until now may have finished it
                    return None
                _join(folder, plan, source.parts, share, held, warn)
                mine = range(share[0], len(source.parts), share[1])
                missing = [number for number in mine if not shard_entry_path(folder, number).is_file()]
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
            return _complete(folder, out, plan, source.parts)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and _is_done(out, plan, share, warn):  # another rank was faster
            return None
        raise UserError(
            f"Encoding into {folder} stopped: {error}. Put that right (make room, if the disk is full), and run the same command to go on; "
            "or choose another --out."
        ) from error


def unfinished(out: Path) -> Path:
    """Where `out` lies while it is being made."""
    return out.with_name(f".{out.name}.part")


def _is_done(out: Path, plan: dict[str, Any], share: tuple[int, int], warn: Callable[[str], None]) -> bool:
    """Whether the other ranks have finished what this one would have helped to make. Raises UserError if something else is there."""
    if not out.exists():
        return False
    if share[1] > 1 and (out / MANIFEST).is_file():
        card = read_manifest(out)
        there = {**card, "settings": _planned(card["settings"]), "parts": [shard["part"] for shard in card["shards"]]}
        if all(there.get(key) == value for key, value in _as_read(plan).items()):
            warn(f"{out} is whole already, of the same parts of the same source by the same settings: nothing is left to do.")
            return True
    raise UserError(f"{out} exists already: delete it, or choose another --out.")


def _join(
    folder: Path, plan: dict[str, Any], parts: list[Part], share: tuple[int, int], held: ExitStack, warn: Callable[[str], None]
) -> None:
    """Keep other encodings out and let this one's other ranks in: each holds a lock of its own, beside none of another number of ranks.

    The first to come looks for what has changed since an earlier run and clears away what that left; the others rely on it.
    """
    rank, ranks = share
    what = f"The unfinished encoding {folder}"
    with ExitStack() as taken:  # let go at once if this process is refused: while it is its turn, so that no other sees it here
        taken.enter_context(locked(folder / f".rank-{rank}-of-{ranks}.lock", what))
        others = [path for path in folder.glob(".rank-*-of-*.lock") if not path.name.startswith(f".rank-{rank}-of-{ranks}.")]
        for other in others:
            if not other.name.endswith(f"-of-{ranks}.lock"):
                refuse_locked(other, what)
        first = not any(is_held(other) for other in others)
        _begin(folder, plan, first)
        if first:
            for left in folder.glob(".*.part"):  # of processes that were killed
                left.unlink(missing_ok=True)
            if changed := remove_changed(folder, parts):
                warn(f"Changed since they were encoded, so encoded anew: {in_words(changed)}.")
        held.enter_context(taken.pop_all())


def _encode_parts(
    source: Source, numbers: list[int], settings: EncodeSettings, decoder: Decoder, encoder: BatchEncoder, shards: ShardsThread
) -> None:
    parts = [PartInWork(number, source.parts[number].name) for number in numbers]
    usable = (_usable(source.parts[part.number], source.caption_weights, part) for part in parts)
    chunks = decoder.chunks(usable, settings.batch_size * CHUNK_BATCHES)
    for part in parts:
        for chunk in chunks:
            kept: list[tuple[Record, DecodedImage]] = []
            for record, outcome in zip(chunk.records, chunk.outcomes, strict=True):
                if isinstance(outcome, str):
                    part.rejected.append((record.key, outcome))
                else:
                    kept.append((replace(record, image=b""), outcome))  # the file is not needed any more
            encoded = encoder.encode([record for record, _ in kept], [picture for _, picture in kept], settings.resolutions)
            lengths = [len(tokens) for tokens in encoded.ids]
            cut = sum(length >= encoder.text_encoder.max_tokens for length in lengths)
            part.counts.update(captions=len(lengths), tokens=sum(lengths), captions_cut=cut)
            shards.put(part, encoded, len(chunk.records), chunk.last)
            if chunk.last:
                break


def _usable(part: Part, caption_weights: dict[str, float], work: PartInWork) -> Iterator[Record]:
    """The records of a part that can be used so far; the others are rejected here."""
    work.fingerprint = part.fingerprint()  # before the first is read: what changes from now on is noticed later
    for record in checked(part.records(), caption_weights):
        if record.problem:
            work.rejected.append((record.key, record.problem))
        else:
            yield record


def _begin(folder: Path, plan: dict[str, Any], first: bool) -> None:
    """Write the plan, or find that an earlier run or another rank began with the same."""
    path = folder / "plan.json"
    if not path.is_file():
        write_aside(path, to_checked_json(plan))
    begun, now = _flat(_read_begun(path, f"delete {folder}")), _flat(_as_read(plan))
    different = [key for key in now if begun.get(key) != now[key]]
    if "format" in different:
        raise UserError(f"{folder} was begun by another version of microdit: delete it, or let that version finish it.")
    if different == ["parts"] and first:  # the source has changed, and the shards that are still of its parts are kept
        write_aside(path, to_checked_json(plan))
    elif different == ["parts"]:
        raise UserError(
            f"This process sees another source {plan['source']} than those that are encoding it into {folder} ({len(now['parts']):,} parts "
            f"here, {len(begun['parts']):,} there): let all see the same files, and start them again if these have changed meanwhile."
        )
    elif different:
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


def _as_read(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan as it comes back from the disk."""
    return from_checked_json(to_checked_json(plan))


def _planned(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what may change on the way."""
    free = ("device", "batch_size", "workers")
    return {key: value for key, value in settings.items() if key not in free}


def _complete(folder: Path, out: Path, plan: dict[str, Any], parts: list[Part]) -> dict[str, Any] | None:
    """When all shards are there: write the card, give the folder its name. Of several ranks that find them there, the first does so."""
    manifests = [shard_entry_path(folder, number) for number in range(len(parts))]
    if not all(path.is_file() for path in manifests):
        return None
    with in_turn(folder / TURN):
        if out.exists():  # another rank was faster
            return None
        if changed := list(changed_shards(folder, parts).values()):
            raise UserError(
                f"Changed while the source was encoded: {in_words(changed)}. Run the same command again: only that is encoded anew."
            )
        shards = [_read_begun(path, "delete it") for path in manifests]
        if not any(shard["rows"] for shard in shards):
            rejected = sum((Counter(shard["rejected"]) for shard in shards), Counter())
            raise UserError(f"The source {plan['source']} gave no picture that could be kept; rejected: {dict(rejected) or 'none either'}.")
        card = write_manifest(folder, plan, shards)
        folder.rename(out)
        for hidden in out.glob(".*"):  # locks and the listing
            hidden.unlink(missing_ok=True)
    return card
