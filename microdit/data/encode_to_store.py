"""Encode into an object store: the files of a local encoding, written on any number of machines that share no disk.

Each process writes its shards in a folder of its own, from which they are copied to the store while the next ones are encoded. The rules by
which a set in a store counts are those of `transfer.py`. Whichever process finds all shards there writes the manifest. Each process holds a
lease beside the set (`.SET.part/`), so that a second one of the same rank is refused; one that lost its lease writes the same bytes again.
"""

import hashlib
import shutil
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from microdit.data.encode_plan import EncodeEvents, MakeShards, first_names, holds, nothing_kept, other_parts, read_checked
from microdit.data.manifest import MANIFEST, PLAN, Manifest, has_manifest, write_manifest
from microdit.data.sources.base import Source
from microdit.data.transfer import put_shard, read_entries, start_writing
from microdit.errors import UserError
from microdit.io.files import cache_folder, from_checked_json, to_checked_json
from microdit.io.leases import leased
from microdit.io.locks import sole_writer
from microdit.io.places import Place

WAITING = 2  # shards that may wait to be copied before encoding waits for them


def make_set_in_store(
    source: Source,
    out: Place,
    plan: dict[str, Any],
    make_shards: MakeShards,
    share: tuple[int, int],
    events: EncodeEvents,
    warn: Callable[[str], None],
) -> Manifest | None:
    """Make an encoded set in an object store. The arguments and the result are those of `make_set`; raises UserError likewise."""
    rank, ranks = share
    if source.note:
        warn(source.note)
    if has_manifest(out):
        if ranks > 1 and holds(out, plan):
            warn(f"{out} is already complete, from the same parts of the same source with the same settings: nothing is left to do.")
            return None
        raise UserError(f"{out} exists already: delete it, or choose another --out.")
    if not start_writing(out, to_checked_json(plan)):
        other_parts(out, read_checked(out / PLAN, f"delete {out}"), plan, may_differ=False)
    folder, leases = local_folder(out) / f"{rank}-of-{ranks}", out.with_name(f".{out.name}.part")
    try:
        with sole_writer(folder), leased(leases / f"rank-{rank}-of-{ranks}", True, warn, warn, on_loss=warn):
            for left in folder.glob("shard-*"):  # not copied before the process was killed
                left.unlink()
            mine = range(rank, len(source.parts), ranks)
            there = _valid_entries(out, source, mine)
            events.on_progress(0, len(there))
            with _Copies(folder, out, events.on_progress) as copies:
                make_shards(folder, [number for number in mine if number not in there], copies.on_progress)
            manifest = _complete(folder, out, plan, source, mine, events.on_complete)
    except OSError as error:
        raise UserError(
            f"Encoding into {out} stopped, as {folder} cannot hold shards until they are copied: {error}. Make room there if the disk "
            "is full, and run the same command to continue."
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    for name in leases.list() if manifest else ():
        (leases / name).delete()
    return manifest


def local_folder(out: Place) -> Path:
    """Return the folder of this machine in which shards are written before they are copied to `out`."""
    return cache_folder() / "encode" / hashlib.sha256(out.url.encode()).hexdigest()[:16]


class _Copies:
    """Copies each shard that is complete in `folder` to `out`, in a thread of its own, and deletes it there.

    `on_progress` is to be called by the thread that writes shards. It raises the error of an earlier copy, as the end of the `with` block
    does.
    """

    def __init__(self, folder: Path, out: Place, on_progress: Callable[[int, int], None]):
        self._folder, self._out, self._on_progress = folder, out, on_progress
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="copies")
        self._waiting: deque[Future[None]] = deque()
        self._seen: set[str] = set()

    def __enter__(self) -> "_Copies":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._thread.shutdown(cancel_futures=True)

    def on_progress(self, records: int, parts: int) -> None:
        if parts:
            for entry in set(self._folder.glob("shard-*.json")):
                if entry.name not in self._seen:
                    self._seen.add(entry.name)
                    self._waiting.append(self._thread.submit(self._copy, entry))
            while len(self._waiting) > WAITING:
                self._waiting.popleft().result()
        self._on_progress(records, parts)

    def _copy(self, entry: Path) -> None:
        put_shard(self._folder, self._out, f"{entry.stem}.arrow")
        for path in self._folder.glob(f"{entry.stem}.*"):
            path.unlink()


def _valid_entries(out: Place, source: Source, numbers: range) -> dict[int, dict[str, Any]]:
    """Return the entries of complete shards, apart from those whose part has changed since, or that another process has overwritten."""
    entries, sizes = {}, out.list()
    for number, content in read_entries(out, numbers).items():
        try:
            entry = from_checked_json(content)
        except ValueError:  # it is written again
            continue
        part = source.parts[number]
        is_whole = sizes.get(str(entry.get("name"))) == entry.get("bytes")
        if is_whole and (entry.get("part"), entry.get("fingerprint")) == (part.name, part.fingerprint()):
            entries[number] = entry
    return entries


def _complete(
    folder: Path, out: Place, plan: dict[str, Any], source: Source, mine: range, on_complete: Callable[[Path], None]
) -> Manifest | None:
    """Write the manifest, if all shards are there and no other process was faster; otherwise return None."""
    numbers = range(len(source.parts))
    there = read_entries(out, numbers)
    if len(there) < len(numbers) or has_manifest(out):
        return None
    entries = _valid_entries(out, source, numbers)
    changed = [number for number in numbers if number not in entries]
    if changed and not set(changed) & set(mine):
        return None  # the processes whose parts these are encode them again
    if changed:
        names = [source.parts[number].name for number in changed]
        raise UserError(
            f"These parts changed while they were encoded: {first_names(names)}. Run the same command to encode only them again."
        )
    shards = [entries[number] for number in numbers]
    if not any(shard["rows"] for shard in shards):
        rejected = sum((Counter(shard["rejected"]) for shard in shards), Counter())
        raise nothing_kept(plan["source"], rejected)
    joined = {"joined": source.joined()} if source.joined else {}
    manifest = write_manifest(folder, plan | joined, shards, source.passed_over)
    on_complete(folder)
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name != MANIFEST:
            (out / path.name).upload(path)
    return manifest if (out / MANIFEST).create((folder / MANIFEST).read_bytes()) else None
