"""Open a source of images and captions by its name: a built-in set, a set of the paper, a path, or a data set of `datasets`."""

import glob
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from PIL import Image

from microdit.data.sources.archives import archive_source
from microdit.data.sources.base import ARCHIVES, EMBEDDED, Source, only_captions
from microdit.data.sources.builtin import Split, emoji_source, scenes_source
from microdit.data.sources.caption_options import NONE_WANTED, CaptionOptions, own_captions, with_captions
from microdit.data.sources.folders import ListOnce, folder_source, list_source
from microdit.data.sources.icons import icons_source
from microdit.data.sources.lists import LIST_SUFFIXES
from microdit.data.sources.mds import is_mds, mds_source
from microdit.data.sources.named import NAMED, open_named
from microdit.data.sources.subsets import fraction_of
from microdit.data.sources.untrusted_files import (
    IMAGE_SUFFIXES,
    find_files,
    has_images,
    is_folder,
    kind_of,
    roots_of,
    sum_of_kinds,
)
from microdit.errors import UserError
from microdit.io.near_names import did_you_mean, did_you_mean_path

MOST_NAMES = 1_000_000  # that the braces of a pattern stand for

_KINDS = """A source is one of
  emoji, emoji:held_out          the built-in images; in emoji:unnamed and emoji:unnamed_held_out all have the same caption
  scenes, scenes:5000            scenes composed of them, and how many
  icons, icons:held_out          emoji in several styles, from npm packages; icons:styles and icons:styles_held_out name the style only;
                                 icons:FOLDER, icons:held_out:FOLDER, ...: of the packages in FOLDER
  NAME:FOLDER                    a published data set: {named}
  a folder                       of images with .txt files or metadata.jsonl, of archives, of tables, of MDS shards, or written by
                                 Dataset.save_to_disk
  a file, or a pattern in quotes .tar, .tgz, .tar.gz, .tar.zst, .tar.bz2, .zip or .parquet; {{000..099}}.tar names a hundred files
  a list                         .csv, .tsv, .jsonl: the files beside it that its lines name, with their captions
  hf:NAME, hf:NAME:SPLIT         anything that datasets.load_dataset can load; hf:NAME:CONFIG:SPLIT chooses a configuration
  hf-stream:NAME, ...:SPLIT      the same, read from the hub file by file, with nothing kept on this disk"""


def open_source(
    name: str,
    captions: Mapping[str, float] | None = None,
    fraction: float = 1.0,
    list_once: ListOnce | None = None,
    options: CaptionOptions = CaptionOptions(),  # noqa: B008
) -> Source:
    """Open the source of that name (see `_KINDS`). Raises UserError if there is none, or if it cannot be read.

    `captions` replaces the source's own choice of captions and of their weights, and `options` edits them. `fraction` keeps that share
    of the records (see `subsets.fraction_of`). `list_once` may return the listing of a folder that another process has made.

    >>> source = open_source("my-pictures")
    >>> sorted(record.captions["caption"] for record in source.parts[0].records())[:2]
    ['picture 0', 'picture 1']
    """
    if captions is not None and not (captions and all(weight > 0 and math.isfinite(weight) for weight in captions.values())):
        raise UserError(f"The captions of {name} must be names with weights above 0, such as text: 0.7.")
    weights = dict(captions) if captions else None
    own, joined = own_captions(weights, options)
    return fraction_of(with_captions(_open(name, own, list_once, options.file_column), weights, joined, options), fraction)


def _open(name: str, captions: dict[str, float] | None, list_once: ListOnce | None, file_column: str | None) -> Source:
    kind, colon, rest = name.partition(":")
    if captions == NONE_WANTED and (kind in EMBEDDED or kind in NAMED):
        captions = None  # they have their own
    if kind in EMBEDDED:
        source = _open_embedded(name, kind, rest)
        return replace(source, caption_weights=only_captions(name, source.caption_weights, captions))
    if kind in NAMED and rest:
        return open_named(NAMED[kind], Path(rest).expanduser(), captions)
    if kind == "hf" and rest:
        from microdit.data.sources.tables import hub_source

        return hub_source(*_hub_name(rest), captions)
    if kind == "hf-stream" and rest:
        from microdit.data.sources.tables import streamed_source

        return streamed_source(*_hub_name(rest), captions)
    if colon and kind.isidentifier() and not glob.glob(name):
        raise UserError(f"There is no source '{name}'.{did_you_mean(kind, [*EMBEDDED, *NAMED])} {_kinds()}")
    return _open_path(name, captions, list_once, file_column)


def _hub_name(rest: str) -> tuple[str, str | None, str]:
    """Split NAME, NAME:SPLIT or NAME:CONFIG:SPLIT into name, configuration and split."""
    name, *more = re.split(r":(?![^\[]*\])", rest)  # not the colon of a split such as train[:100]
    if len(more) > 2:
        raise UserError(f"There is no source 'hf:{rest}': write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT.")
    return name, more[0] or None if len(more) == 2 else None, (more[-1] if more else "") or "train"


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


