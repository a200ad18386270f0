"""Write small real image files, tables and archives for the tests of the readers."""

import io
import json
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.cbook import get_sample_data
from PIL import Image

from microdit.data.sources.base import Part, Record, Source


def picture(number: int = 0, form: str = "JPEG", size: tuple[int, int] = (12, 8)) -> bytes:
    """Return the content of an image file, a different image for each number."""
    file = io.BytesIO()
    Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, number % 256)).save(file, form)
    return file.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    """Write a tar archive, in which names may repeat. Parent folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_file(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def damaged_in_the_middle(columns: dict[str, object]) -> bytes:
    """Return a Parquet file of three row groups whose second one cannot be read in its first column."""
    table, file = pa.table(columns), io.BytesIO()
    pq.write_table(table, file, row_group_size=table.num_rows // 3, use_dictionary=False)
    column = pq.ParquetFile(file).metadata.row_group(1).column(0)
    content = bytearray(file.getvalue())
    content[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    return bytes(content)


def records_of(source: Source) -> list[Record]:
    """Return all records. Reads them twice: a part must yield the same records each time, with unique keys."""
    first, second = ([record for part in source.parts for record in part.records()] for _ in range(2))
    assert first == second
    for part in source.parts:
        keys = keys_of(part)
        assert len(keys) == len(set(keys))
    names = [part.name for part in source.parts]
    assert len(names) == len(set(names))
    return first


def keys_of(part: Part) -> list[str]:
    return [record.key for record in part.records()]


def problems_of(records: list[Record]) -> dict[str, str]:
    return {record.key: record.problem for record in records}


RED_HEART = '<path fill="#dd2e44" d="M2 2h12v12h-12z"/>'
OWL = '<defs><circle id="a" cx="8" cy="8" r="7"/></defs><use href="#a" fill="#662113"/>'


def write_icons(folder: Path, package: str, icons: dict[str, object], **more: object) -> Path:
    """Write a set of icons as npm installs it, and return its folder.

    It names a red heart, an owl, a keycap, a flag, an emoji without a drawing, and a skin tone.
    """
    place = folder / "node_modules" / "@iconify-json" / package
    chars = {"2764": "red-heart", "1f989": "owl", "0031-20e3": "keycap-1", "1f1ef-1f1f5": "flag-japan", "1f34e": "red-apple"}
    write_json(place / "chars.json", chars | {"1f44d-1f3fb": "thumbs-up-light"})
    write_json(
        place / "info.json", {"name": "A set", "author": {"name": "Somebody"}, "license": {"title": "CC BY 4.0", "spdx": "CC-BY-4.0"}}
    )
    drawings = {name: body if isinstance(body, dict) else {"body": body} for name, body in icons.items()}
    write_json(place / "icons.json", {"prefix": package, "icons": drawings, "width": 16, "height": 16, **more})
    return place


def photographs(count: int, side: int) -> list[Image.Image]:
    """Return square crops of a real photograph, the one that matplotlib carries."""
    photograph = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    generator, crops = random.Random(0), []
    for _ in range(count):
        size = generator.randint(side, min(photograph.size))
        left, top = generator.randint(0, photograph.width - size), generator.randint(0, photograph.height - size)
        crops.append(photograph.crop((left, top, left + size, top + size)).resize((side, side), Image.Resampling.LANCZOS))
    return crops


def write_photographs(folder: Path, count: int, side: int = 64) -> Path:
    """Write the crops into a folder, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(photographs(count, side)):
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"part {number} of a portrait")
    return folder
