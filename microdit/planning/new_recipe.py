"""A first recipe for a source or an encoded set: a bundled recipe that suits the number of images, scaled, with prompts from its captions.

Sizes and schedules are those of three bundled recipes, which are the ones that were tried: emoji-fast for a few thousand images, emoji-long
for tens of thousands, and microdit-tiny, with the paper's settings, beyond.
"""

import re
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from microdit.config.load import load_recipe
from microdit.config.schema import DataRecipe, EMARecipe, Recipe, short_yaml
from microdit.data.dataset import EncodedDataset
from microdit.data.decode import Rejected, decode
from microdit.data.encode import held_out_folder
from microdit.data.look import some_records
from microdit.data.manifest import has_manifest, read_manifest
from microdit.data.sources.base import Source
from microdit.data.sources.open import open_source
from microdit.data.sources.subsets import HoldOut
from microdit.encoders.autoencoder import RECORD
from microdit.errors import UserError
from microdit.io.files import read_json
from microdit.io.places import Place, is_remote, location
from microdit.io.untrusted_text import one_line
from microdit.pipelines.origin import Origin, diffusion_of, find_origin

SURVEYED = 500  # records that are decoded
COUNTED = 20_000  # records that are counted one by one; the number of further ones is estimated
PROMPTS, LONGEST_PROMPT = 8, 200
FINE_STEPS, FINE_LEARNING_RATE = 0.25, 0.3  # of those from scratch, where a recipe starts from a trained model
FEW = 1000  # images, below which a model repeats them rather than learning from them
LEAST_HELD_OUT = 20  # images, below which none is held out
HOLD_OUT = "5%"
RESOLUTIONS = {"icon": (64, 32), "pixels": (32,)}  # largest first; other autoencoders are for 256 px and more
LARGE_RESOLUTIONS = (256,)
SMALL_SHARE = 0.1  # of the images that may be smaller than the resolution
WHITE, MOSTLY = 240, 0.5


@dataclass(frozen=True)
class Template:
    """A bundled recipe, given as its phases in order, for sets of fewer than `below` images. Each image is seen `epochs` times.

    The steps are never fewer than `least` of the bundled recipe's.
    """

    below: float
    recipes: tuple[str, ...]
    epochs: int
    least: float


TEMPLATES = (
    Template(5_000, ("emoji-fast",), 57, 1.0),  # 57: as the 1,807 emoji are
    Template(100_000, ("emoji-long",), 40, 0.25),
    Template(float("inf"), ("microdit-tiny/1-256-masked", "microdit-tiny/2-256-full"), 20, 0.05),
)


@dataclass(frozen=True)
class Choices:
    """The user's decisions; None leaves one to `new_recipe`."""

    data: str | None = None
    autoencoder: str = "icon"
    text_encoder: str = "minilm"
    resolution: int | None = None
    hold_out: HoldOut | None = None
    init_from: str | None = None


@dataclass(frozen=True)
class NewRecipe:
    """A recipe for so many `images`, and sentences for the user.

    `encode` holds the arguments of `microdit data encode` that come first; None if the set is encoded.
    """

    recipe: Recipe
    images: int
    encode: list[str] | None
    notes: list[str]


@dataclass(frozen=True)
class Survey:
    """A sample of the usable records of a source: captions, shorter sides in pixels, and the share of images on white."""

    images: int
    is_estimate: bool
    captions: list[str]
    sides: list[int] = field(default_factory=list)
    on_white: float = 1.0
    problems: Mapping[str, int] = field(default_factory=dict)


def new_recipe(place: str, choices: Choices) -> NewRecipe:
    """Look at a source or an encoded set, by its name or folder, and return a recipe for it.

    Raises UserError if there is neither, or if none of the records looked at is usable.
    """
    folder = Path(place).expanduser()
    if (folder / "recipe.yaml").is_file() or folder.suffix == ".yaml":
        raise UserError(f"{place} is a run or a recipe, not pictures: name a source of pictures with captions, or an encoded set.")
    origin = find_origin(choices.init_from) if choices.init_from else None
    if origin:
        names: dict[str, Any] = {key: str(encoder["name"]) for key, encoder in origin.encoders.items() if "name" in encoder}
        choices = replace(choices, **names)  # the weights fit no other encoders
    encoded = location(place) if is_remote(place) else folder
    found = _for_encoded(encoded, choices) if has_manifest(encoded) else _for_source(place, choices)
    return replace(found, recipe=_fine_tuned(found.recipe, origin, choices)) if origin else found