def _open_path(name: str, captions: dict[str, float] | None, list_once: ListOnce | None, file_column: str | None) -> Source:
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(path, captions, list_once, file_column)
    files = [path] if path.is_file() else _matching(str(path))
    if not files:
        raise UserError(f"There is no file or folder at {name}.{did_you_mean_path(name)} {_kinds()}")
    if all(file.name.lower().endswith(ARCHIVES) for file in files):  # links too, because the user named them
        return archive_source(files, captions)
    if all(file.suffix.lower() == ".parquet" for file in files):
        from microdit.data.sources.tables import table_source

        return table_source(files, captions, file_column=file_column)
    if len(files) == 1 and files[0].suffix.lower() in LIST_SUFFIXES:
        return list_source(files[0], captions, file_column)
    if len(files) == 1 and files[0].suffix.lower() in Image.registered_extensions():
        folder = shlex.quote(str(files[0].parent))
        raise UserError(
            f"{name} is a single picture: name the folder of all of them, as in 'microdit data encode {folder} --out data/mine'."
        )
    raise UserError(f"{name} names neither archives only nor tables only, nor one list. {_kinds()}")


def _matching(pattern: str) -> list[Path]:
    """Return the files that a pattern names. Those that braces enumerate are named whether they exist or not."""
    names = _expanded(pattern)
    matching: list[Path] = []
    for name in names:
        found = sorted(glob.glob(name, recursive=True))
        matching += map(Path, found or ([] if len(names) == 1 or glob.has_magic(name) else [name]))
    return list(dict.fromkeys(matching))


def _expanded(pattern: str) -> list[str]:
    """Expand the braces of a pattern as a shell does: "{000..099}.tar", or "{train,more}/*.tar". Raises UserError if there are too many."""
    names = [pattern]
    while found := next((match for name in names if (match := _BRACES.search(name))), None):
        first, last, width = found["first"], found["last"], len(found["first"] or "")
        between = range(int(first), int(last) + 1) if first else ()
        inside = (f"{number:0{width}}" for number in between) if first else found["names"].split(",")
        if len(between) > MOST_NAMES or len(names) > MOST_NAMES:
            raise UserError(f"The pattern {pattern} names more than {MOST_NAMES:,} files: name a folder instead.")
        names = [name.replace(found[0], one) for one in inside for name in names]
    return names


_BRACES = re.compile(r"\{(?:(?P<first>[0-9]{1,9})\.\.(?P<last>[0-9]{1,9})|(?P<names>[^{}]*,[^{}]*))\}")


def _open_folder(folder: Path, captions: dict[str, float] | None, list_once: ListOnce | None, file_column: str | None) -> Source:
    """Open a folder as what it holds at its top, or else anywhere."""
    from microdit.data.sources.tables import listed_by_table, saved_source, table_source

    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return saved_source(folder, captions)
    if is_mds(folder):
        return mds_source(folder, find_files(folder), captions)
    archives, tables, images = _at_the_top(folder)
    if images and not archives and [table.name for table in tables] == ["metadata.parquet"]:
        listed = listed_by_table(folder, tables[0], captions, file_column)
        if listed is not None:
            return listed
    if images and (archives or tables):
        raise UserError(f"{folder} holds images beside {min(archives or tables).name}: move one of them, or name the files by a pattern.")
    if not (archives or tables) and (images or has_images(folder)):
        return folder_source(folder, captions, list_once, file_column)
    found = find_files(folder)
    others = sorted(folder / os.fsdecode(name) for name in found.others.to_pylist())
    archives = [path for path in others if path.name.lower().endswith(ARCHIVES)]
    if archives:  # before tables: img2dataset writes a table without images beside each tar
        source = archive_source(archives, captions, roots_of(folder))
    elif tables := [path for path in others if path.suffix.lower() == ".parquet"]:
        source = table_source(tables, captions, roots_of(folder), file_column)
    else:
        return folder_source(folder, captions, list_once, file_column)  # says what is missing
    read = {*archives, *tables}
    left = Counter(kind_of(path.name) for path in others if path not in read)
    images_left = Counter(listed.problem or kind_of(listed.file) for listed in found.images[:])
    return replace(source, passed_over=sum_of_kinds(found.passed_over, images_left, left))


def _at_the_top(folder: Path) -> tuple[list[Path], list[Path], bool]:
    """Return the archives and tables directly in a folder, and whether there are images beside them. Raises UserError."""
    archives, tables, images = [], [], False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name.lower()
                if name.startswith(".") or is_folder(entry):
                    continue
                if name.endswith(ARCHIVES):
                    archives.append(folder / entry.name)
                elif name.endswith(".parquet"):
                    tables.append(folder / entry.name)
                else:
                    images = images or name.endswith(IMAGE_SUFFIXES)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read: {error.strerror}.") from error
    return archives, tables, images


def _kinds() -> str:
    return _KINDS.format(named=", ".join(NAMED))
