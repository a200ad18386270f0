"""The sets of generated images on which MiniT2I is fine-tuned: BLIP3o-60k, DALL-E 3 samples and ShareGPT-4o-Image.

Each is read as its page on the hub publishes it. The layouts are those that the scripts in MiniT2I's repository download and convert
(github.com/PeppaKing8/minit2i-jax, scripts/datasets); the conversion itself is not needed here. Prompts longer than the text encoder reads
are cut, where MiniT2I leaves such images of ShareGPT-4o-Image out.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from microdit.data.sources.archives import archive_source, read_archive
from microdit.data.sources.base import Contents, Part, Record
from microdit.data.sources.metadata import from_fields
from microdit.data.sources.untrusted_files import Roots, roots_of
from microdit.errors import UserError
from microdit.io.untrusted_text import parse_json

SHAREGPT4O_LIST = "text_to_image.json"


def blip3o60k(folder: Path, captions: dict[str, float]) -> Contents | None:
    """Return one part for each archive: dalle3.tar, journeyDB.tar and so on, with pairs of .jpg and .txt."""
    tars = sorted(folder.glob("*.tar"))
    return Contents(archive_source(tars, captions, roots_of(folder)).parts, tars) if tars else None


def dalle3(folder: Path, captions: dict[str, float]) -> Contents | None:
    """Return the parts of the tables in data/, whose columns `image` and `caption` are read."""
    tables = sorted((folder / "data").glob("*.parquet"))
    if not tables:
        return None
    from microdit.data.sources.tables import table_source

    return Contents(table_source(tables, captions, roots_of(folder)).parts, tables)


def sharegpt4o(folder: Path, captions: dict[str, float]) -> Contents | None:
    """Return one part for each archive of the text-to-image half; the half about editing is passed over.

    Prompts without an image are not counted, because most people have only a few of the archives.
    """
    listing, tars = folder / SHAREGPT4O_LIST, sorted(folder.glob("text_to_image_part_*.tar"))
    if not listing.is_file() or not tars:
        return None
    prompts = _prompts(listing)
    parts = [Part(tar.name, partial(_read_sharegpt4o, tar, prompts, roots_of(folder)), partial(iter, (listing, tar))) for tar in tars]
    return Contents(parts, [listing, *tars])


def _read_sharegpt4o(tar: Path, prompts: dict[str, object], roots: Roots) -> Iterator[Record]:
    for sample in read_archive(tar, frozenset(), roots):
        captions, problem = from_fields({"prompt": prompts.get(sample.key)}, ["prompt"])
        yield Record(sample.key, captions, sample.image, sample.problem or problem, sample.passed_over)


def _prompts(listing: Path) -> dict[str, object]:
    """Return the prompts by the images' names without their extension, such as image/7. Raises UserError."""
    try:
        entries = parse_json(listing.read_bytes())
        return {str(entry["output_image"]).rpartition(".")[0]: entry["input_prompt"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{listing} is damaged, or has an entry without output_image and input_prompt: download it again.") from error
