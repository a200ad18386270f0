import datetime

import numpy as np
import pyarrow as pa
import pytest

from microdit.data.sources.arrow_cells import NO_TEXT, NO_VALUE, cell_value, check_offsets, check_unique, table_rows
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


def text_of(offsets: list[int], content: bytes) -> pa.Array:
    """Text at these places of the content, which are not checked."""
    return pa.Array.from_buffers(pa.string(), len(offsets) - 1, [None, pa.py_buffer(np.array(offsets, np.int32)), pa.py_buffer(content)])


def test_whole_tables_of_every_type_and_text_that_is_not_utf_8_pass():
    words = pa.array(["a", "b", "a"]).dictionary_encode()
    lists = [[{"key": "value"}], [], None]
    table = pa.table({
        "text": ["x", None, "y"],
        "large": pa.array(["x", None, "y"], pa.large_string()),
        "view": pa.array(["x", None, "y"], pa.string_view()),
        "words": words,
        "fields": pa.StructArray.from_arrays([pa.array(["a", "b", "c"]), words, pa.array(lists)], ["text", "words", "lists"]),
        "lists": pa.array([["a"], None, ["b", "c"]], pa.large_list(pa.large_string())),
        "pairs": pa.array([["a", "b"], None, ["c", "d"]], pa.list_(pa.string(), 2)),
        "map": pa.array([[("a", "b")], [], None], pa.map_(pa.string(), pa.string())),
        "when": pa.array([1, 2, None], pa.timestamp("ns", "UTC")),
        "nothing": pa.nulls(3),
        "bytes": [b"\xff", None, b""],
    })  # fmt: skip
    for part in (table, table.slice(1, 1), table.slice(0, 0), pa.concat_tables([table, table])):
        check_offsets(part)
    check_offsets(pa.table({"latin": LATIN, "nested": pa.StructArray.from_arrays([LATIN], ["text"])}))


@pytest.mark.parametrize("offsets", [[0, 2000, 1], [0, 2, 1], [0, -5, 1]])
def test_offsets_that_lead_out_of_the_content_do_not(offsets):
    wrong = text_of(offsets, b"ab")
    nested = pa.StructArray.from_arrays([wrong], ["text"]), pa.ListArray.from_arrays([0, 1, 2], wrong)
    for column in (wrong, *nested):
        with pytest.raises(pa.ArrowInvalid):
            check_offsets(pa.table({"fine": [1, 2], "column": column}))


def test_only_columns_that_are_read_must_be_unique():
    check_unique(["a", "gone"], ["a", "b", "b"], "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: several columns are named b\. Rename all but one\."):
        check_unique(["a", "b"], ["a", "b", "b"], "x.parquet")
