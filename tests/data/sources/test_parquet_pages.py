"""Values of large Parquet pages, read one at a time, are those that pyarrow reads."""

import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.data.sources import parquet_pages
from microdit.data.sources.parquet_pages import binary_values, large_column
from microdit.data.sources.tables import table_source
from microdit.data.sources.untrusted_files import Refused
from tests.data.pictures import picture, problems_of, records_of

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def _every_column_is_large(monkeypatch):
    monkeypatch.setattr(parquet_pages, "LARGE_COLUMN", 0)


def values_of(path):
    read = []
    with pq.ParquetFile(path) as table, open(path, "rb") as file:
        for group in range(table.num_row_groups):
            column = large_column(table, group, "image")
            assert column is not None
            read += list(binary_values(file, column))
    return read


def some_values(generator, count):
    kinds = [
        lambda: None,
        lambda: b"",
        lambda: b"the same",
        lambda: b"ab" * generator.randrange(1, 5000),
        lambda: generator.randbytes(generator.randrange(1, 90_000)),
    ]
    return [generator.choice(kinds)() for _ in range(count)]


@pytest.mark.parametrize("compression", ["NONE", "SNAPPY", "GZIP", "ZSTD"])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_values_are_those_that_were_written(tmp_path, compression, dictionary, version):
    generator = random.Random(compression)
    for batch, nested in ((7, False), (1024, True)):
        values = some_values(generator, 90)
        cells = [None if value is None and number % 2 else {"bytes": value, "path": "p"} for number, value in enumerate(values)]
        columns = {"image": pa.array(cells, STRUCT) if nested else pa.array(values, pa.binary()), "text": ["x"] * 90}
        path = tmp_path / f"{batch}.parquet"
        options = {"compression": compression, "use_dictionary": dictionary, "data_page_version": version}
        pq.write_table(pa.table(columns), path, row_group_size=40, write_batch_size=batch, data_page_size=50_000, **options)
        assert values_of(path) == values


@given(
    values=st.lists(st.none() | st.binary(max_size=200), min_size=1, max_size=40), compression=st.sampled_from(["NONE", "SNAPPY", "ZSTD"])
)
def test_any_values_are_read(tmp_path_factory, values, compression):
    path = tmp_path_factory.mktemp("table") / "a.parquet"
    pq.write_table(pa.table({"image": pa.array(values, pa.large_binary())}), path, compression=compression)
    assert values_of(path) == values


def test_records_are_the_same_in_either_way(tmp_path, monkeypatch):
    (tmp_path / "beside.jpg").write_bytes(picture(9))
    cells = [
        {"bytes": picture(0), "path": "0.jpg"},
        {"bytes": None, "path": "beside.jpg"},
        {"bytes": None, "path": None},
        None,
        {"bytes": picture(4), "path": None},
    ]
    columns = {"image": pa.array(cells, STRUCT), "text": [f"row {n}" for n in range(5)], "url": ["https://example.org"] * 5}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    streamed = records_of(table_source([tmp_path / "a.parquet"]))
    monkeypatch.setattr(parquet_pages, "LARGE_COLUMN", 10**9)
    assert streamed == records_of(table_source([tmp_path / "a.parquet"]))
    assert [record.problem for record in streamed] == ["", "", "no image", "no image", ""]


def test_forms_that_are_not_read_here_are_left_to_pyarrow(tmp_path):
    pq.write_table(pa.table({"image": pa.array([[b"x"]], pa.list_(pa.binary())), "text": ["x"]}), tmp_path / "list.parquet")
    pq.write_table(pa.table({"image": [b"x"], "text": ["x"]}), tmp_path / "brotli.parquet", compression="BROTLI")
    for name in ("list", "brotli"):
        with pq.ParquetFile(tmp_path / f"{name}.parquet") as table:
            assert large_column(table, 0, "image") is None
        assert records_of(table_source([tmp_path / f"{name}.parquet"]))[0].image == b"x"


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_value_that_is_too_large_costs_itself(tmp_path, monkeypatch, dictionary):
    monkeypatch.setattr(parquet_pages, "LARGEST_FILE", 1000)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"a", bytes(5000), b"b"], "text": ["x"] * 3}), path, use_dictionary=dictionary)
    first, second, third = values_of(path)
    assert (first, third) == (b"a", b"b")
    assert isinstance(second, Refused)
    assert [record.problem for record in records_of(table_source([path]))] == ["", "file is too large", ""]


@pytest.mark.parametrize("compression", ["NONE", "SNAPPY", "GZIP", "ZSTD"])
def test_damage_anywhere_gives_values_or_a_named_end(tmp_path, compression):
    generator = random.Random(compression)
    path = tmp_path / "a.parquet"
    values = some_values(generator, 30)
    pq.write_table(pa.table({"image": pa.array(values, pa.binary()), "text": ["x"] * 30}), path, compression=compression)
    whole = path.read_bytes()
    with pq.ParquetFile(path) as table:
        column = large_column(table, 0, "image")
    outcomes = set()
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            near = generator.choice([column.start, column.end - 60])  # headers and indices
            content[near + generator.randrange(60)] = generator.randrange(256)
        path.write_bytes(content)
        with path.open("rb") as file:
            try:
                assert len(list(binary_values(file, column))) == 30
                outcomes.add("read")
            except (ValueError, OSError):
                outcomes.add("damaged")
    assert "damaged" in outcomes
    path.write_bytes(whole[: column.start + 4] + bytes(40) + whole[column.start + 44 :])
    assert list(problems_of(records_of(table_source([path]))).values())[-1] == "table is damaged from here on"


MEASURE = """
import resource, sys
from microdit.data.sources.open import open_source
records = open_source(sys.argv[1]).parts[0].records()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(1 for _ in records), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_does_not_grow_with_the_row_group(tmp_path):
    generator = random.Random(0)
    columns = {"image": [generator.randbytes(400_000) for _ in range(400)], "text": ["x"] * 400}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=400, compression="SNAPPY")
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "a.parquet")], capture_output=True, text=True, check=True)
    rows, megabytes = map(int, done.stdout.split())
    assert rows == 400
    assert megabytes < 60  # of a row group of 160
