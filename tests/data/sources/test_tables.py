import io
import os
import random
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from microdit.data.sources.open import open_source
from microdit.data.sources.tables import hub_source, saved_source, table_source
from microdit.errors import UserError
from tests.data.pictures import damaged_in_the_middle, keys_of, picture, problems_of, records_of, write_file


def write_table(path, columns, row_group_size=100):
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def image_cells(count):
    return [{"bytes": picture(n), "path": f"{n}.jpg"} for n in range(count)]


def test_each_row_group_is_a_part_and_keys_are_row_numbers(tmp_path):
    path = write_table(tmp_path / "data.parquet", {"image": image_cells(7), "text": [f"row {n}" for n in range(7)]}, row_group_size=3)
    source = table_source([path])
    assert [keys_of(part) for part in source.parts] == [[f"data.parquet/{n}" for n in rows] for rows in ((0, 1, 2), (3, 4, 5), (6,))]
    records = records_of(source)
    assert source.caption_weights == {"text": 1.0}
    assert all((record.image, record.captions) == (picture(n), {"text": f"row {n}"}) for n, record in enumerate(records))


@pytest.mark.parametrize("column", ["image", "jpg", "png", "bytes", "anything"])
def test_the_column_of_pictures_is_found(tmp_path, column):
    columns = {"prompt": ["words"], "size": [5], column: [picture()]}
    assert records_of(table_source([write_table(tmp_path / "a.parquet", columns)]))[0].image == picture()


def test_captions_may_be_several_columns_and_lists(tmp_path):
    columns = {"image": [picture()] * 3, "caption": [["first", "second"], [], None], "alt": ["alt", "other", None]}
    path = write_table(tmp_path / "a.parquet", columns)
    records = records_of(table_source([path], {"caption": 0.7, "alt": 0.3}))
    assert [record.captions for record in records] == [{"caption": "first", "alt": "alt"}, {"alt": "other"}, {}]
    assert [record.problem for record in records] == ["", "", "no caption"]


def test_rows_without_a_picture_or_a_caption_are_counted(tmp_path):
    write_file(tmp_path / "beside.jpg", picture(9))
    text = pa.array([b"words", b"words", None, b"f\xfcr", b"words", b"words"], pa.binary()).view(pa.string())
    cells = [
        None,
        {"bytes": None, "path": None},
        *image_cells(2),
        {"bytes": None, "path": "beside.jpg"},
        {"bytes": None, "path": "gone.jpg"},
    ]
    records = records_of(table_source([write_table(tmp_path / "a.parquet", {"image": cells, "caption": text})]))
    problems = ["no image", "no image", "no caption", "caption is not UTF-8", "", "no such file"]
    assert problems_of(records) == {f"a.parquet/{n}": problem for n, problem in enumerate(problems)}
    assert records[4].image == picture(9)


def test_a_damaged_row_group_does_not_hide_the_others(tmp_path):
    noise = [bytes(n * k * k % 251 for k in range(400)) for n in range(6)]  # stored as it is, so that its place can be found
    path = tmp_path / "a.parquet"
    columns = {"image": noise, "caption": [f"row {n}" for n in range(6)]}
    pq.write_table(pa.table(columns), path, row_group_size=2, use_dictionary=False, compression="zstd")
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    records = records_of(table_source([path]))
    assert problems_of(records) == {
        "a.parquet/0": "",
        "a.parquet/1": "",
        "a.parquet/2#end": "table is damaged from here on",
        "a.parquet/4": "",
        "a.parquet/5": "",
    }


def test_a_damaged_file_does_not_hide_the_others(tmp_path):
    good = write_table(tmp_path / "b.parquet", {"image": image_cells(1), "caption": ["words"]})
    bad = write_file(tmp_path / "a.parquet", good.read_bytes()[:-20])
    assert problems_of(records_of(table_source([bad, good]))) == {"a.parquet#end": "table is damaged from here on", "b.parquet/0": ""}
    with pytest.raises(UserError, match=r"a.parquet is not a Parquet file, or is damaged\."):
        table_source([bad])


