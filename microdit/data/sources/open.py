"""Open a source of images and captions by its name: a built-in set, a set of the paper, a path, or a data set of `datasets`."""

import glob
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from microdit.data.sources.archives import archive_source
from microdit.data.sources.base import ARCHIVES, END, Part, Record, Source, only_captions
from microdit.data.sources.builtin import Split, emoji_source, scenes_source
from microdit.data.sources.folders import ListOnce, folder_source
from microdit.data.sources.icons import icons_source
from microdit.data.sources.named import NAMED, open_named
from microdit.data.sources.untrusted_files import IMAGE_SUFFIXES, is_folder, roots_of
from microdit.errors import UserError

_KINDS = """A source is one of
  emoji, emoji:held_out          the built-in images; in emoji:unnamed and emoji:unnamed_held_out all have the same caption
  scenes, scenes:5000            scenes composed of them, and how many
  icons, icons:held_out          emoji in several styles, from npm packages; icons:styles and icons:styles_held_out name the style only;
                                 icons:FOLDER, icons:held_out:FOLDER, ...: of the packages in FOLDER
  NAME:FOLDER                    one of the paper's data sets: {named}
  a folder                       of images with .txt files or metadata.jsonl, of archives, of tables, or written by Dataset.save_to_disk
  a file, or a pattern in quotes .tar, .tgz, .tar.gz, .zip or .parquet
  hf:NAME, hf:NAME:SPLIT         anything that datasets.load_dataset can load"""


def open_source(name: str, captions: Mapping[str, float] | None = None, fraction: float = 1.0, list_once: ListOnce | None = None) -> Source:
    """Open the source of that name (see `_KINDS`). Raises UserError if there is none, or if it cannot be read.

    `captions` replaces the source's own choice of captions and of their weights. `fraction` keeps the records whose key's SHA-256 falls
    into that share: the choice does not depend on the order, and a larger fraction contains a smaller one. `list_once` may return the
    listing of a folder that another process has made.

    >>> source = open_source("my-pictures")
    >>> sorted(record.captions["caption"] for record in source.parts[0].records())[:2]
    ['picture 0', 'picture 1']
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


def _open(name: str, captions: dict[str, float] | None, list_once: ListOnce | None) -> Source:
    kind, colon, rest = name.partition(":")
    if kind in ("emoji", "scenes", "icons"):
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
        return emoji_source("held_out" if rest.endswith("held_out") else "train", named=not rest.startswith("unnamed"))
    if kind == "scenes" and (not rest or (rest.isdecimal() and int(rest) > 0)):
        return scenes_source(int(rest)) if rest else scenes_source()
    if kind == "icons":
        return _open_icons(rest)
    raise UserError(f"There is no source '{name}'. {_kinds()}")


def _open_icons(rest: str) -> Source:
    choice, colon, folder = rest.partition(":")
    if choice not in ("", "train", "held_out", "styles", "styles_held_out"):  # a folder alone
        choice, colon, folder = "", ":", rest
    split: Split = "held_out" if choice.endswith("held_out") else "train"
    return icons_source(split, named=not choice.startswith("styles"), folder=Path(folder).expanduser() if colon else None)


def _open_path(name: str, captions: dict[str, float] | None, list_once: ListOnce | None) -> Source:
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(path, captions, list_once)
    files = [path] if path.is_file() else sorted(Path(file) for file in glob.glob(str(path), recursive=True))
    if not files:
        raise UserError(f"There is no file or folder at {name}. {_kinds()}")
    if all(file.name.lower().endswith(ARCHIVES) for file in files):  # links too, because the user named them
        return archive_source(files, captions)
    if all(file.suffix.lower() == ".parquet" for file in files):
        from microdit.data.sources.tables import table_source

        return table_source(files, captions)
    raise UserError(f"{name} names neither archives only nor tables only. {_kinds()}")


def _open_folder(folder: Path, captions: dict[str, float] | None, list_once: ListOnce | None) -> Source:
    from microdit.data.sources.tables import saved_source, table_source

    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return saved_source(folder, captions)
    archives, tables, images = [], [], False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name.lower()
                if name.endswith(ARCHIVES) and not is_folder(entry):
                    archives.append(folder / entry.name)
                elif name.endswith(".parquet") and not is_folder(entry):
                    tables.append(folder / entry.name)
                elif not images:
                    images = name.endswith(IMAGE_SUFFIXES) and not name.startswith(".") and not is_folder(entry)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read: {error.strerror}.") from error
    if images and (archives or tables):
        raise UserError(f"{folder} holds images beside {min(archives or tables).name}: move one of them, or name the files by a pattern.")
    if archives:  # before tables: img2dataset writes a table without images beside each tar
        return archive_source(sorted(archives), captions, roots_of(folder))
    return table_source(sorted(tables), captions, roots_of(folder)) if tables else folder_source(folder, captions, list_once)


def _kinds() -> str:
    return _KINDS.format(named=", ".join(NAMED))


def _kept(part: Part, fraction: float) -> Iterator[Record]:
    for record in part.records():
        digest = hashlib.sha256(record.key.encode(errors="surrogatepass")).digest()
        # The report that a part ends early stands for an unknown number of records, so it is never left out.
        if int.from_bytes(digest[:8], "big") < fraction * 2**64 or record.key.endswith(END):
            yield record


def _choice(part: Part, fraction: float) -> str:
    return f"{fraction} of {part.known()}"