def recipe_file(new: NewRecipe, place: str) -> str:
    """Return the text of the recipe's file, with a comment that says what it was made from."""
    recipe, images = new.recipe, sum(phase.steps * phase.batch_size for phase in new.recipe.phases)
    return (
        f"# For {one_line(place)}, by microdit new: {images:,} pictures seen in {recipe.total_steps:,} steps.\n"
        f"# If the samples are blurred or do not follow their captions, train longer first (phases: steps), and then a wider model (dim).\n"
        f"{short_yaml(recipe)}"
    )


def survey(source: Source) -> Survey:
    """Look at a sample of a source. Raises UserError if none of its records is usable, with the reasons and what to do."""
    captions, sides, white, problems = [], [], 0, Counter[str]()
    for record in some_records(source, list(source.caption_weights), SURVEYED):
        try:
            if record.problem:
                raise Rejected(record.problem)
            image = decode(record.image)
        except Rejected as rejected:
            problems[rejected.reason] += 1
            continue
        captions.append(next(iter(record.captions.values())))
        sides.append(min(image.size))
        white += _is_on_white(image)
    if not captions:
        raise UserError(_nothing_usable(source.name, problems))
    images, is_estimate = _count(source)
    usable = len(captions) / (len(captions) + problems.total())
    return Survey(round(images * usable), is_estimate, captions, sides, white / len(captions), problems)


def _for_source(place: str, choices: Choices) -> NewRecipe:
    source = open_source(place)
    found = survey(source)
    name = _slug(source.name)
    resolution = choices.resolution or _resolution(choices.autoencoder, found.sides)
    data = choices.data or f"data/{name}"
    hold_out = choices.hold_out or (HoldOut.parse(HOLD_OUT) if found.images * 0.05 >= LEAST_HELD_OUT / 4 else None)
    encode = [place, "--out", data, "--resolutions", str(resolution)]
    encode += ["--autoencoder", choices.autoencoder] if choices.autoencoder != "icon" else []
    encode += ["--text-encoder", choices.text_encoder] if choices.text_encoder != "minilm" else []
    encode += ["--hold-out", hold_out.words] if hold_out else []
    recipe = _scaled(
        name,
        found.images,
        found.captions,
        DataRecipe(
            data,
            resolution=resolution,
            autoencoder=choices.autoencoder,
            text_encoder=choices.text_encoder,
            held_out=str(held_out_folder(Path(data))) if hold_out else None,
        ),
    )
    return NewRecipe(recipe, found.images, encode, _notes(found, resolution, choices.autoencoder))


def _for_encoded(folder: Path | Place, choices: Choices) -> NewRecipe:
    encoded = EncodedDataset(folder, choices.resolution or min(read_manifest(folder)["settings"]["resolutions"]))
    held_out = held_out_folder(folder)
    found = Survey(len(encoded), False, [captions[0] for _, _, captions in encoded.spread(2 * PROMPTS)])
    data = DataRecipe(
        str(folder),
        resolution=encoded.resolution,
        autoencoder=encoded.manifest["autoencoder"]["name"],
        text_encoder=encoded.manifest["text_encoder"]["name"],
        held_out=str(held_out) if has_manifest(held_out) else None,
    )
    recipe = _scaled(_slug((folder.absolute() if isinstance(folder, Path) else folder).name), found.images, found.captions, data)
    return NewRecipe(recipe, found.images, None, _notes(found, encoded.resolution, ""))


