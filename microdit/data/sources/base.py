"""Where pictures and captions come from: a `Source` is a list of `Part`s, each an iterable of undecoded `Record`s.

A part is the unit of work: it becomes one shard of the encoded set, whatever process works on it. So the parts of a source, their
order and what is in them must not depend on anything but the source itself.
"""

import glob
import hashlib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from microdit.data.sources.files import roots_of
from microdit.encoders.captions import MAX_CAPTION, clean_caption
from microdit.errors import UserError

if TYPE_CHECKING:
    from microdit.data.sources.folders import ListOnce

LONGEST_KEY = 1000  # characters

TARS = (".tar", ".tgz", ".tar.gz")
ARCHIVES = (*TARS, ".zip")
END = "#end"  # ends the key of a record which says that the rest of its part cannot be read

KINDS = """A source is one of
  emoji, emoji:held_out          the embedded pictures; emoji:unnamed, emoji:unnamed_held_out all have one caption
  scenes, scenes:5000            scenes drawn from them, and how many
  NAME:FOLDER                    one of the paper's sets: {named}
  a folder                       of pictures with .txt files or metadata.jsonl, of archives, of tables, or by Dataset.save_to_disk
  a file, or a pattern in quotes .tar, .tgz, .tar.gz, .zip or .parquet
  hf:NAME, hf:NAME:SPLIT         anything that datasets.load_dataset can load"""


@dataclass(frozen=True)
class Record:
    """One picture with its captions, as the source holds them.

    `key` is unique in its part. `captions` maps a caption's name ("caption", "alt") to its text. `image` is the file's bytes.
    `problem` says, in a few words that are the same for all such records, why the source already knows that it cannot be used.
    """

    key: str
    captions: dict[str, str]
    image: bytes
    problem: str = ""


