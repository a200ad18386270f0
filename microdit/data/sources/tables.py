"""Read images from tables: Parquet files, and whatever the `datasets` library opens."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import dataset_info
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError

from microdit.data.sources.arrow_cells import cell_value, check_offsets, check_unique, table_rows
from microdit.data.sources.base import END, Part, Record, Source, relative_names
from microdit.data.sources.folders import Listing, note_on_lists, parts_of, split_by_list
from microdit.data.sources.lists import caption_column, check_captions, columns_in_words, digest_of, only_urls, relative_file
from microdit.data.sources.metadata import FILE_NAMES, find_name, from_fields, is_url, url_in
from microdit.data.sources.parquet_pages import BinaryColumn, binary_values, large_column
from microdit.data.sources.untrusted_files import LARGEST_FILE, TOO_LARGE, Refused, Roots, find_files, open_file, read_file, roots_of
from microdit.errors import UserError
from microdit.io.untrusted_text import one_line

IMAGE_NAMES = ("image", "jpg", "png", "bytes")
DAMAGED = "table is damaged from here on"
SEVERAL = "several pictures in one row"
PART_SIZE = 1000  # rows of a part, in a data set without row groups
READ_ROWS = 64  # rows that are held in memory at a time, at most
READ_BYTES = 64_000_000  # size of these rows, at most, estimated from the mean of their row group
READ_BUFFER = 1 << 20  # bytes of the file; without a buffer size, whole columns of a row group would be read
LARGE_GROUP = 250_000_000  # bytes; pages are read whole, and many writers put a thousand rows into one


@dataclass(frozen=True)
class _Table:
    """An open table of a source: where it is, its row groups, and the columns that are read."""

    path: Path
    name: str
    image: str
    wanted: tuple[str, ...]
    columns: tuple[str, ...]
    roots: Roots


def table_source(
    files: list[Path], captions: dict[str, float] | None = None, roots: Roots | None = None, file_column: str | None = None
) -> Source:
    """Return a source of Parquet files with one part for each row group, of binary images or of the files that its cells name.

    Links must not lead out of the folders `roots`. Without `roots`, the tables may be links to anywhere. Raises UserError if all are
    damaged, if columns are missing, or if the images are only addresses.
    """
    weights = captions
    parts: list[Part] = []
    largest = 0
    for name, path in zip(relative_names(files), files, strict=True):
        try:
            with open_file(path, roots) as file, pq.ParquetFile(file) as table:
                schema = table.schema_arrow
                groups = [table.metadata.row_group(n) for n in range(table.num_row_groups)]
                rows = [group.num_rows for group in groups]
                image = _image_column(schema, str(path), file_column)
                check_unique([image], schema.names, str(path))
                in_pages = (group.total_byte_size for number, group in enumerate(groups) if large_column(table, number, image) is None)
                largest = max(largest, *in_pages, 0)
                if _holds_text(schema.field(image).type):
                    _check_not_urls(table, image, path)
        except Refused as refused:
            parts.append(Part(name, partial(_nothing_but, name, refused.reason), partial(iter, (path,))))
            continue
        except (pa.ArrowException, OSError, ValueError):  # ValueError: names of columns that are not UTF-8
            parts.append(Part(name, partial(_nothing_but, name, DAMAGED), partial(iter, (path,))))
            continue
        weights = weights or {caption_column([column for column in schema.names if column != image], str(path)): 1.0}
        check_captions(schema.names, weights, str(path))
        columns = _columns(schema, image, weights)
        check_unique(columns, schema.names, str(path))
        known = _Table(path, name, image, tuple(weights), columns, roots or roots_of(path.parent))
        for number, first in enumerate(accumulate(rows, initial=0)):
            if number < len(rows):
                files_of = partial(_files_of_group, path, number, image)
                parts.append(Part(f"{name}/{first}", partial(_read_group, known, number, first), files_of))
    if weights is None:
        raise UserError(f"{files[0]} is not a Parquet file, or is damaged{' like all the others' if len(files) > 1 else ''}.")
    title = files[0].name if len(files) == 1 else files[0].absolute().parent.name
    return Source(title, parts, weights, note=_note_on(largest) if largest > LARGE_GROUP else "")


def listed_by_table(folder: Path, path: Path, captions: dict[str, float] | None, file_column: str | None) -> Source | None:
    """Return the images of a folder as a source, with the captions in a table beside them; None if the table holds images itself."""
    roots = roots_of(folder)
    source = table_source([path], captions, roots, file_column)
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BUFFER) as table:
        column = _image_column(table.schema_arrow, str(path), file_column)
        if not _holds_text(table.schema_arrow.field(column).type):
            return None
        digests = bytearray()
        try:
            for batch in table.iter_batches(PART_SIZE, columns=[column]):
                for cell in batch.column(0):
                    digests += digest_of(relative_file(cell_value(cell) or "", folder))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is damaged, so that it does not say which images it lists: {one_line(str(error))}") from error
    found = find_files(folder)
    _, unlisted, passed_over = split_by_list(found, digests, [path.name])
    note = " ".join(filter(None, (source.note, note_on_lists(found, ()))))
    parts = [*source.parts, *parts_of(Listing(unlisted), folder)]
    return replace(source, name=folder.absolute().name, parts=parts, note=note, passed_over=passed_over)


def _note_on(size: int) -> str:
    return (
        f"A row group of the tables has {size / 1e6:,.0f} MB, and reading may take more than twice as much memory: its writer may have put "
        "it into a single page. Tables with row groups of 100 rows need little."
    )


def _columns(schema: pa.Schema, image: str, wanted: Iterable[str]) -> tuple[str, ...]:
    """Return the columns to read: that of the images, those with captions, and that of the addresses, if there is one."""
    by_lower = {name.lower(): name for name in reversed(schema.names)}
    columns = (name if name in schema.names else by_lower.get(name.lower(), name.partition(".")[0]) for name in wanted if name)
    return tuple(dict.fromkeys((image, *columns, *(name for name in schema.names if name == "url"))))


def _check_not_urls(table: Any, image: str, path: Path) -> None:
    """Raise UserError if the first cells hold nothing but addresses."""
    batch = next(table.iter_batches(READ_ROWS, columns=[image]), None)
    cells = map(cell_value, batch.column(0)) if batch is not None else ()
    files = [cell for cell in cells if isinstance(cell, str) and cell]
    if files and all(map(is_url, files)):
        raise UserError(only_urls(path, table.schema_arrow.names, image))


def hub_source(name: str, config: str | None, split: str, captions: dict[str, float] | None = None) -> Source:
    """Return a data set that `datasets.load_dataset` opens, by name or path, as a source. Raises UserError if it cannot be loaded."""
    title = ":".join(filter(None, (name, config, split)))
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        chosen = f"configuration {config}, split {split}" if config else f"split {split}"
        raise UserError(f"datasets.load_dataset could not load {name}, {chosen}: {one_line(str(error))}") from error
    roots = [*((Path(name),) if Path(name).is_dir() else ()), Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]
    return _dataset_source(f"hf:{title}", split, loaded, captions, tuple(real for root in roots for real in roots_of(root)))


def streamed_source(name: str, config: str | None, split: str, captions: dict[str, float] | None = None) -> Source:
    """Return a data set that `datasets.load_dataset` streams as a source, with one part for each of its files: nothing is kept on disk.

    Raises UserError if it cannot be opened, and while it is read if the connection is lost for longer than `datasets` tries again.
    """
    title = ":".join(filter(None, (name, config, split)))
    try:
        loaded = datasets.load_dataset(name, config, split=split, streaming=True)
        first = next(iter(loaded.with_format("arrow").iter(batch_size=1)), None)
        known = "" if Path(name).is_dir() else str(dataset_info(name).sha)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HfHubHTTPError) as error:
        chosen = f"configuration {config}, split {split}" if config else f"split {split}"
        raise UserError(f"datasets.load_dataset could not open {name}, {chosen}, as a stream: {one_line(str(error))}") from error
    if first is None:
        raise UserError(f"The data set {title} has no rows.")
    image = _image_column(first.schema, title)
    weights = captions or {caption_column([column for column in first.schema.names if column != image], title): 1.0}
    check_captions(first.schema.names, weights, title)
    columns = list(_columns(first.schema, image, weights))
    rows = loaded.select_columns(columns).with_format("arrow")
    folder = Path(name)
    roots = roots_of(folder) if folder.is_dir() else ()
    files = partial(sorted, [path for path in folder.rglob("*") if path.is_file()]) if folder.is_dir() else tuple
    read = partial(_read_stream, title, rows, split, image, tuple(weights), roots)
    parts = [Part(f"{number:05d}", partial(read, number), files, partial(str, known)) for number in range(loaded.num_shards)]
    return Source(f"hf-stream:{title}", parts, weights)


def _read_stream(title: str, dataset: Any, split: str, image: str, wanted: Sequence[str], roots: Roots, number: int) -> Iterator[Record]:
    row = 0
    try:
        for table in dataset.shard(num_shards=dataset.num_shards, index=number).iter(batch_size=READ_ROWS):
            for fields in table_rows(table):
                yield _record(f"{split}/{number:05d}/{row}", fields, image, wanted, Path(), roots)
                row += 1
    except (pa.ArrowException, ValueError, TypeError):  # the last two: a file whose columns or types are not those of the first
        yield Record(f"{split}/{number:05d}/{row}{END}", {}, b"", DAMAGED)
    except OSError as error:
        raise UserError(
            f"The stream of {title} broke off at row {row:,} of file {number:,}: {one_line(str(error))}. Run the same command again, which "
            "continues with that file."
        ) from error


def saved_source(folder: Path, captions: dict[str, float] | None = None) -> Source:
    """Return a data set written by `save_to_disk` as a source: its split `train`, if it has several. Raises UserError if it is damaged."""
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise UserError(f"{folder} looks like a data set saved by save_to_disk, but is damaged: {one_line(str(error))}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise UserError(f"{folder} holds the splits {', '.join(loaded)}: name the folder of one of them.")
        loaded = loaded["train"]
    try:
        check_offsets(loaded.data.table)
    except pa.ArrowException as error:
        raise UserError(f"{folder} looks like a data set saved by save_to_disk, but is damaged: {one_line(str(error))}") from error
    return _dataset_source(folder.absolute().name, folder.absolute().name, loaded, captions, roots_of(folder))


def _dataset_source(name: str, prefix: str, dataset: Any, captions: dict[str, float] | None, roots: Roots) -> Source:
    """Return a source whose keys begin with `prefix`, which does not depend on where the data set lies."""
    image = _image_column(dataset.features.arrow_schema, name)
    weights = captions or {caption_column([column for column in dataset.column_names if column != image], name): 1.0}
    check_captions(dataset.column_names, weights, name)
    dataset = dataset.select_columns(list(_columns(dataset.features.arrow_schema, image, weights))).with_format(
        "arrow"
    )  # as stored: images remain encoded files
    files = partial(iter, [Path(file["filename"]) for file in dataset.cache_files])
    # The folders of the cache are named by their content.
    known = " ".join(Path(*Path(file["filename"]).parts[-2:]).as_posix() for file in dataset.cache_files)
    read = partial(_read_rows, dataset, prefix, image, list(weights), roots)
    starts = range(0, len(dataset), PART_SIZE)
    return Source(name, [Part(f"{start:09d}", partial(read, start), files, partial(str, known)) for start in starts], weights)


def _read_group(table: _Table, group: int, first: int) -> Iterator[Record]:
    row = first
    try:
        with open(table.path, "rb") as raw, pq.ParquetFile(table.path, pre_buffer=False, buffer_size=READ_BUFFER) as file:
            large = large_column(file, group, table.image)
            read = _group_rows(file, group, table.columns) if large is None else _with_large(file, raw, group, table, large)
            for fields in read:
                yield _record(f"{table.name}/{row}", fields, table.image, table.wanted, table.path.parent, table.roots)
                row += 1
    except (pa.ArrowException, OSError, ValueError):
        yield Record(f"{table.name}/{row}{END}", {}, b"", DAMAGED)


def _group_rows(file: Any, group: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(_rows_at_once(file, group), row_groups=[group], columns=list(columns)):
        yield from table_rows(batch)


def _with_large(file: Any, raw: BinaryIO, group: int, table: _Table, large: BinaryColumn) -> Iterator[dict[str, Any]]:
    """Yield the rows of a group whose images are in pages that are too large to be read whole."""
    kind = file.schema_arrow.field(table.image).type
    beside = [f"{table.image}.path"] if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 else []
    columns = [*beside, *(name for name in table.columns if name != table.image)]
    for fields, value in zip(_group_rows(file, group, columns), binary_values(raw, large), strict=True):
        path = (fields.get(table.image) or {}).get("path") if beside else None
        yield fields | {table.image: {"bytes": value, "path": path}}


def _rows_at_once(table: Any, group: int) -> int:
    metadata = table.metadata.row_group(group)
    return max(1, min(READ_ROWS, READ_BYTES * metadata.num_rows // max(1, metadata.total_byte_size)))


def _files_of_group(path: Path, group: int, image: str) -> Iterator[Path]:
    """Yield the table, and the files beside it that its cells name."""
    yield path
    try:
        with pq.ParquetFile(path) as table:
            kind = table.schema_arrow.field(image).type
            if _holds_text(kind):
                cells = map(cell_value, table.read_row_group(group, [image]).column(image))
                yield from (path.parent / cell for cell in cells if isinstance(cell, str) and cell)
            elif pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
                cells = map(cell_value, table.read_row_group(group, [f"{image}.path"]).column(image))
                yield from (path.parent / cell["path"] for cell in cells if cell and isinstance(cell["path"], str))
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return  # reading the rows will report the damage


def _read_rows(dataset: Any, prefix: str, image: str, wanted: list[str], roots: Roots, start: int) -> Iterator[Record]:
    row, stop = start, min(start + PART_SIZE, len(dataset))
    try:
        while row < stop:
            for fields in table_rows(dataset[row : min(row + READ_ROWS, stop)]):
                yield _record(f"{prefix}/{row}", fields, image, wanted, Path(), roots)
                row += 1
    except (pa.ArrowException, OSError):
        yield Record(f"{prefix}/{row}{END}", {}, b"", DAMAGED)


def _nothing_but(name: str, problem: str) -> Iterator[Record]:
    yield Record(name + END, {}, b"", problem)


def _record(key: str, fields: dict[str, Any], image: str, wanted: Sequence[str], folder: Path, roots: Roots) -> Record:
    content, trouble = _image_bytes(fields[image], folder, roots)
    captions, problem = from_fields(fields, wanted)
    return Record(key, captions, content, trouble or problem, url=url_in(fields))


def _image_bytes(value: Any, folder: Path, roots: Roots) -> tuple[bytes, str]:
    """Return the image in a cell and "", or b"" and the problem.

    The cell holds bytes, the path of a file, or {bytes, path}, where a file may take the place of missing bytes; or a list of one of them.
    """
    if isinstance(value, (list, tuple)):
        if len(value) > 1:
            return b"", SEVERAL
        value = value[0] if value else None
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str) and value:
        return (b"", "row names a URL and no file") if is_url(value) else read_file(folder / value, roots)
    if isinstance(value, Refused):
        return b"", value.reason
    if not isinstance(value, bytes):
        return b"", "no image"
    return (b"", TOO_LARGE) if len(value) > LARGEST_FILE else (value, "")


def _image_column(schema: pa.Schema, where: str, file_column: str | None = None) -> str:
    """Return the column of images, or of the files that hold them. Raises UserError if there is none, or if it is ambiguous."""
    if file_column:
        if file_column not in schema.names:
            raise UserError(f"{where} has no column {file_column}. {columns_in_words(schema.names)}")
        return file_column
    fitting = [column.name for column in schema if _may_hold_images(column.type)]
    for name in IMAGE_NAMES:
        if name in fitting:
            return name
    if len(fitting) == 1:
        return fitting[0]
    named = find_name([column.name for column in schema if _holds_text(column.type)], FILE_NAMES) if not fitting else None
    if named is None:
        what = "several columns of binary data" if fitting else "no column of binary data, and none that names files"
        raise UserError(
            f"{where} has {what}. {columns_in_words(schema.names)} Say which of them holds the images, or names their files: "
            "--file-column NAME."
        )
    return named


def _may_hold_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(n).name == "bytes" and _may_hold_images(kind.field(n).type) for n in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _may_hold_images(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _holds_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
