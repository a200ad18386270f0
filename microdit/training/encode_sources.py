"""Sources in place of encoded sets (`data.sets.NAME.source` of a recipe): encoded into a cache when training begins, and read from it."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from microdit.config.schema import Recipe, SetRecipe
from microdit.data.encode import EncodeSettings, default_batch_size, default_workers, encode_source
from microdit.data.encode_plan import EncodeEvents
from microdit.data.manifest import MANIFEST
from microdit.data.sources.base import Source
from microdit.data.sources.open import open_source
from microdit.devices import choose_dtype
from microdit.distributed import World
from microdit.encoders.autoencoder import Autoencoder, load_autoencoder
from microdit.encoders.text import TextEncoder, load_text_encoder
from microdit.encoders.vision import VisionEncoder, load_vision_encoder
from microdit.errors import UserError
from microdit.io.console import Reporter
from microdit.io.files import cache_folder

RESOLUTION = 64  # pixels, where the recipe names none
ENCODERS = ("icon", "minilm")


def with_encoded_sources(recipe: Recipe, world: World, reporter: Reporter) -> tuple[Recipe, int]:
    """Return the recipe with the path of an encoded set in place of each source, and how many records were encoded for that now.

    All processes of `world` must call this. The first process encodes what the cache does not hold yet: the records, order and checksums
    are those of `microdit data encode`. The folder's name is a hash of the encoders (that of the recipe's alignment among them), the
    resolution and the names, sizes and times of the source's files, so that a changed source is encoded again, and one that was
    interrupted continues. Raises UserError.
    """
    sources = {name: item for name, item in recipe.data.sets.items() if item.source is not None}
    if not sources:
        return recipe, 0
    found = {name: _encoded(item, recipe, world, reporter) for name, item in sources.items()}
    encoded = {name: replace(sources[name], path=folder, source=None) for name, (folder, _) in found.items()}
    return replace(recipe, data=replace(recipe.data, sets=recipe.data.sets | encoded)), sum(seen for _, seen in found.values())


def _encoded(item: SetRecipe, recipe: Recipe, world: World, reporter: Reporter) -> tuple[str, int]:
    """Return the folder of a source's encoded set, and how many records were encoded now: none if the cache held it."""

    def encode() -> tuple[str, int]:
        data = recipe.data
        autoencoder, text_encoder = load_autoencoder(data.autoencoder or ENCODERS[0]), load_text_encoder(data.text_encoder or ENCODERS[1])
        vision = None if recipe.alignment is None else load_vision_encoder(recipe.alignment.encoder)
        source = open_source(str(item.source))
        resolution = data.resolution or RESOLUTION
        settings = EncodeSettings(
            (resolution,),
            min_side=resolution if source.min_side is None else source.min_side,
            first_sentences=data.first_sentence > 0,
            dtype=str(choose_dtype("auto", world.device)).removeprefix("torch."),
            device=world.device,
            batch_size=default_batch_size(world.device, (resolution,)),
            workers=default_workers(world.device.type),
        )
        encoders = autoencoder, text_encoder, vision
        folder = _place(source, settings, *encoders)
        is_there = (folder / MANIFEST).is_file()
        return str(folder), 0 if is_there else _fill(source, folder, settings, *encoders, reporter)

    return world.look(encode)


def _place(
    source: Source, settings: EncodeSettings, autoencoder: Autoencoder, text_encoder: TextEncoder, vision: VisionEncoder | None
) -> Path:
    parts = [[part.name, part.fingerprint()] for part in source.parts]
    facts = [source.name, source.caption_weights, settings.planned(), autoencoder.fingerprint, text_encoder.fingerprint, parts]
    facts += [] if vision is None else [vision.fingerprint]
    return cache_folder() / "encoded" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _fill(
    source: Source,
    folder: Path,
    settings: EncodeSettings,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder,
    vision: VisionEncoder | None,
    reporter: Reporter,
) -> int:
    """Encode a source into `folder`, and return how many records were seen."""
    seen = 0
    with reporter.progress(f"encode {source.name} into the cache", len(source.parts)) as advance:

        def count(records: int, parts: int) -> None:
            nonlocal seen
            seen += records
            advance(parts, f"{seen:,} records")

        events = EncodeEvents(on_progress=count)
        manifest = encode_source(source, folder, settings, autoencoder, text_encoder, events=events, warn=reporter.warn, vision=vision)
    if manifest is None:
        raise UserError(f"{folder} was being written by another process: start again.")
    rejected = f", {sum(manifest['rejected'].values()):,} rejected: see {folder}/*.rejected.jsonl" if manifest["rejected"] else ""
    reporter.say(f"{manifest['rows']:,} of {manifest['seen']:,} records of {source.name} kept in {folder}{rejected}.")
    return seen
