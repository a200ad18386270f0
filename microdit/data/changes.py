"""Shards of an unfinished encoding whose part of the source is not what it was when they were made."""

from collections.abc import Sequence
from pathlib import Path

from microdit.data.packing import remove_shard
from microdit.data.sources import Part
from microdit.files import from_checked_json

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