@pytest.mark.parametrize(
    ("columns", "captions", "sentence"),
    [
        ({"image": [b""], "alt": [""]}, None, r"no caption, text, prompt\. Its columns are alt\. Say which hold captions: --caption NAME"),
        ({"image": [b""], "alt": [""]}, {"alt": 1.0, "long": 1.0}, r"has no column long\. Its columns are alt, image\."),
        ({"text": [""]}, None, r"no column of binary data, and none that names files\. Its columns are text\. .*--file-column"),
        ({"a": [b""], "b": [b""], "text": [""]}, None, "several columns of binary data"),
    ],
)
def test_tables_that_do_not_say_enough_are_refused(tmp_path, columns, captions, sentence):
    with pytest.raises(UserError, match=sentence):
        table_source([write_table(tmp_path / "a.parquet", columns)], captions)


STRANGE = {  # each cell that Python cannot hold, and what becomes of its record
    "timestamp": (pa.array([2**62, 0], pa.timestamp("us")), "caption is not text"),
    "zone": (pa.array([0, 0], pa.timestamp("us", tz="No/Where")), "caption is not text"),
    "date": (pa.array([2**31 - 1, 0], pa.int32()).cast(pa.date32()), "caption is not text"),
    "duration": (pa.array([2**62, 0], pa.duration("s")), "caption is not text"),
    "map": (pa.array([[("a", 2**62)], []], pa.map_(pa.string(), pa.timestamp("us"))), "caption is not text"),
    "fields": (pa.StructArray.from_arrays([pa.array(["a", "b"])] * 2, ["x", "x"]), "caption is not text"),
    "latin": (pa.array([b"f\xfcr", b"word"], pa.binary()).view(pa.string()), "caption is not UTF-8"),
    "lists": (pa.ListArray.from_arrays([0, 1, 2], pa.array([b"f\xfcr", b"word"], pa.binary()).view(pa.string())), "caption is not UTF-8"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_cell_that_python_cannot_hold_costs_its_own_record(tmp_path, kind):
    cells, problem = STRANGE[kind]
    table = {"image": image_cells(4), "caption": ["words"] * 4, "other": pa.concat_arrays([cells, cells])}
    path = write_table(tmp_path / "a.parquet", table)
    assert records_of(table_source([path], {"other": 1.0}))[0].problem == problem
    assert len(records_of(table_source([path], {"other": 1.0}))) == 4
    both = records_of(table_source([path], {"caption": 0.5, "other": 0.5}))
    assert [(record.captions["caption"], record.problem) for record in both] == [("words", "")] * 4


def test_the_bytes_beside_a_name_that_is_not_utf_8_are_kept(tmp_path):
    names = pa.array([b"\xff.jpg", b"b.jpg"], pa.binary()).view(pa.string())
    cells = pa.StructArray.from_arrays([pa.array([picture(0), picture(1)]), names], ["bytes", "path"])
    records = records_of(table_source([write_table(tmp_path / "a.parquet", {"image": cells, "text": ["words"] * 2})]))
    assert [(record.image, record.problem) for record in records] == [(picture(0), ""), (picture(1), "")]


@pytest.mark.parametrize("beside", [False, True])
def test_file_names_that_are_not_utf_8_cost_their_own_record(tmp_path, beside):
    write_file(tmp_path / "b.jpg", picture())
    names = pa.array([b"\xff.jpg", b"b.jpg"], pa.binary()).view(pa.string())
    path = write_table(tmp_path / "metadata.parquet", {"file_name": names, "text": ["words"] * 2})
    source = open_source(str(tmp_path)) if beside else table_source([path])
    assert list(problems_of(records_of(source)).values()) == ["file cannot be read", ""]


@pytest.mark.parametrize("names", [("image", "text", "text"), ("image", "image", "text"), ("image", "text", "url", "url")])
def test_two_columns_of_one_name_are_refused(tmp_path, names):
    columns = [pa.array([b"x" if name == "image" else "words"]) for name in names]
    pq.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=rf"a\.parquet: several columns are named {names[-2] if 'url' in names else names[1]}\. Rename all but one"
    ):
        table_source([tmp_path / "a.parquet"])


def test_columns_of_one_name_that_are_not_read_are_no_trouble(tmp_path):
    table = pa.Table.from_arrays([pa.array([picture()]), *[pa.array(["words"])] * 3], names=["image", "text", "more", "more"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert records_of(table_source([tmp_path / "a.parquet"]))[0].captions == {"text": "words"}


def test_a_column_whose_name_is_not_utf_8_makes_a_damaged_table(tmp_path):
    good = write_table(tmp_path / "b.parquet", {"image": image_cells(1), "text": ["words"]})
    pq.write_table(pa.table({"image": image_cells(1), "text": ["words"], "ABCDEF": [1]}), tmp_path / "a.parquet", store_schema=False)
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes().replace(b"ABCDEF", b"\xff\xfeCDEF"))
    records = records_of(table_source([tmp_path / "a.parquet", good]))
    assert problems_of(records) == {"a.parquet#end": "table is damaged from here on", "b.parquet/0": ""}


def test_a_saved_data_set_whose_features_make_no_sense_is_damaged(tmp_path):
    datasets.Dataset.from_dict({"image": [picture()], "text": ["words"]}).save_to_disk(tmp_path / "saved")
    about = {"huggingface": '{"info": {"features": {"image": "nonsense"}}}'}
    table = pa.table({"image": [picture()], "text": ["words"]}).replace_schema_metadata(about)
    with pa.ipc.new_stream(next((tmp_path / "saved").glob("*.arrow")), table.schema) as file:
        file.write_table(table)
    with pytest.raises(UserError, match="looks like a data set saved by save_to_disk, but is damaged"):
        saved_source(tmp_path / "saved")


def test_a_saved_data_set_with_changed_bytes_ends_no_process(tmp_path):
    """Arrow itself reads beyond the file in about a tenth of the cases, and then crashes."""
    datasets.Dataset.from_dict({"image": image_cells(40), "text": [f"picture {i}" for i in range(40)]}).save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    content, numbers, ends = file.read_bytes(), random.Random(0), Counter()
    for _ in range(100):
        changed = bytearray(content)
        for _ in range(numbers.choice([1, 1, 3, 10])):
            changed[numbers.randrange(len(changed))] = numbers.randrange(256)
        file.write_bytes(changed)
        if (child := os.fork()) == 0:
            try:
                assert len(records_of(saved_source(tmp_path / "set"))) <= 40
                os._exit(0)
            except UserError:
                os._exit(1)
            except BaseException:
                os._exit(2)
        ends[os.waitpid(child, 0)[1]] += 1
    assert set(ends) == {0, 1 << 8}, ends


def test_a_damaged_list_of_the_images_beside_it_is_refused_by_name(tmp_path):
    write_file(tmp_path / "b.jpg", picture())
    columns = {"file_name": [f"{n}.jpg" for n in range(300)], "text": ["words"] * 300}
    write_file(tmp_path / "metadata.parquet", damaged_in_the_middle(columns))
    with pytest.raises(UserError, match=r"metadata\.parquet is damaged, so that it does not say which images it lists"):
        open_source(str(tmp_path))


def test_a_saved_data_set_gives_the_files_it_was_made_of(tmp_path):
    images = [Image.open(io.BytesIO(picture(n, "PNG"))) for n in range(3)]
    features = datasets.Features({"n": datasets.Value("int64"), "caption": datasets.Value("string"), "image": datasets.Image()})
    columns = {"n": range(3), "caption": ["a", None, "c"], "image": [*images[:2], None]}
    train = datasets.Dataset.from_dict(columns, features)
    train.save_to_disk(tmp_path / "one")
    records = records_of(saved_source(tmp_path / "one"))
    assert problems_of(records) == {"one/0": "", "one/1": "no caption", "one/2": "no image"}
    assert Image.open(io.BytesIO(records[0].image)).tobytes() == images[0].tobytes()
    datasets.DatasetDict({"train": train, "test": train.select([0])}).save_to_disk(tmp_path / "splits")
    assert len(records_of(saved_source(tmp_path / "splits"))) == 3
    datasets.DatasetDict({"test": train}).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="holds the splits test"):
        saved_source(tmp_path / "other")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="is damaged"):
        saved_source(tmp_path / "one")


