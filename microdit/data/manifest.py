"""The manifest of an encoded data set, `card.json`: its content, the encoders that made it, and every shard with size and checksum."""

import hashlib
import json
import re
import shlex
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from microdit.data.latent_statistics import statistics_of_shards
from microdit.data.shard_index import schema
from microdit.data.sources.base import EMBEDDED
from microdit.data.sources.untrusted_files import sum_of_kinds
from microdit.distributed import World
from microdit.errors import UserError
from microdit.io.files import from_checked_json, read_regular, to_checked_json, write_aside
from microdit.io.places import MissingObject, Place

MANIFEST = "card.json"
PLAN = "plan.json"  # what an encoding was started with
FORMAT, WITH_FEATURES, WITH_PICTURES = 4, 5, 6  # with pictures, there may be features too
READ_FORMATS = (
    2,
    3,
    FORMAT,
    WITH_FEATURES,
    WITH_PICTURES,
)  # shards of format 3 have no index; format 2 has checksums of blobs and files only

Manifest = dict[str, Any]


def write_manifest(
    folder: Path, plan: dict[str, Any], shards: list[dict[str, Any]], passed_over: Mapping[str, int] | None = None
) -> Manifest:
    """Write the manifest: the plan of the encoding, the shards' entries, the sums of their counts, and the statistics of all latents.

    `passed_over` counts the files beside the parts of the source; those that the shards count are added. Also writes the two files that let
    `datasets.load_from_disk` open the folder.
    """
    manifest: Manifest = {key: value for key, value in plan.items() if key != "parts"}
    for key in ("rows", "seen", "captions", "tokens", "captions_cut"):
        manifest[key] = sum(shard[key] for shard in shards)
    manifest["rejected"] = dict(sum((Counter(shard["rejected"]) for shard in shards), Counter()))
    manifest["passed_over"] = sum_of_kinds(passed_over or {}, *(shard.get("passed_over", {}) for shard in shards))
    if (statistics := statistics_of_shards(shards)) is not None:
        manifest["latents"] = statistics
    manifest["shards"] = [{key: value for key, value in shard.items() if key != "latent_sums"} for shard in shards]
    columns = schema(plan["settings"]["resolutions"], "features" in plan)
    _write_datasets_files(folder, columns, [shard["name"] for shard in shards], shards[0]["sha256"])
    write_aside(folder / MANIFEST, to_checked_json(manifest))
    return manifest


def open_manifest(folder: Path | Place, world: World | None = None) -> Manifest:
    """Read the manifest and check that all shards exist with the sizes it states; in a store, that is checked when they are read.

    All processes of `world` must call this: each reads the manifest, and the first one alone checks the shards. Raises UserError like
    `read_manifest`, if a shard is missing or has another size, or if the processes see different folders.
    """
    if world is None:
        manifest = read_manifest(folder)
        _check_shards(folder, manifest)
        return manifest
    with world.together():
        manifest = read_manifest(folder)
    world.check_same_folder(hashlib.sha256(to_checked_json(manifest)).hexdigest(), str(folder))
    world.look(lambda: _check_shards(folder, manifest))
    return manifest


def has_manifest(folder: Path | Place) -> bool:
    """Return whether there is an encoded data set in a folder. Raises StoreError if a store cannot be read."""
    return (folder / MANIFEST).exists()


def read_manifest(folder: Path | Place) -> Manifest:
    """Read the manifest. Raises UserError if there is none, if it is damaged, or if its format is not supported."""
    path = folder / MANIFEST
    try:
        content = path.read() if isinstance(path, Place) else read_regular(path)
    except (FileNotFoundError, NotADirectoryError, MissingObject):
        raise UserError(f"There is no encoded data set in {folder} (no {MANIFEST}): {_advice(folder)}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): encode the data again.") from error
    try:
        manifest = from_checked_json(content)
        if manifest["format"] not in READ_FORMATS:
            formats = ", ".join(map(str, READ_FORMATS))
            raise UserError(f"{path} has format {manifest['format']}, but this version reads {formats}: encode the data again.")
        missing = {"rows", "shards", "sizes", "settings", "autoencoder", "text_encoder", "text_channels", "downsampling"} - set(manifest)
        if missing:
            raise KeyError(", ".join(sorted(missing)))
        if not all(type(side) is int for side in manifest["settings"]["resolutions"]):
            raise ValueError("its resolutions are no numbers of pixels")
        if isinstance(folder, Place):
            _check_names(manifest)
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): encode the data again.") from error


def _check_names(manifest: Manifest) -> None:
    """Raise ValueError for names from a store that, as file names, would lead elsewhere."""
    for shard in manifest["shards"]:
        if not re.fullmatch(r"[\w-]+\.arrow", shard["name"]) or not re.fullmatch(r"[0-9a-f]{64}", shard["sha256"]):
            raise ValueError(f"its shard {shard['name']} has no proper name or SHA-256")


def _advice(folder: Path | Place) -> str:
    """Return what to do about a data set without a manifest. A folder with the name of a built-in source is likely meant for it."""
    if isinstance(folder, Place):
        if (folder / PLAN).exists():
            return "it is being written, or its writing was stopped, which the same 'microdit data encode' or 'push' finishes"
        return "'microdit data encode' writes one, and 'microdit data push' copies one there"
    unfinished = folder.with_name(f".{folder.name}.part")
    if unfinished.exists():
        return f"'microdit data encode' finishes the one in {unfinished}: run the same command again"
    source = folder.name if folder.name in EMBEDDED else "SOURCE"
    return f"'microdit data encode {source} --out {shlex.quote(str(folder))}' writes one"


def _check_shards(folder: Path | Place, manifest: Manifest) -> None:
    if isinstance(folder, Place):
        return
    for shard in manifest["shards"]:
        path, wrong = folder / shard["name"], ""
        try:
            found = path.stat()
        except FileNotFoundError:
            wrong = "is missing"
        except OSError as error:
            wrong = f"cannot be read ({error.strerror})"
        else:
            if not stat.S_ISREG(found.st_mode):
                wrong = "is no regular file"
            elif found.st_size != shard["bytes"]:
                wrong = f"has {found.st_size} bytes, not {shard['bytes']}"
        if wrong:
            raise UserError(f"{path} {wrong}: the data set is damaged; encode it again.")


def _write_datasets_files(folder: Path, columns: pa.Schema, names: list[str], fingerprint: str) -> None:
    import datasets  # slow to import, and needed only where a set is written

    info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(columns))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info.write_to_directory(str(folder))
    write_aside(folder / "state.json", json.dumps(state, indent=1).encode())
