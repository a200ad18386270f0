"""JourneyDB and DiffusionDB: generated images, and lists of their prompts, which are joined by file name.

Images are in archives or in folders that were unpacked from them. An entry without a counterpart becomes a record with a problem.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from microdit.data.sources.archives import open_zip, read_archive, read_zipped
from microdit.data.sources.base import Contents, Part, Record, relative_names
from microdit.data.sources.metadata import from_fields
from microdit.data.sources.samples import Sample
from microdit.data.sources.untrusted_files import (
    LARGEST_TEXT,
    Refused,
    Roots,
    bounded_lines,
    find_files,
    open_file,
    read_file,
    roots_of,
)
from microdit.errors import UserError
from microdit.io.untrusted_text import parse_json_object

JOURNEYDB_LIST = "train_anno_realease_repath.jsonl"  # sic
UNSAFE = 0.2  # score above which the authors exclude an image of DiffusionDB


def journeydb(folder: Path, captions: dict[str, float]) -> Contents | None:
    """Return one part for each archive or unpacked folder, and one for the broken lines of the list.

    Lines about other folders are skipped, because most people have only a few of the 200 archives.
    """
    train = next((place for place in (folder / "train", folder / "data" / "train", folder) if (place / "imgs").is_dir()), None)
    if train is None or not (train / JOURNEYDB_LIST).is_file():
        return None
    places = sorted(path for path in (train / "imgs").iterdir() if path.is_dir() or path.suffix == ".tgz")
    # Where both an archive and its unpacked folder exist, only the folder is read.
    places = [path for path in places if path.is_dir() or not path.with_suffix("").is_dir()]
    listing, roots = train / JOURNEYDB_LIST, roots_of(folder)
    parts = [
        Part(path.name, partial(_read_journeydb, path, listing, roots, tuple(captions)), partial(_files_of, path, (listing,)))
        for path in places
    ]
    broken = Part(JOURNEYDB_LIST, partial(_broken_lines, listing, roots), partial(iter, (listing,)))
    return Contents([*parts, broken], [listing, *places]) if parts else None


def _read_journeydb(place: Path, listing: Path, roots: Roots, wanted: tuple[str, ...]) -> Iterator[Record]:
    listed: dict[str, tuple[dict[str, str], str]] = {}
    with _open_list(listing, roots) as file:
        for offset in _lines_by_folder(listing, roots).get(place.name.partition(".")[0], []):
            file.seek(offset)
            fields = parse_json_object(file.readline())
            stem = Path(fields["img_path"]).stem
            if stem in listed:
                yield Record(f"{JOURNEYDB_LIST}#{offset}", {}, b"", "listed twice")
                continue
            task = fields.get("Task2")
            caption = task.get("Caption") if isinstance(task, dict) else None
            listed[stem] = from_fields({"prompt": fields.get("prompt"), "caption": caption}, wanted)
    yield from _joined(place, _samples(place, roots), listed)


@lru_cache(maxsize=1)
def _lines_by_folder(listing: Path, roots: Roots) -> dict[str, list[int]]:
    """Return the positions, in bytes, of the lines about each folder's images; broken lines are listed under "".

    Only positions are kept, because the list has millions of long lines.
    """
    offsets: dict[str, list[int]] = {}
    offset = 0
    with _open_list(listing, roots) as file:
        for line in bounded_lines(file):
            if line is None or line.strip():
                offsets.setdefault(_folder_of(line), []).append(offset)
            offset = file.tell()
    return offsets


def _folder_of(line: bytes | None) -> str:
    try:
        return Path(parse_json_object(line or b"")["img_path"]).parts[-2]
    except (ValueError, KeyError, TypeError, IndexError):
        return ""


def _open_list(listing: Path, roots: Roots) -> BinaryIO:
    try:
        return open_file(listing, roots)
    except Refused as refused:
        raise UserError(f"{listing} cannot be used: {refused.reason}. Put the file itself there.") from refused


def _broken_lines(listing: Path, roots: Roots) -> Iterator[Record]:
    for offset in _lines_by_folder(listing, roots).get("", []):
        yield Record(f"{listing.name}#{offset}", {}, b"", "metadata line is not JSON")


def diffusiondb(folder: Path, captions: dict[str, float]) -> Contents:
    """Return one part for each archive or unpacked folder. Images with a score above UNSAFE in the data set's tables get a problem."""
    found = [path for path in folder.rglob("part-*") if path.suffix == ".zip" or (path / f"{path.name}.json").is_file()]
    places = sorted(path for path in found if path.is_dir() or path.with_suffix("") not in found)
    tables = [path for name in ("metadata.parquet", "metadata-large.parquet") if (path := folder / name).is_file()]
    names = relative_names(places) if places else []
    roots = roots_of(folder)
    prompts = [path / f"{path.name}.json" for path in places]
    parts = [
        Part(name, partial(_read_diffusiondb, path, roots, tuple(tables)), partial(_files_of, path, (*tables, prompt)))
        for name, path, prompt in zip(names, places, prompts, strict=True)
    ]
    return Contents(parts, [*tables, *places, *prompts])