def test_a_saved_data_set_has_parts_of_a_thousand_rows(tmp_path):
    datasets.Dataset.from_dict({"jpg": [b"x"] * 1100, "text": ["y"] * 1100}).save_to_disk(tmp_path / "set")
    source = saved_source(tmp_path / "set")
    assert [len(keys_of(part)) for part in source.parts] == [1000, 100]
    assert keys_of(source.parts[1])[-1] == "set/1099"


def test_what_the_datasets_library_loads_is_a_source(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number, name in enumerate(("a.png", "b.png")):
        write_file(tmp_path / "set" / "train" / name, picture(number, "PNG"))
    write_file(tmp_path / "set" / "train" / "metadata.csv", b"file_name,caption\na.png,one\nb.png,two\n")
    records = records_of(hub_source(str(tmp_path / "set"), None, "train"))
    assert [(record.image, record.captions["caption"]) for record in records] == [(picture(0, "PNG"), "one"), (picture(1, "PNG"), "two")]
    assert len(records_of(hub_source(str(tmp_path / "set"), None, "train[:1]"))) == 1
    with pytest.raises(UserError, match=r"could not load .* split nosuch"):
        hub_source(str(tmp_path / "set"), None, "nosuch")


def test_files_beside_a_table_are_read_inside_its_folder_only(tmp_path):
    write_file(tmp_path / "secret.png", picture())
    (tmp_path / "set").mkdir()
    os.mkfifo(tmp_path / "set" / "pipe.png")
    paths = ["../secret.png", str(tmp_path / "secret.png"), "/dev/zero", "pipe.png", "x" * 5000, "\0"]
    cells = [*image_cells(1), *({"bytes": None, "path": path} for path in paths)]
    path = write_table(tmp_path / "set" / "a.parquet", {"image": cells, "text": ["words"] * len(cells)})
    outside, unreadable = "link leads out of the source", "file cannot be read"
    assert [record.problem for record in records_of(table_source([path]))] == [
        "",
        *[outside] * 3,
        "not a regular file",
        *[unreadable] * 2,
    ]


def test_rows_that_are_large_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    columns = {"image": [bytes([n]) * 200_000 for n in range(60)], "text": ["words"] * 60}
    pq.write_table(pa.table(columns), path, use_dictionary=False, write_batch_size=1, data_page_size=100_000)
    held = {}
    for bound in (1_000_000, 100_000_000):
        monkeypatch.setattr("microdit.data.sources.tables.READ_BYTES", bound)
        before = pa.total_allocated_bytes()
        held[bound] = max(pa.total_allocated_bytes() - before for _ in table_source([path]).parts[0].records())
    assert held[1_000_000] < 6_000_000 < 12_000_000 < held[100_000_000]


def test_columns_and_captions_have_usual_names_in_any_case(tmp_path):
    path = write_table(tmp_path / "a.parquet", {"Image": [picture()], "Title": ["a title"], "Text": ["a text"]})
    source = table_source([path])
    assert source.caption_weights == {"Text": 1.0}
    assert records_of(table_source([path], {"text": 1.0}))[0].captions == {"text": "a text"}


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.list_(pa.binary())])
def test_pictures_of_every_binary_type_are_read(tmp_path, kind):
    cells = [[picture()]] if pa.types.is_list(kind) else [picture()]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": pa.array(cells, kind), "text": ["words"]}), path)
    (record,) = records_of(table_source([path]))
    assert (record.image, record.captions) == (picture(), {"text": "words"})


