"""The two sets of generated pictures, JourneyDB and DiffusionDB: archives or folders of pictures, and lists of their prompts.

Pictures and lists are joined by the pictures' names; what stands on one side only is a record with a problem.
"""

import json
import zipfile
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from microdit.data.archives import DAMAGED, Sample, read_archive
from microdit.data.folders import find_images, read_file
from microdit.data.sidecars import from_fields
from microdit.data.sources import Part, Record, relative_names
from microdit.errors import UserError

JOURNEYDB_LIST = "train_anno_realease_repath.jsonl"  # sic
UNSAFE = 0.2  # score above which the authors leave a picture of DiffusionDB out


def journeydb_parts(folder: Path, captions: dict[str, float]) -> list[Part]:
    """Lines about folders that are not here are passed over: most people have a few of its 200 archives."""
    train = next((place for place in (folder / "train", folder / "data" / "train", folder) if (place / "imgs").is_dir()), None)
    if train is None or not (train / JOURNEYDB_LIST).is_file():
        return []
    places = sorted(path for path in (train / "imgs").iterdir() if path.is_dir() or path.suffix == ".tgz")
    # An archive that was unpacked and kept is read once.
    places = [path for path in places if path.is_dir() or not path.with_suffix("").is_dir()]
    parts = [Part(path.name, partial(_read_journeydb, path, train / JOURNEYDB_LIST, tuple(captions))) for path in places]
    return [*parts, Part(JOURNEYDB_LIST, partial(_broken_lines, train / JOURNEYDB_LIST))] if parts else []


def _read_journeydb(place: Path, listing: Path, wanted: tuple[str, ...]) -> Iterator[Record]:
    listed: dict[str, tuple[dict[str, str], str]] = {}
    with listing.open("rb") as file:
        for offset in _lines_by_folder(listing).get(place.name.partition(".")[0], []):
            file.seek(offset)
            fields = json.loads(file.readline())
            stem = Path(fields["img_path"]).stem
            if stem in listed:
                yield Record(f"{JOURNEYDB_LIST}#{offset}", {}, b"", "listed twice")
                continue
            task = fields.get("Task2")
            caption = task.get("Caption") if isinstance(task, dict) else None
            listed[stem] = from_fields({"prompt": fields.get("prompt"), "caption": caption}, wanted)
    yield from _joined(place, _samples(place), listed)


@lru_cache(maxsize=1)
def _lines_by_folder(listing: Path) -> dict[str, list[int]]:
    """Where the lines of each folder's pictures begin, in bytes: the list has millions of long lines. Broken lines are under ""."""
    offsets: dict[str, list[int]] = {}
    offset = 0
    with listing.open("rb") as file:
        for line in file:
            if line.strip():
                try:
                    folder = Path(json.loads(line)["img_path"]).parts[-2]
                except (ValueError, KeyError, TypeError, IndexError):
                    folder = ""
                offsets.setdefault(folder, []).append(offset)
            offset += len(line)
    return offsets


def _broken_lines(listing: Path) -> Iterator[Record]:
    for offset in _lines_by_folder(listing).get("", []):
        yield Record(f"{listing.name}#{offset}", {}, b"", "metadata line is not JSON")


def diffusiondb_parts(folder: Path, captions: dict[str, float]) -> list[Part]:
    """Pictures whose scores in the set's own tables, if these are here, are above UNSAFE are marked."""
    found = [path for path in folder.rglob("part-*") if path.suffix == ".zip" or (path / f"{path.name}.json").is_file()]
    places = sorted(path for path in found if path.is_dir() or path.with_suffix("") not in found)
    tables = [path for name in ("metadata.parquet", "metadata-large.parquet") if (path := folder / name).is_file()]
    names = relative_names(places) if places else []
    return [Part(name, partial(_read_diffusiondb, path, tuple(tables))) for name, path in zip(names, places, strict=True)]


def _read_diffusiondb(place: Path, tables: tuple[Path, ...]) -> Iterator[Record]:
    unsafe = _unsafe_images(tables)
    listed = {}
    for image, entry in _diffusiondb_prompts(place).items():
        captions, problem = from_fields({"prompt": entry.get("p") if isinstance(entry, dict) else None}, ["prompt"])
        listed[Path(image).stem] = captions, "marked unsafe" if image in unsafe else problem
    yield from _joined(place, (sample for sample in _samples(place) if sample.key.rpartition("/")[2] != place.stem), listed)


def _diffusiondb_prompts(place: Path) -> dict[str, Any]:
    """Empty if they cannot be read: then no picture has a caption, and the archive says what is wrong with it."""
    name = f"{place.stem}.json"
    try:
        if place.is_dir():
            prompts = json.loads((place / name).read_bytes())
        else:
            with zipfile.ZipFile(place) as archive:
                prompts = json.loads(archive.read(next(inside for inside in archive.namelist() if inside.rpartition("/")[2] == name)))
    except (OSError, ValueError, zipfile.BadZipFile, StopIteration):
        return {}
    return prompts if isinstance(prompts, dict) else {}


@lru_cache(maxsize=1)
def _unsafe_images(tables: tuple[Path, ...]) -> frozenset[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    unsafe: set[str] = set()
    for table in tables:
        above = [[("image_nsfw", ">", UNSAFE)], [("prompt_nsfw", ">", UNSAFE)]]  # either
        try:
            unsafe.update(pq.read_table(table, columns=["image_name"], filters=above)["image_name"].to_pylist())
        except (pa.ArrowException, OSError, KeyError) as error:
            raise UserError(f"{table} is damaged, or has no image_name, image_nsfw and prompt_nsfw: download it again.") from error
    return frozenset(unsafe)


def _samples(place: Path) -> Iterator[Sample]:
    """The pictures in an archive or in a folder."""
    if not place.is_dir():
        yield from read_archive(place, frozenset())
        return
    for name in find_images(place):
        image, problem = read_file(place / name)
        yield Sample(str(Path(name).with_suffix("")), image, problem=problem)


def _joined(place: Path, samples: Iterator[Sample], listed: dict[str, tuple[dict[str, str], str]]) -> Iterator[Record]:
    """Pictures with the captions listed under their stems; then what is listed and not there. Keys are the same packed and unpacked."""
    folder = place.name.partition(".")[0]
    met: set[str] = set()
    damaged = False
    for sample in samples:
        stem = sample.key.rpartition("/")[2]
        met.add(stem)
        damaged |= sample.problem == DAMAGED
        captions, problem = listed.get(stem, ({}, "no caption"))
        yield Record(f"{folder}/{stem}", captions, sample.image, sample.problem or problem)
    if not damaged:  # otherwise nobody knows
        yield from (Record(f"{folder}/{stem}", captions, b"", "no such file") for stem, (captions, _) in listed.items() if stem not in met)
