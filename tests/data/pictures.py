"""Write small real image files, tables and archives for the tests of the readers."""

import io
import json
import tarfile
from pathlib import Path

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