def test_a_list_of_several_pictures_is_named(tmp_path):
    cells = [[picture(), picture(1)], [], [{"bytes": picture(), "path": None}][:0]]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": pa.array(cells, pa.list_(pa.binary())), "text": ["words"] * 3}), path)
    assert [record.problem for record in records_of(table_source([path]))] == ["several pictures in one row", "no image", "no image"]


def test_pictures_may_be_files_that_the_table_names(tmp_path):
    for name in ("in/a.png", "b.png"):
        write_file(tmp_path / "set" / name, picture(len(name)))
    write_file(tmp_path / "secret.png", picture())
    names = ["in/a.png", "b.png", "../secret.png", "gone.png", None, "https://example.org/c.png", str(tmp_path / "set" / "b.png")]
    path = write_table(tmp_path / "set" / "t.parquet", {"file_name": names, "caption": ["words"] * 7}, row_group_size=3)
    records = records_of(table_source([path]))
    assert [record.problem for record in records] == [
        *("", "", "link leads out of the source", "no such file", "no image", "row names a URL and no file", ""),
    ]
    assert records[0].image == picture(len("in/a.png"))
    parts = table_source([path]).parts
    before = [part.fingerprint() for part in parts]
    write_file(tmp_path / "set" / "b.png", picture(77))
    assert [old == part.fingerprint() for old, part in zip(before, parts, strict=True)] == [False, True, False]


