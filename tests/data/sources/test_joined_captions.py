"""Captions joined from another file by key, path or URL."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microdit.cli.data import joined_in_words
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.look import look
from microdit.data.sources.caption_options import CaptionOptions
from microdit.data.sources.joined_captions import NOT_FOUND, open_joined
from microdit.data.sources.open import open_source
from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError
from tests.data.pictures import damaged_in_the_middle, picture, problems_of, records_of, write_file, write_tar


def joined(source, file, captions=None, index=None):
    options = CaptionOptions(joined=str(file), index_folder=index or source.parent / "index")
    return open_source(str(source), captions, options=options)


def captions_of(source):
    return {record.key: record.captions for record in records_of(source)}


@pytest.fixture
def shards(tmp_path):
    """Return a folder with an archive as img2dataset writes it."""
    files = []
    for number in range(4):
        about = json.dumps({"caption": f"alt {number}", "url": f"https://example.org/{number}.jpg", "key": f"{number:05}"}).encode()
        files += [(f"{number:05}.jpg", picture(number)), (f"{number:05}.json", about)]
    write_tar(tmp_path / "shards" / "00000.tar", files)
    return tmp_path / "shards"


ROWS = [{"key": f"{number:05}", "caption_llava": f"long {number}", "score": number} for number in (0, 2, 3, 9)]


def write(path, rows):
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if name.endswith(".jsonl"):
        content = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        content = "\n".join(",".join(map(str, row)) for row in (rows[0], *(row.values() for row in rows))) + "\n"
    return write_file(path, gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())


@pytest.mark.parametrize("name", ["new.jsonl", "new.jsonl.gz", "new.csv", "new.csv.gz", "new.parquet"])
def test_captions_replace_those_of_the_source_by_key(tmp_path, shards, name):
    source = joined(shards, f"{write(tmp_path / name, ROWS)}:key:caption_llava")
    assert source.caption_weights == {"caption_llava": 1.0}
    assert captions_of(source) == {f"{n:05}": {"caption_llava": f"long {n}"} if n != 1 else {} for n in range(4)}
    assert problems_of(records_of(source))["00001"] == NOT_FOUND
    assert source.joined() == {
        "file": name,
        "records_matched": 3,
        "records_unmatched": 1,
        "rows_matched": 3,
        "rows_unmatched": 1,
        "rows_repeated": 0,
        "rows_broken": 0,
    }


def test_captions_are_added_with_a_weight(tmp_path, shards):
    file = f"{write(tmp_path / 'new.jsonl', ROWS)}:key:caption_llava"
    source = joined(shards, file, {"caption": 0.3, "caption_llava": 0.7})
    assert source.caption_weights == {"caption": 0.3, "caption_llava": 0.7}
    found = captions_of(source)
    assert found["00000"] == {"caption": "alt 0", "caption_llava": "long 0"}
    assert (found["00001"], problems_of(records_of(source))["00001"]) == ({"caption": "alt 1"}, "")
    with pytest.raises(UserError, match=r"adds captions named caption_llava: give them a weight"):
        joined(shards, file, {"caption": 1.0})


def test_rows_are_found_by_url_and_by_path(tmp_path, shards):
    rows = [{"url": f"https://example.org/{n}.jpg", "text": f"by url {n}"} for n in (0, 1, 1)]
    source = joined(shards, write(tmp_path / "urls.jsonl", rows))
    assert captions_of(source)["00001"] == {"text": "by url 1"}
    assert (source.joined()["rows_repeated"], source.joined()["records_matched"]) == (1, 2)
    for name in ("in/a.png", "b.png"):
        write_file(tmp_path / "set" / name, picture())
    rows = [{"file_name": "in/a.png", "text": "by path"}, {"file_name": "b", "text": "by name"}]
    source = joined(tmp_path / "set", write(tmp_path / "paths.csv", rows))
    assert captions_of(source) == {"b.png": {"text": "by name"}, "in/a.png": {"text": "by path"}}


def test_broken_rows_are_counted_and_lists_and_fields_inside_are_read(tmp_path, shards):
    rows = [{"key": "00000", "more": {"long": ["", "in a list"]}}, {"key": "00001", "more": None}, {"key": None, "more": {"long": "x"}}]
    file = write(tmp_path / "new.jsonl", rows)
    file.write_bytes(file.read_bytes() + b"{\n\n")
    source = joined(shards, f"{file}:key:more.long")
    assert captions_of(source)["00000"] == {"more.long": "in a list"}
    assert source.joined()["rows_broken"] == 3
    assert "3 rows are broken" in joined_in_words(source.joined())


def test_what_cannot_be_joined_is_refused_with_the_columns(tmp_path, shards):
    file = write(tmp_path / "new.jsonl", [{"number": "00000", "words": "x"}])
    with pytest.raises(UserError, match=r"no column with keys under a usual name. Its columns are number, words. Name both"):
        joined(shards, file)
    with pytest.raises(UserError, match="has no column id"):
        joined(shards, f"{file}:id:words")
    with pytest.raises(UserError, match="cannot be read: no such file"):
        joined(shards, tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="a quote is opened in line 2 and not closed"):
        records_of(joined(shards, write_file(tmp_path / "open.csv", b'key,text\n00000,"open\n00001,x\n')))


def test_whatever_the_cells_of_a_table_hold_is_a_caption_or_a_broken_row(tmp_path, shards):
    texts = pa.array([b"words", b"f\xfcr", None, b"more"], pa.binary()).view(pa.string())
    keys = pa.array([b"00000", b"00001", b"00002", b"\xff"], pa.binary()).view(pa.string())
    beyond = pa.array([2**62] * 4, pa.timestamp("us"))  # the year 148109
    pq.write_table(pa.table({"key": keys, "text": texts, "when": beyond}), tmp_path / "new.parquet")
    source = joined(shards, f"{tmp_path / 'new.parquet'}:key:text")
    assert captions_of(source) == {"00000": {"text": "words"}} | {f"0000{n}": {} for n in (1, 2, 3)}
    assert source.joined()["rows_broken"] == 2
    source = joined(shards, f"{tmp_path / 'new.parquet'}:key:when")
    assert set(problems_of(records_of(source)).values()) == {NOT_FOUND}


def test_a_file_that_breaks_off_or_is_ambiguous_is_refused_by_name(tmp_path, shards):
    damaged = write_file(tmp_path / "cut.parquet", damaged_in_the_middle({"key": [f"{n:05}" for n in range(300)], "text": ["x"] * 300}))
    with pytest.raises(UserError, match=r"cut\.parquet cannot be read to its end"):
        records_of(joined(shards, damaged))
    pq.write_table(pa.Table.from_arrays([pa.array(["00000"])] * 3, names=["key", "text", "text"]), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice\.parquet: several columns are named text\. Rename all but one"):
        joined(shards, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"long\.csv, line 1: the header cannot be read: line is too long"):
        joined(shards, write_file(tmp_path / "long.csv", b"k" * 5_000_000))


def test_a_line_of_any_length_is_a_broken_row(tmp_path, shards):
    file = write_file(tmp_path / "long.csv", b"key,text\n00000," + b"w" * 30_000_000 + b"\n00001,words\n")
    tracemalloc.start()
    try:
        assert captions_of(joined(shards, file))["00001"] == {"text": "words"}
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_an_encoding_counts_both_sides_and_leaves_no_index(tmp_path, shards, text_encoder):
    write_tar(shards / "00001.tar", [("00009.jpg", picture(9, "PNG")), ("00009.json", b"{}")])
    out = tmp_path / "out"
    source = joined(shards, f"{write(tmp_path / 'new.jsonl', ROWS)}:key:caption_llava", index=tmp_path / ".out.part")
    manifest = encode_source(source, out, EncodeSettings((8,)), Pixels(), text_encoder)
    assert (manifest["rows"], manifest["rejected"]) == (4, {NOT_FOUND: 1})
    assert joined_in_words(manifest["joined"]) == ("captions of new.jsonl: 4 of 5 pictures found theirs; 0 of its rows found no picture")
    assert not list(out.glob(".*"))
    assert look(source)[2]["joined"]["records_matched"] == 4


def test_another_file_under_the_same_name_is_another_source(tmp_path, shards):
    prints = []
    for text in ("one", "another"):
        source = joined(shards, write(tmp_path / "new.jsonl", [{"key": "00000", "text": text}]))
        assert captions_of(source)["00000"] == {"text": text}
        prints.append(source.parts[0].fingerprint())
    assert prints[0] != prints[1]


def test_the_index_takes_the_same_memory_whatever_the_rows(tmp_path):
    peaks = []
    for count in (20_000, 200_000):
        rows = (f'{{"key": "{number}", "text": "a caption of some words {number}"}}\n' for number in range(count))
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            file.writelines(rows)
        captions = open_joined(str(path), tmp_path / "index")
        tracemalloc.start()
        assert captions.counts()["rows_unmatched"] == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_000_000