def _scaled(name: str, images: int, captions: list[str], data: DataRecipe) -> Recipe:
    """Return the bundled recipe for so many images on this data, with its steps scaled."""
    template = next(template for template in TEMPLATES if images < template.below)
    first, *others = (load_recipe(part) for part in template.recipes)
    phases = [phase for recipe in (first, *others) for phase in recipe.phases]
    factor = max(template.least, template.epochs * images / sum(phase.steps * phase.batch_size for phase in phases))
    phases = [
        replace(phase, steps=_times(phase.steps, factor), warmup_steps=round(phase.warmup_steps * factor), weights=None) for phase in phases
    ]
    total = sum(phase.steps for phase in phases)
    diffusion = first.diffusion if data.autoencoder == "icon" else replace(first.diffusion, P_mean=-0.6)  # as the paper does on latents
    record = replace(
        first.record,
        metrics_every=max(1, total // 50),
        samples_every=max(1, total // 4),
        checkpoint_every=max(1, total // 8),
        held_out_every=max(1, total // 8),
        sample_prompts=_prompts(captions),
    )
    ema = [EMARecipe(0.999, phases[0].steps)] if others else first.ema
    return replace(first, name=name, data=data, phases=phases, diffusion=diffusion, ema=ema, record=record)


def _fine_tuned(recipe: Recipe, origin: Origin, choices: Choices) -> Recipe:
    """Return the recipe with the origin's model and objective, a quarter of the steps, and smaller learning rates."""
    if origin.model is None:
        raise UserError(f"No part model: of a recipe describes {origin.place}: write the recipe by hand, or start from another model.")
    phases = [
        replace(
            phase,
            steps=_times(phase.steps, FINE_STEPS),
            warmup_steps=round(phase.warmup_steps * FINE_STEPS),
            learning_rate=phase.learning_rate * FINE_LEARNING_RATE,
            mask_ratio=0.0,
        )
        for phase in recipe.phases
    ]
    total = sum(phase.steps for phase in phases)
    record = replace(
        recipe.record, samples_every=max(1, total // 4), checkpoint_every=max(1, total // 4), held_out_every=max(1, total // 8)
    )
    diffusion = diffusion_of(origin.objective)
    return replace(recipe, init_from=choices.init_from, model=origin.model, diffusion=diffusion, phases=phases, record=record)


def _times(steps: int, factor: float) -> int:
    return max(1, round(steps * factor))


def _prompts(captions: list[str]) -> list[str]:
    """Return up to PROMPTS different captions, evenly spread, the short ones if there are enough."""
    different = list(dict.fromkeys(captions))
    short = [caption for caption in different if len(caption) <= LONGEST_PROMPT] or [caption[:LONGEST_PROMPT] for caption in different]
    count = min(PROMPTS, len(short))
    return [short[number * len(short) // count] for number in range(count)]


def _resolution(autoencoder: str, sides: list[int]) -> int:
    """Return the largest usual resolution of an autoencoder that at most SMALL_SHARE of the images are too small for.

    One that `microdit train-autoencoder` made is for the resolution that it was trained at.
    """
    usual = RESOLUTIONS.get(autoencoder) or _trained_at(Path(autoencoder).expanduser()) or LARGE_RESOLUTIONS
    fitting = (resolution for resolution in usual if sum(side < resolution for side in sides) <= SMALL_SHARE * len(sides))
    return next(fitting, usual[-1])


def _trained_at(folder: Path) -> tuple[int] | None:
    """Return the side of the pictures that the autoencoder in a folder was trained on; None if the folder does not record it."""
    if not (folder / RECORD).is_file():
        return None
    settings = read_json(folder / RECORD, "Train the autoencoder again.").get("settings")
    side = settings.get("image_size") if isinstance(settings, dict) else None
    return (side,) if isinstance(side, int) and side > 0 else None


def _notes(found: Survey, resolution: int, autoencoder: str) -> list[str]:
    """Return sentences about what the user should know before encoding."""
    notes = []
    about = "about " if found.is_estimate else ""
    unusable = ", ".join(f"{count:,} x {reason}" for reason, count in sorted(found.problems.items(), key=lambda item: -item[1]))
    if unusable:
        notes.append(f"Of the {len(found.captions) + sum(found.problems.values()):,} records looked at, some cannot be used: {unusable}.")
    small = sum(side < resolution for side in found.sides)
    if small:
        notes.append(
            f"{small:,} of {len(found.sides):,} pictures have a side shorter than {resolution} px and will be rejected "
            f"(the median is {statistics.median(found.sides):.0f} px): --resolution sets another size."
        )
    if autoencoder == "icon" and found.on_white < MOSTLY:
        notes.append(
            f"Only {found.on_white:.0%} of the pictures are drawings on white, for which the icon autoencoder was made: it blurs "
            "photographs and changes their colours. --autoencoder sdxl suits them (it is downloaded, and wants a GPU)."
        )
    if found.images < FEW:
        notes.append(
            f"With {about}{found.images:,} pictures, expect the model to repeat them rather than to learn from them. docs/fine-tuning.md "
            "begins with a model that has seen more."
        )
    return notes


def _nothing_usable(name: str, problems: Counter[str]) -> str:
    reasons = ", ".join(f"{count:,} x {reason}" for reason, count in problems.most_common()) or "there are none"
    how = (
        " A caption is a .txt file beside each picture, or a line of metadata.jsonl or metadata.csv; or encode with --captions-from file "
        "(or folder), and name the encoded set here."
        if "no caption" in problems
        else ""
    )
    return f"None of the pictures looked at in {name} can be used: {reasons}.{how} `microdit data look` shows more."


def _count(source: Source) -> tuple[int, bool]:
    """Return the number of records, counted up to COUNTED and estimated by parts beyond, and whether it is an estimate."""
    total = 0
    for number, part in enumerate(source.parts, start=1):
        total += sum(1 for _ in part.records())
        if total > COUNTED and number < len(source.parts):
            return round(total * len(source.parts) / number), True
    return total, False


def _is_on_white(image: Image.Image) -> bool:
    """Return whether all four corners are nearly white, as transparent ones are when they are composited."""
    width, height = image.size
    pixels = np.asarray(image)
    corners = pixels[[0, 0, height - 1, height - 1], [0, width - 1, 0, width - 1]]
    return bool((corners >= WHITE).all())


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "pictures"
