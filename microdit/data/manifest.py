"""The card of an encoded set: what is in it, made by which encoders, file by file with size and checksum."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from microdit.data.shard_index import schema
from microdit.distributed import World
from microdit.errors import UserError
from microdit.io.files import from_checked_json, sha256_of, to_checked_json, write_aside

CARD = "card.json"
FORMAT = 4
READ_FORMATS = (2, 3, 4)  # 3 has no index in its shards; 2 has checksums of blobs and files only


def write_card(folder: Path, plan: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan and the shards' manifests, added up. Beside it go the two files that let HF `datasets.load_from_disk` open the folder."""
    card = {key: value for key, value in plan.items() if key != "parts"}
    for key in ("rows", "seen", "captions", "tokens", "captions_cut"):
        card[key] = sum(shard[key] for shard in shards)
    card["rejected"] = dict(sum((Counter(shard["rejected"]) for shard in shards), Counter()))
    card["shards"] = shards
    _write_datasets_files(folder, schema(plan["settings"]["resolutions"]), [shard["name"] for shard in shards], shards[0]["sha256"])
    write_aside(folder / CARD, to_checked_json(card))
    return card


def open_card(folder: Path, world: World | None = None) -> dict[str, Any]:
    """The card of a set whose shards are there, in their sizes. The processes of `world` must all call this: each reads the card, and the
    first one alone looks at the shards.

    Raises UserError as `read_card` does, if a shard is not what the card says, or if the folder is not the same one to all processes.
    """
    if world is None:
        card = read_card(folder)
        _refuse_other_shards(folder, card)
        return card
    with world.together():
        card, seen = read_card(folder), sha256_of(folder / CARD)
    world.check_same_folder(seen, str(folder))
    world.look(lambda: _refuse_other_shards(folder, card))
    return card


def _refuse_other_shards(folder: Path, card: dict[str, Any]) -> None:
    for shard in card["shards"]:
        path = folder / shard["name"]
        try:
            size: int | None = path.stat().st_size
        except FileNotFoundError:
            size = None
        if size != shard["bytes"]:
            what = "is missing" if size is None else f"has {size} bytes, not {shard['bytes']}"
            raise UserError(f"{path} {what}: the data set is damaged; encode it again.")


def read_card(folder: Path) -> dict[str, Any]:
    """Raises UserError if there is none, if it is not what was written, or if this program cannot read it."""
    path = folder / CARD
    if not path.is_file():
        unfinished = folder.with_name(f".{folder.name}.part")
        hint = f"it was begun in {unfinished}: run the same command again to finish it" if unfinished.exists() else "make one with it"
        raise UserError(f"There is no encoded data set in {folder} (no {CARD}). 'microdit data encode' writes it; {hint}.")
    try:
        card = from_checked_json(path.read_bytes())
        if card["format"] not in READ_FORMATS:
            raise UserError(f"{path} is of format {card['format']}, this program reads {READ_FORMATS}: encode the data again.")
        missing = {"rows", "shards", "sizes", "settings", "autoencoder", "text_encoder", "text_channels", "downsampling"} - set(card)
        if missing:
            raise KeyError(", ".join(sorted(missing)))
        return card
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): encode the data again.") from error


def _write_datasets_files(folder: Path, columns: pa.Schema, names: list[str], fingerprint: str) -> None:
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
