"""Data sets read file by file as streams, here from a folder as from the hub: the records of `hf:`, with nothing kept on disk."""

import datasets
import pyarrow as pa
import pytest

from microdit.data.sources.open import open_source
from microdit.errors import UserError
from tests.data.pictures import picture, problems_of, records_of, write_file
from tests.data.sources.test_tables import image_cells, write_table


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Two configurations; `large` has three files, of seven rows in all."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("small", "large"))
    write_file(tmp_path / "set" / "README.md", f"---\nconfigs:\n{configs}---\n".encode())
    (tmp_path / "set" / "small").mkdir()
    write_table(tmp_path / "set" / "small" / "a.parquet", {"image": image_cells(1), "text": ["small"]})
    (tmp_path / "set" / "large").mkdir()
    for number, rows in enumerate((3, 1, 3)):
        texts = [f"file {number}, row {row}" for row in range(rows)]
        write_table(
            tmp_path / "set" / "large" / f"{number}.parquet", {"image": image_cells(rows), "text": texts, "size": list(range(rows))}
        )
    return tmp_path / "set"


def test_a_stream_gives_the_records_of_the_whole_and_a_part_for_each_file(hub, tmp_path):
    whole = open_source(f"hf:{hub}:large:train")
    assert (tmp_path / "cache").exists()
    streamed = open_source(f"hf-stream:{hub}:large:train")
    assert [[record.key for record in part.records()] for part in streamed.parts] == [
        [f"train/{number:05d}/{row}" for row in range(rows)] for number, rows in enumerate((3, 1, 3))
    ]
    found = [(record.captions, record.image) for record in records_of(streamed)]
    assert found == [(record.captions, record.image) for record in records_of(whole)]
    assert [record.captions for record in records_of(open_source(f"hf-stream:{hub}:small:train"))] == [{"text": "small"}]


def test_nothing_is_kept_on_disk(hub, tmp_path):
    before = set(tmp_path.rglob("*"))
    assert len(records_of(open_source(f"hf-stream:{hub}:large:train"))) == 7
    assert sum(path.stat().st_size for path in set(tmp_path.rglob("*")) - before if path.is_file()) == 0  # an empty lock


def test_a_part_is_read_without_the_files_before_it(hub):
    source = open_source(f"hf-stream:{hub}:large:train")
    (hub / "large" / "0.parquet").unlink()
    assert [record.captions["text"] for record in source.parts[2].records()] == [f"file 2, row {row}" for row in range(3)]


def test_a_broken_stream_stops_and_a_damaged_file_has_a_named_end(hub):
    source = open_source(f"hf-stream:{hub}:large:train")
    (hub / "large" / "1.parquet").unlink()
    with pytest.raises(UserError, match=r"broke off at row 0 of file 1: .* Run the same command again"):
        list(source.parts[1].records())
    write_file(hub / "large" / "2.parquet", (hub / "large" / "2.parquet").read_bytes()[:-50])
    assert problems_of(list(source.parts[2].records())) == {"train/00002/0#end": "table is damaged from here on"}


def test_a_changed_file_changes_the_fingerprint(hub):
    def prints() -> list[str]:
        return [part.fingerprint() for part in open_source(f"hf-stream:{hub}:large:train").parts]

    before = prints()
    assert prints() == before
    write_table(hub / "large" / "1.parquet", {"image": [picture(5)], "text": ["another"], "size": [0]})
    assert prints() != before


def test_what_cannot_be_streamed_is_refused_in_a_sentence(hub, tmp_path):
    with pytest.raises(UserError, match=r"could not open .*, configuration huge, split train, as a stream: "):
        open_source(f"hf-stream:{hub}:huge:train")
    with pytest.raises(UserError, match=r"could not open .*, split train, as a stream: "):
        open_source(f"hf-stream:{tmp_path / 'nowhere'}")
    (tmp_path / "numbers").mkdir()
    write_table(tmp_path / "numbers" / "train.parquet", {"text": pa.array(["a"]), "size": [1]})
    with pytest.raises(UserError, match="has no column of binary data"):
        open_source(f"hf-stream:{tmp_path / 'numbers'}")


@pytest.mark.parametrize("text", [["words"], [["a", "list"]]])
def test_a_file_with_other_columns_than_the_first_has_a_named_end(hub, text):
    write_table(hub / "large" / "1.parquet", {"image": image_cells(1), "text" if text[0] != "words" else "other": text, "size": [0]})
    problems = problems_of(records_of(open_source(f"hf-stream:{hub}:large:train")))
    assert len(problems) == 7
    assert {key: problem for key, problem in problems.items() if problem} == {"train/00001/0#end": "table is damaged from here on"}
