"""What an encoding is asked for, and whether an unfinished one, on a disk or in a store, may be continued."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microdit.data.manifest import has_manifest, read_manifest
from microdit.data.sources.metadata import NO_CAPTION
from microdit.errors import UserError
from microdit.io.files import from_checked_json, to_checked_json
from microdit.io.places import Place

MOST_NAMED = 5
MAY_BE_MISSING = ("features", "first_sentences")  # keys of a plan that is without them

OnProgress = Callable[[int, int], None]
MakeShards = Callable[[Path, list[int], OnProgress], None]


@dataclass(frozen=True)
class EncodeEvents:
    """Functions that an encoding calls.

    `on_progress`, from another thread, gets the numbers of records and parts completed since the last call. `on_complete` gets the folder
    once all shards are in it, before it receives its final name; only the process that completes the folder calls it.
    """

    on_progress: Callable[[int, int], None] = lambda records, parts: None
    on_complete: Callable[[Path], None] = lambda folder: None


def nothing_kept(source: str, rejected: Mapping[str, int]) -> UserError:
    """Return the error for a source of which no image was kept, with what to do about the most frequent reason."""
    if not rejected:
        return UserError(f"The source {source} holds no image: of few images a small share may be empty, so take a larger one, or none.")
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(rejected.items(), key=lambda item: -item[1]))
    fix = (
        "Write each picture's caption into a text file beside it (owl.png, owl.txt), or name a list of them with --captions"
        if max(rejected, key=lambda reason: rejected[reason]) == NO_CAPTION
        else "'microdit data look SOURCE' shows examples"
    )
    return UserError(f"No image of the source {source} could be kept; rejected: {reasons}. {fix}.")


def holds(out: Path | Place, plan: dict[str, Any]) -> bool:
    """Return whether `out` is an encoded set made by this plan."""
    if not has_manifest(out):
        return False
    manifest = read_manifest(out)
    there = {**manifest, "settings": without_free_settings(manifest["settings"]), "parts": [shard["part"] for shard in manifest["shards"]]}
    return all(there.get(key) == value for key, value in as_read(plan).items())


def other_parts(where: Path | Place, started: dict[str, Any], plan: dict[str, Any], may_differ: bool) -> bool:
    """Return whether an unfinished encoding at `where` was started for other parts of the source than `plan` names.

    Raises UserError if anything else differs, or if the parts do and may not.
    """
    before, now = flat(started), flat(as_read(plan))
    different = [key for key in dict.fromkeys([*now, *MAY_BE_MISSING]) if before.get(key) != now.get(key)]
    if "features" in different or "latents" in different:
        different = [key for key in different if key != "format"]  # it follows from whether there are features or pictures
    if "format" in different:
        raise UserError(f"{where} was started by another version of microdit: delete it, or let that version finish it.")
    if different == ["parts"] and not may_differ:
        raise UserError(
            f"This process sees another source {plan['source']} than those that are encoding it into {where} ({len(now['parts']):,} parts "
            f"here, {len(before['parts']):,} there): make sure that all see the same files, and restart all if the files have changed."
        )
    if different and different != ["parts"]:
        went = f" It was started with --dtype {before['dtype']}." if "dtype" in different else ""
        raise UserError(
            f"{where} was started with other settings ({', '.join(different)} differ): delete it, or use the same settings.{went}"
        )
    return bool(different)


def read_checked(path: Path | Place, fix: str) -> dict[str, Any]:
    """Read the plan, or the entry of a shard. Raises UserError, with the advice `fix`, if it is damaged."""
    try:
        return from_checked_json(path.read(listed=True) if isinstance(path, Place) else path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {fix}, and run the same command again.") from error


def flat(plan: dict[str, Any]) -> dict[str, Any]:
    """Return the plan with the settings at its top level."""
    return {**without_free_settings(plan.get("settings", {})), **{key: value for key, value in plan.items() if key != "settings"}}


def as_read(plan: dict[str, Any]) -> dict[str, Any]:
    """Return the plan as it is read back from the disk."""
    return from_checked_json(to_checked_json(plan))


def without_free_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without those that may change during an encoding."""
    free = ("device", "batch_size", "workers")
    return {key: value for key, value in settings.items() if key not in free}


def first_names(names: list[str]) -> str:
    """Return the first few names, and the number of the others."""
    more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
