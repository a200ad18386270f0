"""Read the cells of Arrow tables, which hold whatever their writer has put there.

Not every value of Arrow has a counterpart in Python: there are timestamps beyond the year 9999 and text that is not UTF-8.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import pyarrow as pa

from microdit.errors import UserError

NO_TEXT = "\ud800"  # a lone surrogate, in place of text that is not UTF-8, as which it is later reported
NO_VALUE = object()  # in place of a value that Python cannot hold; it is neither text nor bytes


def cell_value(cell: pa.Scalar) -> Any:
    """Return the value of a cell; NO_TEXT or NO_VALUE in place of what cannot be converted. Of a struct, the other fields are kept."""
    try:
        return cell.as_py()
    except Exception as error:  # pyarrow raises exceptions of many types, among them OverflowError and KeyError
        names = [field.name for field in cell.type] if isinstance(cell, pa.StructScalar) else []
        if names and len(names) == len(set(names)):
            return {name: cell_value(cell[name]) for name in names}
        return NO_TEXT if isinstance(error, UnicodeDecodeError) else NO_VALUE


def table_rows(table: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table or record batch, whose columns have different names."""
    columns = list(zip(table.schema.names, table.columns, strict=True))
    for row in range(table.num_rows):
        yield {name: cell_value(column[row]) for name, column in columns}


def check_offsets(table: pa.Table) -> None:
    """Raise ArrowException if a table from a file refers to what is not in the file, where Arrow would read all the same, or crash.

    Text that is not UTF-8 is no reason: it costs its own row. Of the images, only the offsets are read.
    """
    table.validate()
    for column in table.columns:
        for chunk in column.chunks:
            kind = _as_bytes(chunk.type)
            (chunk if kind == chunk.type else chunk.view(kind)).validate(full=True)


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """Return a type of the same layout with bytes in place of text."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_as_bytes(kind.value_type)))
    return pa.binary() if pa.types.is_string(kind) else pa.large_binary() if pa.types.is_large_string(kind) else kind


def check_unique(columns: Iterable[str], names: Collection[str], where: str) -> None:
    """Raise UserError if one of these columns stands several times among the `names` of a table."""
    times = Counter(names)
    if twice := [name for name in columns if times[name] > 1]:
        raise UserError(f"{where}: several columns are named {', '.join(twice)}. Rename all but one.")
