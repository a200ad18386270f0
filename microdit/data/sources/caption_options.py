"""Edit the captions of a source: take them from names or from another file, keep some lines, match, and drop boilerplate."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

from microdit.data.sources.base import END, Part, Record, Source
from microdit.data.sources.joined_captions import JoinedCaptions, open_joined
from microdit.data.sources.metadata import CAPTION_PROBLEMS, NO_CAPTION
from microdit.data.sources.untrusted_files import IMAGE_SUFFIXES
from microdit.errors import UserError

CaptionsFrom = Literal["text", "file", "folder"]
CaptionLines = Literal["all", "first"]

NONE_WANTED = {"": 1.0}  # captions to read from a source whose own captions are all replaced
NO_MATCH = "caption does not match --caption-regex"
NOTHING_LEFT = "--caption-drop leaves nothing of the caption"
NO_FOLDER = "picture lies in no folder whose name could be its caption"


@dataclass(frozen=True)
class CaptionOptions:
    """Where captions come from, and what is kept of them.

    `captions_from` takes them from texts, or from the name of each image's file or folder. `joined` names a file with captions by key, as
    FILE or FILE:KEY:FIELD, for which an index is kept in `index_folder`, or in a temporary folder. Then, in this order: `lines` keeps all
    lines of a caption or the first one, `regex` the first group of what it matches, or the match, and each pattern of `drop` is removed.
    `file_column` names the column of a list that holds the files.
    """

    captions_from: CaptionsFrom = "text"
    joined: str | None = None
    lines: CaptionLines = "all"
    regex: str | None = None
    drop: tuple[str, ...] = ()
    file_column: str | None = None
    index_folder: Path | None = None

    def __post_init__(self) -> None:
        for pattern in (*self.drop, *([self.regex] if self.regex else [])):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"The pattern {pattern} is no regular expression: {error}.") from error

    def is_default(self) -> bool:
        """Return whether captions stay as the source holds them."""
        return (self.captions_from, self.joined, self.lines, self.regex, self.drop) == ("text", None, "all", None, ())


def own_captions(captions: dict[str, float] | None, options: CaptionOptions) -> tuple[dict[str, float] | None, JoinedCaptions | None]:
    """Return the captions to read from the source itself, and the joined ones. Raises UserError if the options contradict each other."""
    if options.captions_from != "text" and (captions or options.joined):
        raise UserError(f"--captions-from {options.captions_from} replaces all captions: leave out --caption and --captions.")
    joined = open_joined(options.joined, options.index_folder) if options.joined else None
    if captions is None and (joined or options.captions_from != "text"):
        return NONE_WANTED, joined
    if joined is None or captions is None:
        return captions, joined
    if joined.field not in captions:
        raise UserError(
            f"--captions {options.joined} adds captions named {joined.field}: give them a weight, --caption {joined.field}=0.5."
        )
    return {name: weight for name, weight in captions.items() if name != joined.field} or NONE_WANTED, joined


def with_captions(source: Source, weights: dict[str, float] | None, joined: JoinedCaptions | None, options: CaptionOptions) -> Source:
    """Return the source with its captions edited. `weights` are those chosen by name, with the joined ones, if any were chosen."""
    if options.is_default():
        return source
    parts = [
        replace(part, records=partial(_edited, part, joined, weights is None, options), known=partial(_known, part, joined, options))
        for part in source.parts
    ]
    if options.captions_from != "text":
        weights = {"caption": 1.0}
    elif joined:
        weights = weights or {joined.field: 1.0}
    return replace(source, parts=parts, caption_weights=weights or source.caption_weights, joined=joined.counts if joined else None)


def _known(part: Part, joined: JoinedCaptions | None, options: CaptionOptions) -> str:
    edits = (options.captions_from, options.lines, options.regex, options.drop)
    return f"{edits} {joined.fingerprint if joined else ''} of {part.known()}"


def _edited(part: Part, joined: JoinedCaptions | None, replaces: bool, options: CaptionOptions) -> Iterator[Record]:
    records = part.records()
    if joined:
        records = joined.records(part.name, records, replaces)
    for record in records:
        yield record if record.key.endswith(END) else _edit(record, options)


def _edit(record: Record, options: CaptionOptions) -> Record:
    captions, problem = dict(record.captions), record.problem
    if options.captions_from != "text" and (not problem or problem in CAPTION_PROBLEMS):
        name = _name_of(record.key, options.captions_from)
        captions, problem = ({"caption": name}, "") if name else ({}, NO_FOLDER)
    kept, reason = _kept(captions, options)
    return replace(record, captions=kept, problem=problem or (reason if captions and not kept else ""))


def _kept(captions: Mapping[str, str], options: CaptionOptions) -> tuple[dict[str, str], str]:
    """Return what the options keep of captions, and why one of them is lost, if one is."""
    kept, reason = {}, ""
    for name, text in captions.items():
        if options.lines == "first":
            text = next((line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()), "")
        if options.regex:
            match = _compiled(options.regex).search(text)
            text = (match[1] if match.re.groups else match[0]) or "" if match else ""
            reason = reason if text else NO_MATCH
        for pattern in options.drop:
            text = _compiled(pattern).sub("", text)
        if text.strip():
            kept[name] = text.strip()
    return kept, reason or (NOTHING_LEFT if options.drop else NO_CAPTION)


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


def _name_of(key: str, which: CaptionsFrom) -> str:
    """Return the name of an image's file without its suffix, or of its folder, as words; empty if it has no folder."""
    folder, _, name = key.rpartition("/")
    if which == "folder":
        name = folder.rpartition("/")[2]
    else:
        suffix = next((suffix for suffix in IMAGE_SUFFIXES if name.lower().endswith(suffix)), "")
        name = name[: len(name) - len(suffix)]
    return re.sub(r"[\s_+-]+", " ", name).strip()
