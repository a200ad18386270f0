"""Encoded sets copied to and from object stores: shard by shard, resumable, and compared with their checksums.

A bucket has no rename, so a set there counts once its manifest is there, which is written last. Until then its `plan.json` says that it is
being written, and each shard counts once its entry `shard-N.json` is there, which is written after the shard itself. `push` and an encoding
into a store (`encode_to_store.py`) follow the same rules, on any number of machines.
"""

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from microdit.data.manifest import MANIFEST, PLAN, Manifest, open_manifest, read_manifest
from microdit.errors import UserError
from microdit.io.console import QUIET, Reporter
from microdit.io.files import sha256_of
from microdit.io.locks import sole_writer
from microdit.io.places import MissingObject, Place

AT_ONCE = 4  # shards copied at a time
ENTRIES_AT_ONCE = 16  # small files read at a time
ENTRY = re.compile(r"shard-(\d+)\.json")

T = TypeVar("T")
R = TypeVar("R")


def push(folder: Path, place: Place, reporter: Reporter = QUIET) -> Manifest:
    """Copy the encoded set in `folder` to an object store. What an earlier attempt copied is not copied again.

    Raises UserError if `folder` holds no whole set, if `place` holds another one, or if the store cannot be written.
    """
    manifest = open_manifest(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    there = place.list()
    if MANIFEST in there:
        _check_same(place, (folder / MANIFEST).read_bytes() == (place / MANIFEST).read())
        return manifest
    plan = (folder / PLAN if (folder / PLAN).is_file() else folder / MANIFEST).read_bytes()
    _check_same(place, start_writing(place, plan))
    shards = [shard["name"] for shard in manifest["shards"]]
    with reporter.progress(f"push {folder.name}", len(shards)) as advance:

        def copy(shard: str) -> None:
            entry = folder / Path(shard).with_suffix(".json").name
            if not (entry.is_file() and entry.name in there and (place / entry.name).read() == entry.read_bytes()):
                put_shard(folder, place, shard)
            advance(1, shard)

        in_threads(copy, shards, AT_ONCE)
    others = [name for name in names if name not in (*shards, MANIFEST, PLAN) and not ENTRY.fullmatch(name)]
    for name in [*others, MANIFEST]:
        (place / name).upload(folder / name)
    return manifest


def pull(place: Place, folder: Path, reporter: Reporter = QUIET) -> Manifest:
    """Copy an encoded set from an object store to `folder`, which appears when it is whole. What an earlier attempt copied is kept.

    Raises UserError if there is no whole set at `place`, if `folder` exists, if the disk is full, or if the bytes are not those that were
    written.
    """
    manifest, content = read_manifest(place), (place / MANIFEST).read(listed=True)
    if folder.exists():
        raise UserError(f"{folder} exists already: delete it, or choose another folder.")
    unfinished = folder.with_name(f".{folder.name}.pull")
    names = [name for name in place.list() if "/" not in name and not name.startswith(".")]
    shards = {shard["name"]: shard for shard in manifest["shards"]}
    try:
        with sole_writer(unfinished), reporter.progress(f"pull {place.name}", len(shards)) as advance:

            def copy(name: str) -> None:
                path, shard = unfinished / name, shards[name]
                if not (path.is_file() and path.stat().st_size == shard["bytes"] and sha256_of(path) == shard["sha256"]):
                    (place / name).download(path, shard["bytes"], shard["sha256"], listed=True)
                advance(1, name)

            in_threads(copy, shards, AT_ONCE)
            for name in names:
                if name not in shards and name != MANIFEST:
                    (place / name).download(unfinished / name)
            (unfinished / MANIFEST).write_bytes(content)
        unfinished.rename(folder)
    except OSError as error:
        raise UserError(
            f"Copying {place} into {unfinished} stopped: {error}. Make room if the disk is full, and run the same command to continue."
        ) from error
    return manifest


def start_writing(place: Place, plan: bytes) -> bool:
    """Announce that a set is being written at `place` by writing its plan, and return whether that is not another plan than before."""
    return (place / PLAN).create(plan) or (place / PLAN).read(listed=True) == plan


def put_shard(folder: Path, place: Place, shard: str) -> None:
    """Copy a shard, then its list of rejected records, then its entry, which makes it count."""
    (place / shard).upload(folder / shard)
    for suffix in (".rejected.jsonl", ".json"):
        path = folder / Path(shard).with_suffix(suffix).name
        if path.is_file():
            (place / path.name).upload(path)
        else:
            (place / path.name).delete()  # of an earlier version of the part


def read_entries(place: Place, numbers: Iterable[int]) -> dict[int, bytes]:
    """Return the entries of those shards at `place` that have one."""

    def read(number: int) -> tuple[int, bytes | None]:
        try:
            return number, (place / f"shard-{number:05d}.json").read()
        except MissingObject:
            return number, None

    there = {int(found[1]) for name in place.list() if (found := ENTRY.fullmatch(name))}
    return {number: entry for number, entry in in_threads(read, sorted(there & set(numbers)), ENTRIES_AT_ONCE) if entry is not None}


def in_threads(do: Callable[[T], R], items: Iterable[T], threads: int) -> list[R]:
    """Call `do` for each item in several threads, and return the results in order. Raises the first error, and starts no further items."""
    with ThreadPoolExecutor(threads, thread_name_prefix="copies") as pool:
        try:
            return list(pool.map(do, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_same(place: Place, same: bool) -> None:
    if not same:
        raise UserError(f"{place} holds another data set already, or one that is being written: choose another place, or delete that one.")
