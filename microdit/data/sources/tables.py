"""Read images from tables: Parquet files, and whatever the `datasets` library opens."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.constants import HF_HUB_CACHE

from microdit.data.sources.base import END, Part, Record, Source, relative_names
from microdit.data.sources.metadata import CAPTION_NAMES, from_fields
from microdit.data.sources.untrusted_files import LARGEST_FILE, TOO_LARGE, Refused, Roots, open_file, read_file, roots_of
from microdit.errors import UserError
from microdit.io.untrusted_text import one_line

IMAGE_NAMES = ("image", "jpg", "png", "bytes")
DAMAGED = "table is damaged from here on"
PART_SIZE = 1000  # rows of a part, in a data set without row groups
READ_ROWS = 64  # rows that are held in memory at a time, at most
READ_BYTES = 64_000_000  # size of these rows, at most, estimated from the mean of their row group
READ_BUFFER = 1 << 20  # bytes of the file; without a buffer size, whole columns of a row group would be read


def table_source(files: list[Path], captions: dict[str, float] | None = None, roots: Roots | None = None) -> Source:
    """Return a source of Parquet files with one part for each row group. Raises UserError if all are damaged, or if columns are missing.

    Links must not lead out of the folders `roots`. Without `roots`, the files may be links to anywhere.
    """
    weights = captions
    parts = []
    for name, path in zip(relative_names(files), files, strict=True):
        try:
            with open_file(path, roots) as file, pq.ParquetFile(file) as table:
                schema, groups = table.schema_arrow, [table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)]
        except Refused as refused:
            parts.append(Part(name, partial(_nothing_but, name, refused.reason), partial(iter, (path,))))
            continue
        except (pa.ArrowException, OSError):
            parts.append(Part(name, partial(_nothing_but, name, DAMAGED), partial(iter, (path,))))
            continue
        weights = weights or {_caption_column(schema.names, str(path)): 1.0}
        image = _image_column(schema, str(path))
        _check_columns(schema.names, weights, str(path))
        first = 0
        for number, rows in enumerate(groups):
            read = partial(_read_group, path, name, number, first, image, list(weights))
            parts.append(Part(f"{name}/{first}", read, partial(_files_of_group, path, number, image)))
            first += rows
    if weights is None:
        raise UserError(f"{files[0]} is not a Parquet file, or is damaged{' like all the others' if len(files) > 1 else ''}.")
    return Source(files[0].name if len(files) == 1 else files[0].absolute().parent.name, parts, weights)


def hub_source(name: str, split: str, captions: dict[str, float] | None = None) -> Source:
    """Return a data set that `datasets.load_dataset` opens, by name or path, as a source. Raises UserError if it cannot be loaded."""
    try:
        loaded = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"datasets.load_dataset could not load {name}, split {split}: {one_line(str(error))}") from error
    roots = [*((Path(name),) if Path(name).is_dir() else ()), Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]
    return _dataset_source(f"hf:{name}:{split}", split, loaded, captions, tuple(real for root in roots for real in roots_of(root)))


def saved_source(folder: Path, captions: dict[str, float] | None = None) -> Source:
    """Return a data set written by `save_to_disk` as a source: its split `train`, if it has several. Raises UserError if it is damaged."""
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{folder} looks like a data set saved by save_to_disk, but is damaged: {one_line(str(error))}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise UserError(f"{folder} holds the splits {', '.join(loaded)}: name the folder of one of them.")
        loaded = loaded["train"]
    return _dataset_source(folder.absolute().name, folder.absolute().name, loaded, captions, roots_of(folder))


def _dataset_source(name: str, prefix: str, dataset: Any, captions: dict[str, float] | None, roots: Roots) -> Source:
    """Return a source whose keys begin with `prefix`, which does not depend on where the data set lies."""
    image = _image_column(dataset.features.arrow_schema, name)
    weights = captions or {_caption_column(dataset.column_names, name): 1.0}
    _check_columns(dataset.column_names, weights, name)
    dataset = dataset.select_columns([image, *weights]).with_format("arrow")  # as stored: images remain encoded files
    files = partial(iter, [Path(file["filename"]) for file in dataset.cache_files])
    # The folders of the cache are named by their content.
    known = " ".join(Path(*Path(file["filename"]).parts[-2:]).as_posix() for file in dataset.cache_files)
    read = partial(_read_rows, dataset, prefix, image, list(weights), roots)
    starts = range(0, len(dataset), PART_SIZE)
    return Source(name, [Part(f"{start:09d}", partial(read, start), files, partial(str, known)) for start in starts], weights)


def _read_group(path: Path, name: str, group: int, first: int, image: str, wanted: list[str]) -> Iterator[Record]:
    row, roots = first, roots_of(path.parent)
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BUFFER) as table:
            for batch in table.iter_batches(_rows_at_once(table, group), row_groups=[group], columns=[image, *wanted]):
                for fields in _rows(batch):
                    yield _record(f"{name}/{row}", fields, image, wanted, path.parent, roots)
                    row += 1
    except (pa.ArrowException, OSError):
        yield Record(f"{name}/{row}{END}", {}, b"", DAMAGED)


def _rows_at_once(table: Any, group: int) -> int:
    metadata = table.metadata.row_group(group)
    return max(1, min(READ_ROWS, READ_BYTES * metadata.num_rows // max(1, metadata.total_byte_size)))


def _files_of_group(path: Path, group: int, image: str) -> Iterator[Path]:
    """Yield the table, and the files beside it that its cells name."""
    yield path
    try:
        with pq.ParquetFile(path) as table:
            kind = table.schema_arrow.field(image).type
            if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
                cells = table.read_row_group(group, [f"{image}.path"]).column(image).to_pylist()
                yield from (path.parent / cell["path"] for cell in cells if cell and isinstance(cell["path"], str))
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return  # reading the rows will report the damage


def _read_rows(dataset: Any, prefix: str, image: str, wanted: list[str], roots: Roots, start: int) -> Iterator[Record]:
    row, stop = start, min(start + PART_SIZE, len(dataset))
    try:
        while row < stop:
            for fields in _rows(dataset[row : min(row + READ_ROWS, stop)]):
                yield _record(f"{prefix}/{row}", fields, image, wanted, Path(), roots)
                row += 1
    except (pa.ArrowException, OSError):
        yield Record(f"{prefix}/{row}{END}", {}, b"", DAMAGED)


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    for row in range(table.num_rows):
        yield {name: _cell(table.column(name)[row]) for name in table.schema.names}


def _cell(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return "\ud800"  # a lone surrogate, which is later reported as not UTF-8


def _nothing_but(name: str, problem: str) -> Iterator[Record]:
    yield Record(name + END, {}, b"", problem)


def _record(key: str, fields: dict[str, Any], image: str, wanted: list[str], folder: Path, roots: Roots) -> Record:
    content, trouble = _image_bytes(fields[image], folder, roots)
    captions, problem = from_fields(fields, wanted)
    return Record(key, captions, content, trouble or problem)


def _image_bytes(value: Any, folder: Path, roots: Roots) -> tuple[bytes, str]:
    """Return the image in a cell and "", or b"" and the problem.

    The cell holds bytes, or {bytes, path}, where a file may take the place of missing bytes.
    """
    if isinstance(value, dict):
        if value.get("bytes") is None and isinstance(value.get("path"), str) and value["path"]:
            return read_file(folder / value["path"], roots)
        value = value.get("bytes")
    if not isinstance(value, bytes):
        return b"", "no image"
    return (b"", TOO_LARGE) if len(value) > LARGEST_FILE else (value, "")


def _image_column(schema: pa.Schema, where: str) -> str:
    """Return the column of images. Raises UserError if there is none, or if it is ambiguous."""
    fitting = [column.name for column in schema if _may_hold_images(column.type)]
    for name in IMAGE_NAMES:
        if name in fitting:
            return name
    if len(fitting) != 1:
        raise UserError(
            f"{where} has {'several columns' if fitting else 'no column'} of binary data. Name the one with the images 'image'."
        )
    return fitting[0]


def _may_hold_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(n).name == "bytes" and _may_hold_images(kind.field(n).type) for n in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _caption_column(columns: list[str], where: str) -> str:
    """Return the column of captions. Raises UserError if there is none."""
    for name in CAPTION_NAMES:
        if name in columns:
            return name
    raise UserError(f"{where} has no {', '.join(CAPTION_NAMES)}: say which of its columns hold captions ({', '.join(columns)}).")


def _check_columns(columns: list[str], wanted: dict[str, float], where: str) -> None:
    missing = sorted(set(wanted) - set(columns))
    if missing:
        raise UserError(f"{where} has no column {', '.join(missing)}; it has {', '.join(columns)}.")