def _read_diffusiondb(place: Path, roots: Roots, tables: tuple[Path, ...]) -> Iterator[Record]:
    unsafe = _unsafe_images(tables)
    listed = {}
    prompts, file = _diffusiondb_prompts(place, roots)
    for image, entry in prompts.items():
        captions, problem = from_fields({"prompt": entry.get("p") if isinstance(entry, dict) else None}, ["prompt"])
        listed[Path(image).stem] = captions, "marked unsafe" if image in unsafe else problem
    yield from _joined(place, _samples(place, roots, file), listed)


def _diffusiondb_prompts(place: Path, roots: Roots) -> tuple[dict[str, Any], str]:
    """Return the prompts of one archive or folder by image name, and the file in it that holds them.

    Both are empty if they cannot be read: then no image has a caption, and reading the archive reports the problem.
    """
    name = f"{place.stem}.json"
    try:
        file, content = (name, read_file(place / name, roots, LARGEST_TEXT)[0]) if place.is_dir() else _zipped(place, roots, name)
        return parse_json_object(content), file
    except (Refused, ValueError):
        return {}, ""


def _zipped(place: Path, roots: Roots, name: str) -> tuple[str, bytes]:
    """Return the path and the content of the first file of that name in an archive; empty if there is none. Raises Refused."""
    with open_file(place, roots) as file:
        archive = open_zip(file)
        infos = archive.infolist() if archive else []
        info = next((info for info in infos if info.filename.rpartition("/")[2] == name), None)
        return (info.filename, read_zipped(archive, info, LARGEST_TEXT)[0]) if archive and info else ("", b"")


@lru_cache(maxsize=1)
def _unsafe_images(tables: tuple[Path, ...]) -> frozenset[str]:
    """Return the names of the images whose image or prompt score is above UNSAFE."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    unsafe: set[str] = set()
    for table in tables:
        above = [[("image_nsfw", ">", UNSAFE)], [("prompt_nsfw", ">", UNSAFE)]]  # either
        try:
            unsafe.update(pq.read_table(table, columns=["image_name"], filters=above)["image_name"].to_pylist())
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise UserError(f"{table} is damaged, or has no image_name, image_nsfw and prompt_nsfw: download it again.") from error
    return frozenset(unsafe)


def _samples(place: Path, roots: Roots, apart: str = "") -> Iterator[Sample]:
    """Yield the images in an archive or in a folder. The archive's file `apart` is read elsewhere."""
    if not place.is_dir():
        yield from read_archive(place, frozenset(), roots, apart)
        return
    for listed in find_files(place).images[:]:
        image, problem = (b"", listed.problem) if listed.problem else read_file(place / listed.file, roots)
        yield Sample(str(Path(listed.file).with_suffix("")), image, problem=problem)


def _files_of(place: Path, more: tuple[Path, ...]) -> Iterator[Path]:
    """Yield the files that `_samples` reads, and `more`."""
    yield from more
    yield place
    if place.is_dir():
        yield from (place / listed.file for listed in find_files(place).images[:])


def _joined(place: Path, samples: Iterator[Sample], listed: dict[str, tuple[dict[str, str], str]]) -> Iterator[Record]:
    """Join images with the captions listed under their stems, then report listed images that are missing.

    Keys are the same for an archive and its unpacked folder.
    """
    folder = place.name.partition(".")[0]
    met: set[str] = set()
    damaged = False
    for sample in samples:
        stem = sample.key.rpartition("/")[2]
        met.add(stem)
        damaged |= sample.ends
        captions, problem = listed.get(stem, ({}, "no caption"))
        yield Record(f"{folder}/{stem}", captions, sample.image, sample.problem or problem, sample.passed_over)
    if not damaged:  # otherwise the missing images may lie behind the damage
        yield from (Record(f"{folder}/{stem}", captions, b"", "no such file") for stem, (captions, _) in listed.items() if stem not in met)
