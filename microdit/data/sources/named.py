"""The data sets of the paper (2407.15811), its evaluation set and MiniT2I's, each read in the form in which its authors publish it.

Nothing is downloaded: the folder holds the files of the data set's page under their published names. All other files in it are passed over,
and counted by kind. JourneyDB and DiffusionDB are read by `generated_sets.py`, the sets of MiniT2I's fine-tuning by `fine_tuning_sets.py`.
MiniT2I is trained on `cc12m` in the same layout, with captions of LLaVA-NeXT in the place of the web's.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from microdit.data.sources.archives import archive_names, archive_source, read_archive
from microdit.data.sources.base import Contents, Part, Record, Source, only_captions
from microdit.data.sources.fine_tuning_sets import SHAREGPT4O_LIST, blip3o60k, dalle3, sharegpt4o
from microdit.data.sources.folders import parts_of
from microdit.data.sources.generated_sets import JOURNEYDB_LIST, diffusiondb, journeydb
from microdit.data.sources.metadata import caption_text, from_fields, from_sidecars
from microdit.data.sources.untrusted_files import (
    BLOCK,
    LARGEST_TEXT,
    ListedImage,
    count_kind,
    find_files,
    kind_of,
    read_file,
    roots_of,
    sum_of_kinds,
)
from microdit.errors import UserError
from microdit.io.untrusted_text import parse_json_object


@dataclass(frozen=True)
class NamedSet:
    """A published data set.

    `captions` are the default captions and their weights; `min_side` is the side, in pixels, below which the authors exclude an image.
    `read(folder, captions)` returns the contents, or None if the folder does not hold what `layout` describes.
    """

    name: str
    url: str
    layout: str
    license: str
    captions: dict[str, float]
    min_side: int
    read: Callable[[Path, dict[str, float]], Contents | None]
    more_captions: tuple[str, ...] | None = ()  # further captions that can be chosen; None if any field of its JSON files can


def open_named(named: NamedSet, folder: Path, captions: dict[str, float] | None = None) -> Source:
    """Open the data set in `folder`. Raises UserError if it is not there."""
    weights = captions or named.captions
    if named.more_captions is not None:
        only_captions(named.name, named.captions | dict.fromkeys(named.more_captions, 0.0), captions)
    contents = named.read(folder, weights) if folder.is_dir() else None
    if contents is None or not contents.parts:
        raise UserError(f"{folder} does not hold {named.name}: it should have {named.layout}. Download it from {named.url}.")
    passed_over = _passed_over(folder, contents)
    return Source(named.name, contents.parts, weights, named.license, named.min_side, passed_over=passed_over)


def _passed_over(folder: Path, contents: Contents) -> dict[str, int]:
    """Count, by kind, the files of the folder that no part reads."""
    found = find_files(folder)
    paths = {path.relative_to(folder).as_posix() for path in contents.paths}
    texts = contents.captions.relative_to(folder).as_posix() if contents.captions else None
    counts = Counter(found.passed_over)
    for start in range(0, len(found.images), BLOCK):
        for image in found.images[start : start + BLOCK]:
            if not _is_in(image.file, paths):
                count_kind(counts, image.problem or kind_of(image.file))
    for start in range(0, len(found.others), BLOCK):
        for file in map(os.fsdecode, found.others[start : start + BLOCK].to_pylist()):
            if file not in paths and not (file.endswith(".txt") and file.rpartition("/")[0] == texts):
                count_kind(counts, kind_of(file))
    return sum_of_kinds(counts)


def _is_in(file: str, paths: set[str]) -> bool:
    """Return whether the file, or a folder that it lies in, is one of these."""
    while file and file not in paths:
        file = file.rpartition("/")[0]
    return bool(file)


def _cc12m(folder: Path, captions: dict[str, float]) -> Contents | None:
    tars = sorted(folder.glob("*.tar"))
    return Contents(archive_source(tars, captions, roots_of(folder)).parts, tars) if tars else None


def _sa1b(folder: Path, captions: dict[str, float]) -> Contents | None:
    tars = sorted(folder.glob("sa_*.tar"))
    if not (folder / "captions").is_dir():
        return None
    # Captions without an image are not counted, because most people have only a few of the 1,000 archives.
    parts = [Part(tar.name, partial(_read_sa1b, tar), partial(_files_of_sa1b, tar)) for tar in tars]
    return Contents(parts, tars, folder / "captions")


def _read_sa1b(tar: Path) -> Iterator[Record]:
    roots = roots_of(tar.parent)
    for sample in read_archive(tar, frozenset(), roots):  # the JSON files in the archive hold masks
        text, missing = read_file(_sa1b_caption(tar, sample.key), roots, LARGEST_TEXT)
        found, problem = from_sidecars({} if missing else {"txt": text}, ["caption"])
        captions = {"llava": found["caption"]} if found else {}
        yield Record(sample.key, captions, sample.image, sample.problem or problem, sample.passed_over)


def _files_of_sa1b(tar: Path) -> Iterator[Path]:
    yield tar
    yield from (_sa1b_caption(tar, key) for key in archive_names(tar, roots_of(tar.parent)))


def _sa1b_caption(tar: Path, key: str) -> Path:
    return tar.parent / "captions" / f"{key.rpartition('/')[2]}.txt"


def _textcaps(folder: Path, captions: dict[str, float]) -> Contents | None:
    tables = sorted(folder.rglob("*.parquet"))
    # The mirrors also hold the validation and test images.
    tables = [path for path in tables if "train" in path.relative_to(folder).as_posix()] or tables
    if tables:
        from microdit.data.sources.tables import table_source

        source = table_source(tables, {"reference_strs": 1.0}, roots_of(folder))
        return Contents([replace(part, records=partial(_renamed, part, "reference_strs", "caption")) for part in source.parts], tables)
    listing = folder / "TextCaps_0.1_train.json"
    if not listing.is_file() or not (folder / "train_images").is_dir():
        return None
    first: dict[str, str] = {}  # each of an image's captions is an entry of its own
    for entry in _entries(listing, "data", {"image_id": (str, int), "caption_str": object}):
        first.setdefault(str(entry["image_id"]), caption_text(entry["caption_str"]))
    return _listed_by(listing, [_listed(f"train_images/{image}.jpg", caption) for image, caption in first.items()], folder)


def _renamed(part: Part, old: str, new: str) -> Iterator[Record]:
    for record in part.records():
        yield replace(record, captions={new if name == old else name: text for name, text in record.captions.items()})


def _coco2014(folder: Path, captions: dict[str, float]) -> Contents | None:
    listing = folder / "annotations" / "captions_val2014.json"
    if not listing.is_file() or not (folder / "val2014").is_dir():
        return None
    images = _entries(listing, "images", {"id": int, "file_name": str})
    annotations = _entries(listing, "annotations", {"id": int, "image_id": int, "caption": object})
    first: dict[int, str] = {}
    for annotation in sorted(annotations, key=lambda annotation: annotation["id"]):
        first.setdefault(annotation["image_id"], caption_text(annotation["caption"]))
    return _listed_by(listing, [_listed(f"val2014/{image['file_name']}", first.get(image["id"], "")) for image in images], folder)


def _listed_by(listing: Path, listed: list[ListedImage], folder: Path) -> Contents:
    return Contents(parts_of(listed, folder), [listing, *(folder / image.file for image in listed)])


def _listed(file: str, caption: str) -> ListedImage:
    captions, problem = from_fields({"caption": caption}, ["caption"])
    return ListedImage(file, file, captions, problem)


def _entries(path: Path, key: str, fields: dict[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """Return the list under `key` of a JSON file, each entry of which has these fields, of these types. Raises UserError."""
    try:
        entries = parse_json_object(path.read_bytes())[key]
        if all(field in entry and isinstance(entry[field], kind) for entry in entries for field, kind in fields.items()):
            return list(entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged, or has no list '{key}': download it again.") from error
    raise UserError(f"{path}: not every entry of '{key}' has {', '.join(fields)}: download it again.")


_ON_ITS_PAGE = "see its page; the pictures were made by OpenAI's models"

_SETS = (
    NamedSet(
        name="cc12m",
        url="https://github.com/google-research-datasets/conceptual-12m",
        layout="00000.tar, 00001.tar and so on, as img2dataset writes them (--output_format webdataset)",
        license="captions: free for any purpose, with acknowledgement of Google; pictures: of their owners",
        captions={"caption": 1.0},
        min_side=256,
        read=_cc12m,
        more_captions=None,
    ),
    NamedSet(
        name="sa1b",
        url="https://ai.meta.com/datasets/segment-anything, captions https://huggingface.co/datasets/PixArt-alpha/SAM-LLaVA-Captions10M",
        layout="sa_000000.tar and so on, and beside them the folder captions/ with a file sa_1.txt for each image",
        license="SA-1B Dataset Research License",
        captions={"llava": 1.0},
        min_side=256,
        read=_sa1b,
    ),
    NamedSet(
        name="textcaps",
        url="https://textvqa.org/textcaps, tables https://huggingface.co/datasets/HuggingFaceM4/TextCaps",
        layout="TextCaps_0.1_train.json and train_images/, or .parquet files with the columns image and reference_strs",
        license="CC-BY 4.0",
        captions={"caption": 1.0},
        min_side=256,
        read=_textcaps,
    ),
    NamedSet(
        name="journeydb",
        url="https://huggingface.co/datasets/JourneyDB/JourneyDB",
        layout=f"train/{JOURNEYDB_LIST} and train/imgs/ with 000.tgz and so on, or these unpacked",
        license="JourneyDB's own terms, for non-commercial research",
        captions={"prompt": 1.0},  # the captions on which the paper trains
        min_side=256,
        read=journeydb,
        more_captions=("caption",),
    ),
    NamedSet(
        name="diffusiondb",
        url="https://huggingface.co/datasets/poloclub/diffusiondb",
        layout="part-000001.zip and so on, or these unpacked, anywhere inside; metadata.parquet marks unsafe images",
        license="CC0 1.0",
        captions={"prompt": 1.0},
        min_side=256,
        read=diffusiondb,
    ),
    NamedSet(
        name="coco2014",
        url="https://cocodataset.org/#download",
        layout="annotations/captions_val2014.json and val2014/ (for evaluation)",
        license="captions: CC-BY 4.0; pictures: Flickr's terms",
        captions={"caption": 1.0},
        min_side=0,
        read=_coco2014,
    ),
    NamedSet(
        name="blip3o60k",
        url="https://huggingface.co/datasets/BLIP3o/BLIP3o-60k",
        layout="dalle3.tar, journeyDB.tar, mscoco_human.tar and so on, with pairs of .jpg and .txt",
        license=_ON_ITS_PAGE,
        captions={"caption": 1.0},
        min_side=256,
        read=blip3o60k,
    ),
    NamedSet(
        name="dalle3",
        url="https://huggingface.co/datasets/OpenDatasets/dalle-3-dataset",
        layout="data/ with .parquet files, which have the columns image and caption",
        license=_ON_ITS_PAGE,
        captions={"caption": 1.0},
        min_side=256,
        read=dalle3,
    ),
    NamedSet(
        name="sharegpt4o",
        url="https://huggingface.co/datasets/FreedomIntelligence/ShareGPT-4o-Image",
        layout=f"{SHAREGPT4O_LIST} and text_to_image_part_0.tar and so on",
        license=_ON_ITS_PAGE,
        captions={"prompt": 1.0},
        min_side=256,
        read=sharegpt4o,
    ),
)
NAMED = {named.name: named for named in _SETS}