def test_fields_inside_columns_can_be_captions(tmp_path):
    columns = {"image": [picture()] * 2, "meta": [{"caption": "in a struct"}, None], "json": ['{"a": {"b": "in text"}}', "{"]}
    path = write_table(tmp_path / "a.parquet", columns)
    first, second = records_of(table_source([path], {"meta.caption": 0.5, "json.a.b": 0.5}))
    assert first.captions == {"meta.caption": "in a struct", "json.a.b": "in text"}
    assert second.problem == "no caption"


def test_a_table_of_addresses_is_refused_with_the_fetching_command(tmp_path):
    columns = {"URL": ["https://example.org/a.jpg", None], "TEXT": ["words", "words"]}
    path = write_table(tmp_path / "my set.parquet", columns)
    with pytest.raises(
        UserError, match=r"img2dataset --url_list '.*my set.parquet' --input_format parquet --url_col URL --caption_col TEXT"
    ):
        table_source([path])


def test_a_large_row_group_is_warned_of(tmp_path, monkeypatch):
    path = write_table(tmp_path / "a.parquet", {"image": image_cells(50), "text": ["words"] * 50})
    assert table_source([path]).note == ""
    monkeypatch.setattr("microdit.data.sources.tables.LARGE_GROUP", 1000)  # pages of this small column are left to pyarrow
    assert "reading may take more than twice as much memory" in table_source([path]).note


def test_a_configuration_of_a_hub_data_set_is_chosen_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("small", "large"))
    write_file(tmp_path / "set" / "README.md", f"---\nconfigs:\n{configs}---\n".encode())
    for name in ("small", "large"):
        (tmp_path / "set" / name).mkdir()
        write_table(tmp_path / "set" / name / "train.parquet", {"image": [picture()], "text": [name]})
    source = open_source(f"hf:{tmp_path / 'set'}:large:train[:1]")
    assert [record.captions["text"] for record in records_of(source)] == ["large"]
    with pytest.raises(UserError, match=r"write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"):
        open_source("hf:a:b:c:d")
