"""Encode a source once: its images to latents, its captions to token vectors, in shards that are either complete or absent.

Worker processes decode the files (`decode.py`), this thread runs the encoders, and another thread packs and writes the results
(`shard_writer.py`). None of them waits for the others, not even where one part of the source ends and the next begins.

Notable:
- Each part of the source becomes one shard, whichever process encodes it, so 1 rank and 64 ranks write the same files. After a kill, a run
  continues behind the last complete shard, and encodes again what has changed in the source since.
- Memory holds a few batches, whatever the size of the source.
- Every record is either kept or rejected with a reason, and files that are neither images nor captions are passed over; the manifest counts
  all of them.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from microdit.data.decode import DecodedImage, Decoder, TargetSizes
from microdit.data.encode_plan import (
    EncodeEvents,
    MakeShards,
    OnProgress,
    first_names,
    holds,
    nothing_kept,
    other_parts,
    read_checked,
    without_free_settings,
)
from microdit.data.encode_to_store import make_set_in_store
from microdit.data.manifest import FORMAT, WITH_FEATURES, WITH_PICTURES, Manifest, write_manifest
from microdit.data.packing import CaptionPacking, LatentPacking
from microdit.data.shard_writer import BatchEncoder, Packer, PartInWork, ShardsThread, remove_shard, shard_entry_path
from microdit.data.sources.base import Part, Record, Source, checked
from microdit.data.sources.folders import TURN
from microdit.data.sources.untrusted_files import sum_of_kinds
from microdit.data.stored_pictures import PICTURES, QUALITY
from microdit.devices import DTYPES
from microdit.encoders.autoencoder import Autoencoder, Pixels
from microdit.encoders.captions import first_sentence
from microdit.encoders.text import TextEncoder
from microdit.encoders.vision import CELL, VisionEncoder
from microdit.errors import UserError
from microdit.io.files import from_checked_json, to_checked_json, write_aside
from microdit.io.locks import check_unlocked, in_turn, is_held, locked
from microdit.io.places import Place

Folder = TypeVar("Folder", Path, Place, Path | Place)
CPU = torch.device("cpu")
CHUNK_BATCHES = 4  # batches per chunk; captions are sorted by length within a chunk, which keeps padding short


@dataclass(frozen=True)
class EncodeSettings:
    """The settings of an encoding.

    `quality`, from 1 to 100, is that of pictures, if `latents` are stored as such, which only those of `pixels` can be. `min_side` rejects
    images with a shorter side, in pixels. `buckets` keeps aspect ratios approximately, instead of cropping squares. `first_sentences` also
    stores the first sentence of each caption of several, with a weight of 0: training uses it in place of the whole caption as often as its
    recipe says (`data.first_sentence`). `dtype` is the precision of the encoders. An encoding may be continued with another device, batch
    size or number of workers.
    """

    resolutions: tuple[int, ...]
    latents: LatentPacking = "int8"
    captions: CaptionPacking = "int8"
    quality: int = QUALITY
    min_side: int = 0
    buckets: bool = False
    first_sentences: bool = False
    dtype: str = "float32"
    device: torch.device = CPU
    batch_size: int = 64
    workers: int = 0

    def planned(self) -> dict[str, Any]:
        """Return the settings that must be equal for an encoding to be continued."""
        settings = without_free_settings({**asdict(self), "resolutions": list(self.resolutions)})
        if not self.first_sentences:
            del settings["first_sentences"]  # as in sets of versions that did not know it
        if self.latents not in PICTURES:
            del settings["quality"]
        return settings


def default_workers(device: str) -> int:
    """Return the number of workers per process: all cores but one with a GPU, half of them if the encoders need the CPU too."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, cores - 2) // 2 if device == "cpu" else max(1, cores - 1)


