import datetime

import pyarrow as pa
import pytest

from microdit.data.sources.arrow_cells import NO_TEXT, NO_VALUE, cell_value, check_unique, table_rows
from microdit.errors import UserError

BEYOND = pa.array([2**62, 0], pa.timestamp("us"))  # the first is in the year 148109
LATIN = pa.array([b"f\xfcr", b"word"], pa.binary()).view(pa.string())


def test_rows_are_those_of_pyarrow_where_python_can_hold_them():
    columns = {
        "text": ["a", None],
        "bytes": [b"\xff", b""],
        "lists": [["a", None], None],
        "fields": [{"x": 1, "y": [2.5]}, None],
        "when": [datetime.datetime(2026, 1, 2), None],
        "words": pa.array(["a", "b"]).dictionary_encode(),
        "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int8())),
    }
    table = pa.table(columns)
    assert list(table_rows(table)) == table.to_pylist()
    assert [row for batch in table.to_batches() for row in table_rows(batch)] == table.to_pylist()


def test_what_python_cannot_hold_is_marked_and_spares_its_neighbours():
    names = ["text", "when"]
    nested = pa.StructArray.from_arrays([LATIN, pa.StructArray.from_arrays([LATIN, BEYOND], names)], ["latin", "inner"])
    table = pa.table({"text": LATIN, "when": BEYOND, "nested": nested})
    epoch = datetime.datetime(1970, 1, 1)
    assert list(table_rows(table)) == [
        {"text": NO_TEXT, "when": NO_VALUE, "nested": {"latin": NO_TEXT, "inner": {"text": NO_TEXT, "when": NO_VALUE}}},
        {"text": "word", "when": epoch, "nested": {"latin": "word", "inner": {"text": "word", "when": epoch}}},
    ]
    ambiguous = pa.StructArray.from_arrays([LATIN, LATIN], ["x", "x"])
    assert cell_value(ambiguous[1]) is NO_VALUE


def test_only_columns_that_are_read_must_be_unique():
    check_unique(["a", "gone"], ["a", "b", "b"], "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: several columns are named b\. Rename all but one\."):
        check_unique(["a", "b"], ["a", "b", "b"], "x.parquet")
