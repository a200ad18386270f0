"""Open emoji styles as a source: the sets of the npm packages `@iconify-json/...`, rendered from SVG.

`npm install` puts each set into a folder of node_modules: `icons.json` holds the drawings, `chars.json` their names by code points, and
`info.json` the licence. Names, order and the held-out split are those of the source `emoji`, so every style shows the same emoji.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from microdit.data.sources.base import Part, Record, Source
from microdit.data.sources.builtin import RECORDS_PER_PART, Split, is_held_out, named_emoji
from microdit.data.sources.svg import ViewBox, render_svg
from microdit.data.sources.untrusted_files import Refused, read_file
from microdit.errors import UserError
from microdit.io.untrusted_text import one_line, parse_json_object

# The word for each style in captions and keys, and its package.
STYLES = {"twemoji": "twemoji", "noto": "noto", "openmoji": "openmoji", "flat": "fluent-emoji-flat"}
SIDE = 256  # pixels of a rendered icon
VIEW = {"left": 0.0, "top": 0.0, "width": 16.0, "height": 16.0}  # what the format assumes where a set says nothing

LONGEST_LICENSE = 100  # characters of a set's author or licence


def icons_source(split: Split, named: bool = True, folder: Path | None = None) -> Source:
    """Return the icons of every installed style as a source of PNG files with transparency, 256 x 256 pixels.

    Captions are "owl, flat style", or "an icon, flat style" unless `named`. The packages are looked for in the node_modules of `folder`;
    without it, of the current folder and of those above it, as Node.js does. Raises UserError if there is none, or if one is damaged.
    """
    places = [folder] if folder else [Path.cwd(), *Path.cwd().parents]
    found = {style: set_folder for style, package in STYLES.items() if (set_folder := _set_folder(package, places))}
    if not found:
        raise UserError(f"There are no icons in {places[0]}: run {_install(STYLES)} there.")
    absent = [style for style in STYLES if style not in found]
    return Source(
        name=":".join(["icons", *_kind(split, named)]),
        parts=[part for style, set_folder in found.items() for part in _parts(style, set_folder, split, named)],
        license="; ".join(_license(style, set_folder) for style, set_folder in found.items()),
        note=f"These styles of icons are not installed and are left out: {', '.join(absent)}. {_install(absent)} adds them."
        if absent
        else "",
    )


def _kind(split: Split, named: bool) -> list[str]:
    kind = "_".join(([] if named else ["styles"]) + ([] if split == "train" else [split]))
    return [kind] if kind else []


def _set_folder(package: str, places: list[Path]) -> Path | None:
    folders = (place / "node_modules" / "@iconify-json" / package for place in places)
    return next((folder for folder in folders if (folder / "icons.json").is_file()), None)


def _install(styles: Iterator[str] | list[str] | dict[str, str]) -> str:
    return " ".join(["npm install", *(f"@iconify-json/{STYLES[style]}" for style in styles)])


def _license(style: str, folder: Path) -> str:
    """Return who made the set, and its licence."""
    info = _read_json(folder / "info.json")
    try:
        author, title = str(info["author"]["name"]), str(info["license"]["title"])
    except (KeyError, TypeError):
        raise _damaged(folder / "info.json", "it names no author and licence") from None
    return f"{style} by {one_line(author, LONGEST_LICENSE)}: {one_line(title, LONGEST_LICENSE)}"


def _parts(style: str, folder: Path, split: Split, named: bool) -> list[Part]:
    """Return the parts of a set. Emoji that it has not drawn are left out."""
    names = _read_json(folder / "chars.json")
    chosen = []  # (key, caption, the set's own name of the drawing)
    for stem, name in sorted(named_emoji(), key=lambda emoji: _codepoints(emoji[0])):
        drawing = names.get("-".join(f"{codepoint:04x}" for codepoint in _codepoints(stem) if codepoint != 0xFE0F))
        if isinstance(drawing, str) and is_held_out(name) == (split == "held_out"):
            chosen.append((f"{style}/{stem}", f"{name if named else 'an icon'}, {style} style", drawing))
    parts = []
    for start in range(0, len(chosen), RECORDS_PER_PART):
        share = chosen[start : start + RECORDS_PER_PART]
        files = partial(tuple, [folder / "icons.json"])
        parts.append(Part(f"icons-{style}-{start:06d}", partial(_records, folder, share), files, partial(json.dumps, share)))
    return parts


def _codepoints(stem: str) -> list[int]:
    return [int(codepoint, 16) for codepoint in stem.split("-")]


def _records(folder: Path, chosen: list[tuple[str, str, str]]) -> Iterator[Record]:
    icons = _read_json(folder / "icons.json")
    for key, caption, name in chosen:
        image, problem = b"", ""
        try:
            image = _render(icons, name)
        except Refused as refused:
            problem = refused.reason
        yield Record(key, {"caption": caption}, image, problem)


def _render(icons: dict[str, Any], name: str) -> bytes:
    """Render the drawing of that name. A drawing without a size of its own has the size of its set. Raises Refused."""
    drawings = icons.get("icons")
    drawing = drawings.get(name) if isinstance(drawings, dict) else None
    if not isinstance(drawing, dict) or not isinstance(drawing.get("body"), str):
        raise Refused("no drawing of that name")
    numbers = {key: drawing.get(key, icons.get(key, default)) for key, default in VIEW.items()}
    if not all(type(number) in (int, float) and abs(number) < 1e6 for number in numbers.values()):
        raise Refused("size of the drawing is not a number")
    view = ViewBox(**numbers)
    if min(view.width, view.height) < 1:
        raise Refused("drawing is smaller than one unit")
    return render_svg(drawing["body"], view, SIDE)


def _read_json(path: Path) -> dict[str, Any]:
    content, problem = read_file(path, None)
    try:
        if problem:
            raise ValueError(problem)
        return parse_json_object(content)
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}): run npm install --force @iconify-json/{path.parent.name} again.")