def default_batch_size(device: torch.device, resolutions: tuple[int, ...]) -> int:
    """Return 64, or on CUDA as many images as take the memory of 128 images of 256 x 256 pixels.

    That is about 12 GB for SDXL's encoder in bfloat16, estimated from its largest layers.
    """
    if device.type != "cuda":
        return 64
    return min(256, max(1, 128 * 256**2 // max(resolutions) ** 2))


def encode_source(
    source: Source,
    out: Path | Place,
    settings: EncodeSettings,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder,
    share: tuple[int, int] = (0, 1),
    events: EncodeEvents | None = None,
    warn: Callable[[str], None] = lambda sentence: None,
    vision: VisionEncoder | None = None,
) -> Manifest | None:
    """Encode this process's share (rank, number of ranks) of the parts of a source into the folder `out`, or into an object store.

    With a `vision` encoder, its features are stored beside the latents, for representation alignment. The encoders are moved to the
    settings' device. The process that finds all shards complete finishes the folder and returns the manifest; the other ranks return None,
    including those that start when everything is done. `warn` is called with the source's note, if nothing is left to do, if a batch does
    not fit the GPU, and if parts have changed since they were encoded.

    Raises UserError if `out` exists; if latents that are no pixels are to be stored as pictures; if an unfinished encoding has other
    settings, belongs to another process or sees another source; if no record was kept; if a part changed during the encoding; if writing
    fails; or if not even one image fits the GPU.
    """
    events = events or EncodeEvents()
    sizes = TargetSizes.of(settings.resolutions, settings.min_side, settings.buckets, autoencoder.downsampling)
    plan = plan_of(source, settings, sizes, autoencoder, text_encoder, vision)

    def encode(folder: Path, missing: list[int], on_progress: OnProgress) -> None:
        if settings.device.type == "cuda":
            torch.cuda.set_device(settings.device)
        autoencoder.to(settings.device, DTYPES[settings.dtype])
        text_encoder.to(settings.device, DTYPES[settings.dtype])
        if vision is not None:
            vision.to(settings.device, DTYPES[settings.dtype])
        encoder = BatchEncoder(autoencoder, text_encoder, settings.device, settings.captions, settings.batch_size, warn, vision)
        weights = with_variants(source.caption_weights) if settings.first_sentences else source.caption_weights
        packer = Packer(settings.resolutions, settings.latents, settings.captions, weights, vision is not None, settings.quality)
        with Decoder(sizes, settings.workers) as decoder, ShardsThread(folder, packer, on_progress) as shards:
            _encode_parts(source, missing, settings, decoder, encoder, shards)

    return make_set(source, out, plan, encode, share, events, warn)


def make_set(
    source: Source,
    out: Path | Place,
    plan: dict[str, Any],
    make_shards: MakeShards,
    share: tuple[int, int],
    events: EncodeEvents,
    warn: Callable[[str], None],
) -> Manifest | None:
    """Make an encoded set: `make_shards` writes the shards of this process's parts that are still missing into a folder.

    Everything else, what happens if it is interrupted, and what is raised and returned, is as in `encode_source`.
    """
    if isinstance(out, Place):
        return make_set_in_store(source, out, plan, make_shards, share, events, warn)
    folder = unfinished(out)
    if source.note:
        warn(source.note)
    try:
        with ExitStack() as held:
            if _is_done(out, plan, share, warn):
                return None
            folder.mkdir(parents=True, exist_ok=True)
            with in_turn(folder / TURN):
                if _is_done(out, plan, share, warn):  # the rank that held the folder until now may have finished it
                    return None
                _join(folder, plan, source.parts, share, held, warn)
                mine = range(share[0], len(source.parts), share[1])
                missing = [number for number in mine if not shard_entry_path(folder, number).is_file()]
            events.on_progress(0, len(mine) - len(missing))
            make_shards(folder, missing, events.on_progress)
            return _complete(folder, out, plan, source, events.on_complete)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and _is_done(out, plan, share, warn):  # another rank was faster
            return None
        raise UserError(
            f"Encoding into {folder} stopped: {error}. Fix that (make room if the disk is full), and run the same command to continue; "
            "or choose another --out."
        ) from error


def unfinished(out: Path) -> Path:
    """Return the folder in which `out` is being made."""
    return out.with_name(f".{out.name}.part")


def held_out_folder(out: Folder) -> Folder:
    """Return the folder of the records that are held out of `out`, an encoded set of its own."""
    return out.with_name(f"{out.name}-held-out")


def is_encoded(source: Source, out: Path | Place, settings: EncodeSettings, autoencoder: Autoencoder, text_encoder: TextEncoder) -> bool:
    """Return whether `out` is a complete encoding of the same parts of the same source with the same settings and encoders."""
    sizes = TargetSizes.of(settings.resolutions, settings.min_side, settings.buckets, autoencoder.downsampling)
    return holds(out, plan_of(source, settings, sizes, autoencoder, text_encoder))


def plan_of(
    source: Source,
    settings: EncodeSettings,
    sizes: TargetSizes,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder,
    vision: VisionEncoder | None = None,
) -> dict[str, Any]:
    """Return everything that determines an encoding, which an unfinished one must share to be continued."""
    pictures = settings.latents in PICTURES
    if pictures and autoencoder.name != Pixels.name:
        raise UserError(
            f"--store-latents {settings.latents} stores pictures, but the latents of the autoencoder {autoencoder.name} are none: use "
            "--autoencoder pixels, or --store-latents int8 or fp16."
        )
    plan = {
        "format": WITH_PICTURES if pictures else FORMAT,
        "source": source.name,
        "license": source.license,
        "parts": [part.name for part in source.parts],
        "caption_weights": source.caption_weights,
        "settings": settings.planned(),
        "sizes": [{str(r): list(size) for r, size in bucket.items()} for bucket in sizes.buckets],
        "latent_channels": autoencoder.channels,
        "downsampling": autoencoder.downsampling,
        "text_channels": text_encoder.channels,
        "max_tokens": text_encoder.max_tokens,
        "autoencoder": {"name": autoencoder.name, "fingerprint": autoencoder.fingerprint},
        "text_encoder": {"name": text_encoder.name, "fingerprint": text_encoder.fingerprint},
    }
    if vision is None:
        return plan
    features = {"name": vision.name, "fingerprint": vision.fingerprint, "channels": vision.channels, "cell": CELL}
    return plan | {"format": WITH_PICTURES if pictures else WITH_FEATURES, "features": features}


def _is_done(out: Path, plan: dict[str, Any], share: tuple[int, int], warn: Callable[[str], None]) -> bool:
    """Return whether the other ranks have already finished this encoding. Raises UserError if `out` is anything else."""
    if not out.exists():
        return False
    if share[1] > 1 and holds(out, plan):
        warn(f"{out} is already complete, from the same parts of the same source with the same settings: nothing is left to do.")
        return True
    raise UserError(f"{out} exists already: delete it, or choose another --out.")


def _join(
    folder: Path, plan: dict[str, Any], parts: list[Part], share: tuple[int, int], held: ExitStack, warn: Callable[[str], None]
) -> None:
    """Register this rank in the folder: keep other encodings out, and let the other ranks of this one in.

    Each rank holds a lock of its own, and refuses to start beside one of another number of ranks. The first rank removes what an earlier
    run left unfinished and what has changed since; the others rely on that.
    """
    rank, ranks = share
    what = f"The unfinished encoding {folder}"
    with ExitStack() as taken:  # released at once if this rank is refused, before another rank can see it
        taken.enter_context(locked(folder / f".rank-{rank}-of-{ranks}.lock", what))
        others = [path for path in folder.glob(".rank-*-of-*.lock") if not path.name.startswith(f".rank-{rank}-of-{ranks}.")]
        for other in others:
            if not other.name.endswith(f"-of-{ranks}.lock"):
                check_unlocked(other, what)
        first = not any(is_held(other) for other in others)
        _start(folder, plan, first)
        if first:
            for left in folder.glob(".*.part"):  # left by processes that were killed
                left.unlink(missing_ok=True)
            if changed := _remove_changed(folder, parts):
                warn(f"These parts have changed since they were encoded and are encoded again: {first_names(changed)}.")
        held.enter_context(taken.pop_all())


def _encode_parts(
    source: Source, numbers: list[int], settings: EncodeSettings, decoder: Decoder, encoder: BatchEncoder, shards: ShardsThread
) -> None:
    parts = [PartInWork(number, source.parts[number].name) for number in numbers]
    records = (usable(source.parts[part.number], source.caption_weights, part, settings.first_sentences) for part in parts)
    chunks = decoder.chunks(records, settings.batch_size * CHUNK_BATCHES)
    for part in parts:
        for chunk in chunks:
            kept: list[tuple[Record, DecodedImage]] = []
            for record, outcome in zip(chunk.records, chunk.outcomes, strict=True):
                if isinstance(outcome, str):
                    part.rejected.append((record.key, outcome))
                else:
                    kept.append((replace(record, image=b""), outcome))  # the image file is no longer needed
            encoded = encoder.encode([record for record, _ in kept], [image for _, image in kept], settings.resolutions)
            lengths = [len(tokens) for tokens in encoded.ids]
            cut = sum(length >= encoder.text_encoder.max_tokens for length in lengths)
            part.counts.update(captions=len(lengths), tokens=sum(lengths), captions_cut=cut)
            shards.put(part, encoded, len(chunk.records), chunk.last)
            if chunk.last:
                break


def usable(part: Part, caption_weights: dict[str, float], work: PartInWork, first_sentences: bool = False) -> Iterator[Record]:
    """Yield the records of a part without a problem, with the `first_sentences` of their captions if asked, and reject the others."""
    work.fingerprint = part.fingerprint()  # taken before the first record is read, so that later changes are noticed
    for record in checked(part.records(), caption_weights):
        if record.passed_over:
            work.passed_over = sum_of_kinds(work.passed_over, record.passed_over)
        if record.problem:
            work.rejected.append((record.key, record.problem))
        else:
            yield replace(record, captions=with_first_sentences(record.captions)) if first_sentences else record


def with_variants(weights: dict[str, float]) -> dict[str, float]:
    """Return the weights of captions and of their first sentences, which are 0."""
    return weights | {_variant(name): 0.0 for name in weights}


def with_first_sentences(captions: dict[str, str]) -> dict[str, str]:
    """Return the captions, each followed by its first sentence if it has several."""
    return {key: text for name, whole in captions.items() for key, text in ((name, whole), (_variant(name), first_sentence(whole))) if text}


def _variant(name: str) -> str:
    return f"{name}, first sentence"


def _start(folder: Path, plan: dict[str, Any], first: bool) -> None:
    """Write the plan, or check that an earlier run or another rank started with the same plan. Raises UserError otherwise."""
    path = folder / "plan.json"
    if not path.is_file():
        write_aside(path, to_checked_json(plan))
    if other_parts(folder, read_checked(path, f"delete {folder}"), plan, may_differ=first):
        write_aside(path, to_checked_json(plan))  # the source has changed; the shards of unchanged parts are kept


def _complete(folder: Path, out: Path, plan: dict[str, Any], source: Source, on_complete: Callable[[Path], None]) -> Manifest | None:
    """Write the manifest and rename the folder to `out`, if all shards exist and no other rank was faster; otherwise return None."""
    parts = source.parts
    entries = [shard_entry_path(folder, number) for number in range(len(parts))]
    if not all(path.is_file() for path in entries):
        return None
    with in_turn(folder / TURN):
        if out.exists():  # another rank was faster
            return None
        if changed := list(_changed_shards(folder, parts).values()):
            raise UserError(
                f"These parts changed while they were encoded: {first_names(changed)}. Run the same command to encode only them again."
            )
        shards = [read_checked(path, "delete it") for path in entries]
        if not any(shard["rows"] for shard in shards):
            rejected = sum((Counter(shard["rejected"]) for shard in shards), Counter())
            raise nothing_kept(plan["source"], rejected)
        joined = {"joined": source.joined()} if source.joined else {}
        manifest = write_manifest(folder, plan | joined, shards, source.passed_over)
        on_complete(folder)
        folder.rename(out)
        for hidden in out.glob(".*"):  # locks and the listing of the source
            hidden.unlink(missing_ok=True)
    return manifest


def _changed_shards(folder: Path, parts: Sequence[Part]) -> dict[int, str]:
    """Return the shards that were made of other parts than these, or of earlier versions of them: shard numbers and names of old parts."""
    changed = {}
    for path in sorted(folder.glob("shard-*.json")):
        number = int(path.stem.removeprefix("shard-"))
        try:
            entry = from_checked_json(path.read_bytes())
            made_of = str(entry["part"]), entry["fingerprint"]
        except FileNotFoundError:  # another rank has removed it, or has completed the folder
            continue
        except (ValueError, KeyError, TypeError):  # damaged, or written by an earlier version without these fields
            made_of = path.name, None
        if number >= len(parts) or made_of != (parts[number].name, parts[number].fingerprint()):
            changed[number] = made_of[0]
    return changed


def _remove_changed(folder: Path, parts: Sequence[Part]) -> list[str]:
    """Remove the shards of parts that have changed, and return the names of these parts."""
    return [name for number, name in _changed_shards(folder, parts).items() if remove_shard(folder, number)]
