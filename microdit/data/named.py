"""The sets of the paper (2407.15811) and its evaluation set, each read as its authors hand it out.

Nothing is downloaded: the folder holds what the set's page gives, under the names it gives.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from microdit.data.archives import archive_names, archive_source, read_archive
from microdit.data.folders import parts_of
from microdit.data.generated import JOURNEYDB_LIST, diffusiondb_parts, journeydb_parts
from microdit.data.listing import Listed
from microdit.data.sidecars import caption_text, from_fields, from_sidecars
from microdit.data.sources import Part, Record, Source, only_captions
from microdit.data.untrusted import LARGEST_TEXT, read_file, roots_of
from microdit.errors import UserError
from microdit.foreign_json import parse_json


@dataclass(frozen=True)
class NamedSet:
    """`captions`: names and weights. `min_side`: pixels below which the authors leave a picture out.

    `read(folder, captions)` gives the parts, none if the folder does not hold what `layout` describes.
    """

    name: str
    url: str
    layout: str
    license: str
    captions: dict[str, float]
    min_side: int
    read: Callable[[Path, dict[str, float]], list[Part]]
    more_captions: tuple[str, ...] | None = ()  # that can be asked for; None where any field of its JSON files can


def open_named(named: NamedSet, folder: Path, captions: dict[str, float] | None = None) -> Source:
    """The set in `folder`. Raises UserError if it is not there."""
    weights = captions or named.captions
    if named.more_captions is not None:
        only_captions(named.name, named.captions | dict.fromkeys(named.more_captions, 0.0), captions)
    parts = named.read(folder, weights) if folder.is_dir() else []
    if not parts:
        raise UserError(f"{folder} does not hold {named.name}: looked for {named.layout}. It comes from {named.url}.")
    return Source(named.name, parts, weights, named.license, named.min_side)


def _cc12m(folder: Path, captions: dict[str, float]) -> list[Part]:
    tars = sorted(folder.glob("*.tar"))
    return archive_source(tars, captions, roots_of(folder)).parts if tars else []


def _sa1b(folder: Path, captions: dict[str, float]) -> list[Part]:
    tars = sorted(folder.glob("sa_*.tar"))
    if not (folder / "captions").is_dir():
        return []
    return [Part(tar.name, partial(_read_sa1b, tar), partial(_files_of_sa1b, tar)) for tar in tars]


def _read_sa1b(tar: Path) -> Iterator[Record]:
    roots = roots_of(tar.parent)
    for sample in read_archive(tar, frozenset(), roots):  # its JSON files are masks
        text, missing = read_file(_sa1b_caption(tar, sample.key), roots, LARGEST_TEXT)
        found, problem = from_sidecars({} if missing else {"txt": text}, ["caption"])
        captions = {"llava": found["caption"]} if found else {}
        yield Record(sample.key, captions, sample.image, sample.problem or problem)


def _files_of_sa1b(tar: Path) -> Iterator[Path]:
    yield tar
    yield from (_sa1b_caption(tar, key) for key in archive_names(tar, roots_of(tar.parent)))


def _sa1b_caption(tar: Path, key: str) -> Path:
    return tar.parent / "captions" / f"{key.rpartition('/')[2]}.txt"


def _textcaps(folder: Path, captions: dict[str, float]) -> list[Part]:
    tables = sorted(folder.rglob("*.parquet"))
    # The mirrors also hold the validation and test pictures.
    tables = [path for path in tables if "train" in path.relative_to(folder).as_posix()] or tables
    if tables:
        from microdit.data.tables import table_source

        source = table_source(tables, {"reference_strs": 1.0}, roots_of(folder))
        return [replace(part, records=partial(_renamed, part, "reference_strs", "caption")) for part in source.parts]
    listing = folder / "TextCaps_0.1_train.json"
    if not listing.is_file() or not (folder / "train_images").is_dir():
        return []
    first: dict[str, str] = {}  # of an image's several captions, each an entry of its own
    for entry in _entries(listing, "data", {"image_id": (str, int), "caption_str": object}):
        first.setdefault(str(entry["image_id"]), caption_text(entry["caption_str"]))
    return parts_of([_listed(f"train_images/{image}.jpg", caption) for image, caption in first.items()], folder)


def _renamed(part: Part, old: str, new: str) -> Iterator[Record]:
    for record in part.records():
        yield replace(record, captions={new if name == old else name: text for name, text in record.captions.items()})


def _coco2014(folder: Path, captions: dict[str, float]) -> list[Part]:
    listing = folder / "annotations" / "captions_val2014.json"
    if not listing.is_file() or not (folder / "val2014").is_dir():
        return []
    images = _entries(listing, "images", {"id": int, "file_name": str})
    annotations = _entries(listing, "annotations", {"id": int, "image_id": int, "caption": object})
    first: dict[int, str] = {}
    for annotation in sorted(annotations, key=lambda annotation: annotation["id"]):
        first.setdefault(annotation["image_id"], caption_text(annotation["caption"]))
    listed = [_listed(f"val2014/{image['file_name']}", first.get(image["id"], "")) for image in images]
    return parts_of(listed, folder)


def _listed(file: str, caption: str) -> Listed:
    captions, problem = from_fields({"caption": caption}, ["caption"])
    return Listed(file, file, captions, problem)


def _entries(path: Path, key: str, fields: dict[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """The list under `key` of a JSON file, each entry with these fields, of these types."""
    try:
        entries = parse_json(path.read_bytes())[key]
        if all(field in entry and isinstance(entry[field], kind) for entry in entries for field, kind in fields.items()):
            return list(entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged, or has no list '{key}': download it again.") from error
    raise UserError(f"{path}: not every entry of '{key}' has {', '.join(fields)}: download it again.")


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
        layout="sa_000000.tar and so on, and beside them the folder captions/ with a file sa_1.txt for each picture",
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
        captions={"prompt": 1.0},  # what the paper learns from
        min_side=256,
        read=journeydb_parts,
        more_captions=("caption",),
    ),
    NamedSet(
        name="diffusiondb",
        url="https://huggingface.co/datasets/poloclub/diffusiondb",
        layout="part-000001.zip and so on, or these unpacked, anywhere inside; metadata.parquet marks what is unsafe",
        license="CC0 1.0",
        captions={"prompt": 1.0},
        min_side=256,
        read=diffusiondb_parts,
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
)
NAMED = {named.name: named for named in _SETS}
