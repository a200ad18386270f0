"""A folder is listed by one of the processes that encode it, and the others read its listing from a file."""

import hashlib
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from microdit.data.folders import Listing, ListOnce, MakeListing, parts_of
from microdit.data.listing import Pictures
from microdit.data.metadata import MetadataLines, Place
from microdit.errors import UserError
from microdit.files import aside_of, from_checked_json, sha256_of, to_checked_json, write_aside
from microdit.locks import in_turn, in_use, is_held

NAMES = ".listing.safetensors"  # in the unfinished folder
ABOUT = ".listing.json"  # with the checksum of the other
USED = ".listing.lock"  # held by every process that uses it
TURN = ".turn.lock"  # held by the process that lists, begins or completes
COMPARED = 64  # parts of which a process looks whether it sees the same files as the one that listed them


@contextmanager
def listed_once(out: Path, folder: Path, ranks: int) -> Iterator[ListOnce | None]:
    """Let the first of several ranks list, and the others use its listing, which is kept in `folder`, where `out` is being made.

    It is used as long as any rank is at work: whoever comes when none is lists anew.
    """
    with ExitStack() as held:
        yield partial(_list_once, held, out, folder) if ranks > 1 else None


def _list_once(held: ExitStack, out: Path, folder: Path, source: Path, make: MakeListing) -> Listing:
    """Raises UserError if this process sees another folder than the one that listed it, or if the disk refuses."""
    if out.exists():
        return make()  # whoever encodes will say so
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with in_turn(folder / TURN):
            is_first = not is_held(folder / USED)
            held.enter_context(in_use(folder / USED))
            if not is_first and (folder / ABOUT).is_file():
                return _read(folder, source)
            listing = make()
            _write(listing, folder, source)
            return listing
    except (OSError, SafetensorError) as error:  # the library has the second for a full disk
        if out.exists():  # the others have finished it meanwhile
            return make()
        raise UserError(
            f"The listing of {source} could not be handed over in {folder}: {error}. Put that right, or choose another --out."
        ) from error


def _write(listing: Listing, folder: Path, source: Path) -> None:
    pictures, lines = listing.pictures, listing.lines
    arrays = {"offsets": pictures.offsets, "names": pictures.names}
    about: dict[str, Any] = {
        "host": socket.gethostname(),
        "seen": _seen(listing, source),
        "pictures": {"count": pictures.count, "problems": pictures.problems, "otherwise": pictures.otherwise},
        "lines": None,
    }
    if lines is not None:
        arrays["repeated"] = lines.repeated
        about["lines"] = {**asdict(lines), "path": lines.path.name, "names": sorted(lines.names)}
        del about["lines"]["repeated"]
    aside = aside_of(folder / NAMES)
    try:
        save_file(arrays, aside)
        about["sha256"] = sha256_of(aside)
        aside.replace(folder / NAMES)
    finally:
        aside.unlink(missing_ok=True)
    write_aside(folder / ABOUT, to_checked_json(about))


def _read(folder: Path, source: Path) -> Listing:
    try:
        about = from_checked_json((folder / ABOUT).read_bytes())
        if sha256_of(folder / NAMES) != about["sha256"]:
            raise ValueError("its checksum differs")
        with safe_open(folder / NAMES, "np") as file:
            pictures = Pictures(offsets=file.get_slice("offsets"), names=file.get_slice("names"), **about["pictures"])
            repeated = file.get_tensor("repeated") if about["lines"] else None
    except (ValueError, SafetensorError) as error:
        raise UserError(
            f"The listing in {folder} is damaged ({error}): stop all processes that encode into it, and start them again."
        ) from error
    lines = _lines(source, about["lines"], repeated) if about["lines"] else None
    listing = Listing(pictures, lines)
    if _seen(listing, source) != about["seen"]:
        raise UserError(
            f"{source} is not the same here, on {socket.gethostname()}, as on {about['host']}, which has listed it, or has changed since: "
            "let all processes see the same files, and start them again."
        )
    return listing


def _lines(source: Path, about: dict[str, Any], repeated: Any) -> MetadataLines:
    places = [Place(offset, lines, tuple(header) if header else None) for offset, lines, header in about["places"]]
    return MetadataLines(
        source / about["path"], tuple(about["state"]), about["count"], about["step"], places, repeated, frozenset(about["names"])
    )


def _seen(listing: Listing, source: Path) -> str:
    """A digest of what this process sees of some of the files listed: their names, sizes and times."""
    parts = parts_of(listing, source)
    chosen = parts[:: -(-len(parts) // COMPARED)]
    return hashlib.sha256("".join(part.fingerprint() for part in chosen).encode()).hexdigest()