@dataclass(frozen=True)
class Part:
    """Records that belong together: a tar, a row group of a table, a thousand files. `records()` starts from the first each time.

    `files()` are those that it reads; `known()` is what decides on its records besides them: lines of a list, a choice among the records.
    """

    name: str
    records: Callable[[], Iterator[Record]]
    files: Callable[[], Iterable[Path]] = tuple
    known: Callable[[], str] = str

    def fingerprint(self) -> str:
        """A digest of the names, sizes and times of the files and of what is known: while it is the same, so are the records."""
        digest = hashlib.sha256(self.known().encode(errors="surrogatepass"))
        for path in self.files():
            try:
                status = path.stat()
                state = f"{status.st_size} {status.st_mtime_ns}"
            except (OSError, ValueError):
                state = "missing"
            digest.update(f"\0{path.name}\0{state}".encode(errors="surrogatepass"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """`caption_weights`: how often each caption is used when a picture has several; those not named are not used.

    `min_side`: pixels below which a picture is better left out, if the source knows.
    """

    name: str
    parts: list[Part]
    caption_weights: dict[str, float] = field(default_factory=lambda: {"caption": 1.0})
    license: str = ""
    min_side: int | None = None


def open_source(
    name: str, captions: Mapping[str, float] | None = None, fraction: float = 1.0, list_once: "ListOnce | None" = None
) -> Source:
    """The source of that name (see KINDS). `captions` says which captions are used, and how often, instead of its own choice.

    `fraction` keeps the records whose key's SHA-256 falls into that share: the same ones in any order, and those of a smaller fraction
    are among those of a larger. `list_once` may give the listing of a folder that another process has made. Raises UserError.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"The fraction of {name} is {fraction}, and must lie in (0, 1]: 0.1 keeps a tenth.")
    if captions is not None and not (captions and all(weight > 0 and math.isfinite(weight) for weight in captions.values())):
        raise UserError(f"The captions of {name} must be names with weights above 0, such as text: 0.7.")
    source = _open(name, dict(captions) if captions else None, list_once)
    if fraction == 1:
        return source
    parts = [replace(part, records=partial(_kept, part, fraction), known=partial(_choice, part, fraction)) for part in source.parts]
    return replace(source, parts=parts)


def checked(records: Iterable[Record], captions: Collection[str]) -> Iterator[Record]:
    """The records of a part as they are encoded, with these captions, cleaned. One that cannot be used has a `problem`, and no file."""
    met: set[str] = set()
    for record in records:
        cleaned = {name: text for name in captions if (text := _clean(record.captions.get(name, "")))}
        problem = record.problem or _key_problem(record.key, met) or ("" if cleaned else "no caption")
        met.add(record.key)
        yield Record(record.key, cleaned, b"" if problem else record.image, problem)


def only_captions(name: str, own: Mapping[str, float], captions: Mapping[str, float] | None) -> dict[str, float]:
    """The weights to use for a source whose caption names are fixed. Raises UserError if others are asked for."""
    unknown = sorted(set(captions or {}) - set(own))
    if unknown:
        raise UserError(f"{name} has no caption named {', '.join(unknown)}; it has {', '.join(own)}.")
    return dict(captions or own)


def relative_names(files: list[Path]) -> list[str]:
    """Of each file below the deepest folder that holds them all: unique, and the same wherever that folder lies."""
    top = files[0].parent
    while not all(file.is_relative_to(top) for file in files):
        top = top.parent
    return [file.relative_to(top).as_posix() for file in files]


def _kept(part: Part, fraction: float) -> Iterator[Record]:
    for record in part.records():
        digest = hashlib.sha256(record.key.encode(errors="surrogatepass")).digest()
        # A note that a part ends early stands for records that nobody has seen: it is never left out.
        if int.from_bytes(digest[:8], "big") < fraction * 2**64 or record.key.endswith(END):
            yield record


def _choice(part: Part, fraction: float) -> str:
    return f"{fraction} of {part.known()}"


def _key_problem(key: str, met: Collection[str]) -> str:
    if key in met:
        return "duplicate key"
    if len(key) > LONGEST_KEY:
        return "file name is too long"
    return "file name is not UTF-8" if _has_surrogates(key) else ""


def _clean(caption: str) -> str:
    """Clean a caption as prompts are cleaned; empty if it is no Unicode text at all (lone surrogates)."""
    return "" if _has_surrogates(caption[:MAX_CAPTION]) else clean_caption(caption)


def _has_surrogates(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _open(name: str, captions: dict[str, float] | None, list_once: "ListOnce | None") -> Source:
    from microdit.data.sources.named import NAMED, open_named

    kind, colon, rest = name.partition(":")
    if kind in ("emoji", "scenes"):
        source = _open_embedded(name, kind, rest)
        return replace(source, caption_weights=only_captions(name, source.caption_weights, captions))
    if kind in NAMED and rest:
        return open_named(NAMED[kind], Path(rest).expanduser(), captions)
    if kind == "hf" and rest:
        from microdit.data.sources.tables import hub_source

        dataset, _, split = rest.partition(":")
        return hub_source(dataset, split or "train", captions)
    if colon and kind.isidentifier() and not glob.glob(name):
        raise UserError(f"There is no source '{name}'. {_kinds()}")
    return _open_path(name, captions, list_once)


def _open_embedded(name: str, kind: str, rest: str) -> Source:
    if kind == "emoji" and rest in ("", "train", "held_out", "unnamed", "unnamed_held_out"):
        from microdit.data.sources.builtin import emoji_source

        return emoji_source("held_out" if rest.endswith("held_out") else "train", named=not rest.startswith("unnamed"))
    if kind == "scenes" and (not rest or (rest.isdecimal() and int(rest) > 0)):
        from microdit.data.sources.builtin import scenes_source

        return scenes_source(int(rest)) if rest else scenes_source()
    raise UserError(f"There is no source '{name}'. {_kinds()}")


def _open_path(name: str, captions: dict[str, float] | None, list_once: "ListOnce | None") -> Source:
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(path, captions, list_once)
    files = [path] if path.is_file() else sorted(Path(file) for file in glob.glob(str(path), recursive=True))
    if not files:
        raise UserError(f"There is no file or folder at {name}. {_kinds()}")
    if all(file.name.lower().endswith(ARCHIVES) for file in files):  # links too: they were named
        from microdit.data.sources.archives import archive_source

        return archive_source(files, captions)
    if all(file.suffix.lower() == ".parquet" for file in files):
        from microdit.data.sources.tables import table_source

        return table_source(files, captions)
    raise UserError(f"{name} is neither archives alone nor tables alone. {_kinds()}")


def _open_folder(folder: Path, captions: dict[str, float] | None, list_once: "ListOnce | None") -> Source:
    from microdit.data.sources.archives import archive_source
    from microdit.data.sources.files import IMAGE_SUFFIXES, is_folder
    from microdit.data.sources.folders import folder_source
    from microdit.data.sources.tables import saved_source, table_source

    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return saved_source(folder, captions)
    archives, tables, pictures = [], [], False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name.lower()
                if name.endswith(ARCHIVES) and not is_folder(entry):
                    archives.append(folder / entry.name)
                elif name.endswith(".parquet") and not is_folder(entry):
                    tables.append(folder / entry.name)
                elif not pictures:
                    pictures = name.endswith(IMAGE_SUFFIXES) and not name.startswith(".") and not is_folder(entry)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read: {error.strerror}.") from error
    if pictures and (archives or tables):
        raise UserError(f"{folder} holds pictures beside {min(archives or tables).name}: move one of them, or name the files by a pattern.")
    if archives:  # before tables: img2dataset writes a table without pictures beside each tar
        return archive_source(sorted(archives), captions, roots_of(folder))
    return table_source(sorted(tables), captions, roots_of(folder)) if tables else folder_source(folder, captions, list_once)


def _kinds() -> str:
    from microdit.data.sources.named import NAMED

    return KINDS.format(named=", ".join(NAMED))
